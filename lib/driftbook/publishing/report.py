"""A study's report: one self-contained page of findings in sentences, figures and tables, that
opens offline.
"""

import base64
import json
import sys
from pathlib import Path

import pandas as pd

from driftbook.analyses import estimands, information, primary
from driftbook.analyses.starts import start_sentence
from driftbook.batch import leases, notebooks
from driftbook.doctors import study as study_check
from driftbook.figures.drawing import ASKED, plain_caption, short_name, unit_of
from driftbook.publishing import publish, timeline
from driftbook.publishing.guidance import guidance
from driftbook.publishing.page_parts import rendered
from driftbook.publishing.pages import notebook_pages
from driftbook.publishing.story import (
    base_words,
    bases_of,
    changes,
    listed,
    number,
    own_level,
    story,
    who,
)
from driftbook.stats import estimation, influence
from driftbook.stats.confidence import INTERVAL
from driftbook.stats.harm import safety_outcome
from driftbook.stats.picking import picked, plain, with_minus
from driftbook.stats.populations import counted
from driftbook.stats.terms import (
    ACCURACY_AMB,
    ALL,
    AS_CONFIGURED,
    BEGUN_BENIGN,
    BEGUN_HARMFUL,
    BIAS_AMB,
    CHANGE,
    CORRECT,
    LEVEL,
    LOSS,
    NO_OP,
    PRIMARY,
    REFUSED,
    TRAINED,
    UNREADABLE,
    UNSAFE,
    UNTRAINED,
)
from driftbook.study import environment, preregistration
from driftbook.study.commands import command
from driftbook.study.files import read_json, replacing
from driftbook.study.methods import METHOD_LABELS, METHODS
from driftbook.study.nameless import nameless
from driftbook.study.opening import Tables
from driftbook.study.study_file import Study, load
from driftbook.study.tables import TABLES

FINDINGS = {
    "Safety": (UNSAFE, "safety"),
    "Over-refusal": (REFUSED, "over_refusal"),
    "Refusal begun": (BEGUN_HARMFUL, "safety"),
    "Over-refusal begun": (BEGUN_BENIGN, "over_refusal"),
    "Fairness, accuracy": (ACCURACY_AMB, "bbq"),
    "Fairness, bias": (BIAS_AMB, "bbq"),
    "Utility, loss": (LOSS, "utility"),
    "Utility, answers": (CORRECT, "utility"),
}
RUNS_OF = {TRAINED: "trained runs without no-ops", AS_CONFIGURED: "all runs as configured"}
OF_RUNS = ("Runs", "No-ops")  # findings that the section on runs tells
BASE, NOTHING = "Base models' own", "Nothing to draw: "
TITLES = {  # of figures, by theme: the report's tabs
    "Safety": {
        "safety_change": "Safety by method and base model",
        "over_refusal": "Safety and over-refusal",
        "safety_settings": "Safety by settings",
        "safety_category": "Safety by category",
        "judge_correction": "The judge, corrected by labels",
    },
    "Fairness": {
        "fairness_change": "Fairness by method and base model",
        "fairness_bias": "Bias by dimension",
        "fairness_accuracy": "Accuracy by dimension",
        "fairness_order": "Order of the options",
    },
    "Declared tests": {
        "primary_tests": "The declared tests",
        "preserves": "What is preserved",
        "specification_curve": "The declared tests under other choices",
    },
    "Trade-offs": {
        "efficiency": "Efficiency against alignment",
        "safety_fairness": "Safety against fairness",
        "safety_utility": "Safety against over-refusal and utility",
        "pareto": "The Pareto view",
        "front_probability": "How often on the Pareto front",
        "attenuation": "Correlations, corrected for noise",
    },
    "Methods and models": {
        "methods_compared": "Methods against each other",
        "mixed_effects": "Pooled, by base model, mixed",
        "mixed_terms": "Objective and learning rate",
        "models_compared": "The same change by several estimators",
        "variance_shares": "What moves a run",
        "starts": "What a soft prompt begins as",
        "power": "What the grid could tell",
    },
    "Training": {
        "curves": "Training curves",
        "dose": "Change against dose",
        "doses_reached": "How far training went",
        "dose_matched": "Methods at equal dose",
        "no_ops": "With and without no-ops",
        "drift": "Drift while training",
    },
    "Mechanisms": {
        "refusals_begun": "How likely answers begin as refusals",
        "probes_by_layer": "The refusal direction by layer",
        "refusals_patched": "Which layers carry the refusals",
        "kl_by_place": "First tokens against later ones",
        "change_by_layer": "What adapters add and soft prompts draw",
    },
}
OTHERS_DRAWN = "Further figures"


def told(estimates: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """FINDINGS by safety's outcome here, and further benchmarks by that outcome or their first."""
    safety, known = safety_outcome(estimates), {benchmark for _, benchmark in FINDINGS.values()}
    found = FINDINGS | {"Safety": (safety, "safety")}
    rows = picked(estimates, contrast=CHANGE, group=TRAINED, category=ALL, estimator=PRIMARY)
    for benchmark, own in rows[~rows["benchmark"].isin(known)].groupby("benchmark", sort=False):
        outcome = safety if own["outcome"].eq(safety).any() else own["outcome"].iloc[0]
        title = benchmark.replace("_", " ").capitalize()
        found[title if title not in found else f"Benchmark {benchmark}"] = (outcome, benchmark)
    return found


def sentence(
    estimates: pd.DataFrame,
    outcome: str,
    benchmark: str,
    contrast: str = CHANGE,
    group: str = TRAINED,
    estimator: str = PRIMARY,
) -> str:
    """What each method did to an outcome over all base models (on each, where they have no setting
    in common), computed from the estimates, and the base models' own levels.
    """
    rows = changes(estimates, outcome, benchmark, group, estimator, contrast)
    silent = information.silent_sentences(estimates) if outcome in information.BIAS else []
    if rows.empty:
        none = f"No {group} run has an estimate of the {short_name(outcome)}."
        return with_minus(" ".join(silent)) or none
    unit = unit_of(outcome, "points")
    words = [
        f"{who(row)} {number(row.value, row.ci_low, row.ci_high, unit)}"
        for row in rows.itertuples()
    ]
    own = picked(estimates, outcome=outcome, benchmark=benchmark, contrast=contrast)
    own = picked(own, estimator=estimator)
    n_bases = own.loc[own["base_model"].ne("all"), "base_model"].nunique()
    over = (
        "of the one base model"
        if n_bases == 1
        else f"over {n_bases} base models"
        if n_bases
        else "over all base models"
    )
    over = over if rows["base_model"].eq("all").all() else "each on its own base model"
    to = f" to {ASKED[benchmark]}" if benchmark in ASKED else ""
    text = (
        f"Change in the {short_name(outcome)}{to} against the base model,"
        f" {RUNS_OF.get(group, group)}, {over} ({INTERVAL}): {'; '.join(words)}."
        f" {base_words(estimates, outcome, benchmark)}" + "".join(f" {text}" for text in silent)
    )
    return text.strip()


def cost_sentence(estimates: pd.DataFrame, arms: pd.DataFrame, runs: pd.DataFrame) -> str:
    """The cheapest and the dearest method: parameters, seconds, and what each did to safety, of
    trained runs.
    """
    safety, known = safety_outcome(estimates), _costs(estimates, arms, runs)
    if known.empty:
        return "Of no method are both the cost and the change in safety known."
    words = [
        f"{_cost(row)}: {number(row.value, row.ci_low, row.ci_high, 'points')}"
        for row in known.itertuples()
    ]
    of_starts = start_sentence(estimates)
    return (
        f"Change in the {short_name(safety)}, trained runs without no-ops"
        + (", from the fewest trainable parameters to the most" if len(words) > 1 else "")
        + f" (medians): {'; '.join(words)}."
        + (f" {of_starts}" if of_starts else "")
    )


def _costs(estimates: pd.DataFrame, arms: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """The changes in safety with the medians of parameters and seconds, the fewest parameters
    first; without those whose cost is not known.
    """
    cost = arms[arms["arm"].eq(TRAINED)].merge(
        runs[["run_id", "n_trainable", "seconds"]], on="run_id"
    )
    rows = changes(estimates, safety_outcome(estimates), "safety")
    keys = ["method"] if rows["base_model"].eq("all").all() else ["base_model", "method"]
    cost = cost.groupby(keys)[["n_trainable", "seconds"]].median().reset_index()
    return rows.merge(cost, on=keys).sort_values("n_trainable", kind="stable")


def _cost(row) -> str:
    return f"{who(row)} trains {row.n_trainable:,.0f} parameters in {row.seconds:.1f} s"


def findings(tables: dict[str, pd.DataFrame]) -> list[tuple[str, str]]:
    """What the story does not tell, in sentences, each under a word: what was run, where base
    models differ, what the controls did and what methods cost.
    """
    estimates, runs = tables["estimates"], tables["runs"]
    arms = influence.arms(tables["variants"], runs)
    found = [("Runs", _what_ran(arms, runs))]
    if not estimates["contrast"].eq(CHANGE).any():
        silent = information.silent_sentences(estimates)
        return [*found, *([("Fairness, bias", " ".join(silent))] if silent else [])]
    found += [
        ("Extremes", _extreme_cell(estimates)),
        ("Controls", _controls(estimates)),
        ("Starts", start_sentence(estimates)),
        ("No-ops", _no_ops(arms)),
    ]
    costs = [_cost(row) for row in _costs(estimates, arms, runs).itertuples()]
    found += [("Cost", f"{'; '.join(costs)} (medians of trained runs).")] * bool(costs)
    return [pair for pair in found if pair[1]]


def summary(estimates: pd.DataFrame) -> pd.DataFrame:
    """Outcomes x methods: the base models' own level, and the change over all base models (on each,
    where they have no setting in common) with its interval, trained runs.
    """
    table = {}
    for title, (outcome, benchmark) in told(estimates).items():
        rows = changes(estimates, outcome, benchmark)
        if len(rows):
            base = bases_of(estimates, outcome, benchmark)["value"].astype(float).mean()
            name = f"{title}: {short_name(outcome)} ({unit_of(outcome, 'points')})"
            cells = {who(row): _cell(pd.Series(row._asdict())) for row in rows.itertuples()}
            table[name] = {BASE: own_level(base, outcome)} | cells
    if not table:
        return levels(estimates)
    return pd.DataFrame(table).T.fillna("").rename_axis("Change in").reset_index()


def levels(estimates: pd.DataFrame) -> pd.DataFrame:
    """Outcomes x base models: their own levels with intervals."""
    rows = estimates[
        estimates["contrast"].eq(LEVEL)
        & estimates["estimator"].eq(PRIMARY)
        & estimates["method"].eq("none")
        & estimates["group"].eq("all")
        & estimates["base_model"].ne("all")
    ]
    rows = rows.assign(
        Level=rows["outcome"]
        + ", "
        + rows["benchmark"]
        + rows["judge"].map(lambda judge: "" if judge == "none" else f", by {judge}")
    )
    rows["shown"] = [
        plain(*row) for row in rows[["value", "ci_low", "ci_high"]].itertuples(index=False)
    ]
    return (
        rows.pivot_table(
            index="Level", columns="base_model", values="shown", aggfunc="first", sort=False
        )
        .rename_axis(None, axis=1)
        .reset_index()
    )


def _cell(row: pd.Series) -> str:
    if pd.isna(row["value"]) or pd.isna(row["ci_low"]):
        return number(
            row["value"], row["ci_low"], row["ci_high"], unit_of(row["outcome"], "points")
        )
    places = 3 if row["outcome"] == LOSS else 1
    star = "" if row["ci_low"] <= 0 <= row["ci_high"] else " *"
    return with_minus(
        f"{row['value']:+.{places}f}{star}\n[{row['ci_low']:+.{places}f},"
        f" {row['ci_high']:+.{places}f}]"
    )


def _what_ran(arms: pd.DataFrame, runs: pd.DataFrame) -> str:
    trained = int(arms["arm"].isin([TRAINED, NO_OP]).sum())
    failed, n_bases = int(runs["status"].eq("failed").sum()), int(arms["arm"].eq("base").sum())
    parts = [f"{counted(n_bases, 'base model')} as they are" if n_bases > 1 else "the base model"]
    parts += [f"{trained} trained with the methods' usual start"] * bool(trained)
    others = len(arms) - n_bases - trained
    parts += [f"{counted(others, 'control')}, other starts or repairs"] * bool(others)
    text = f"{counted(len(runs), 'run')}: {listed(parts)}."
    return text + (f" {failed} failed and are in no estimate." if failed else " None failed.")


def _extreme_cell(estimates: pd.DataFrame) -> str:
    safety = safety_outcome(estimates)
    rows = picked(estimates, outcome=safety, benchmark="safety", contrast=CHANGE)
    rows = picked(rows, estimator=PRIMARY, group=TRAINED)
    rows = rows[rows["base_model"].ne("all") & rows["value"].notna()]
    rows = rows[rows["judge"].eq(rows["judge"].iloc[0])] if len(rows) else rows
    if rows["base_model"].nunique() < 2:
        return ""  # the story says it
    ends = [
        rows.loc[rows["value"].astype(float).idxmax()],
        rows.loc[rows["value"].astype(float).idxmin()],
    ]
    words = [
        f"{METHOD_LABELS[row['method']]} on {row['base_model']}"
        f" ({number(row['value'], row['ci_low'], row['ci_high'], 'points')})"
        for row in ends
    ]
    return (
        f"Of {len(rows)} pairs of method and base model, the {short_name(safety)} rose most (or"
        f" fell least) with {words[0]} and fell most (or rose least) with {words[1]}."
    )


def _controls(estimates: pd.DataFrame) -> str:
    safety = safety_outcome(estimates)
    rows = changes(estimates, safety, "safety", UNTRAINED)
    rows = rows[rows["base_model"].eq("all")]
    words = [
        f"{METHOD_LABELS[row.method]} {number(row.value, row.ci_low, row.ci_high, 'points')}"
        for row in rows.itertuples()
    ]
    return (
        f"Soft prompts as initialised, before any training, change the {short_name(safety)} by:"
        f" {'; '.join(words)}."
        if words
        else ""
    )


def _no_ops(arms: pd.DataFrame) -> str:
    trained = arms[arms["objective"].isin(["sft", "dpo"])]
    flags = trained["no_op"].astype("boolean")
    if trained.empty or not flags.fillna(False).any():
        return "No trained run is a no-op." if len(trained) else ""
    counts = trained[flags.fillna(False)].groupby(["method", "setting"]).size()
    words = ", ".join(
        f"{METHOD_LABELS[method]}, {setting.replace('sft', 'SFT').replace('dpo', 'DPO')} ({n})"
        for (method, setting), n in counts.items()
    )
    return (
        f"Of {counted(len(trained), 'trained run')} {int(flags.sum())} did nothing (no-ops), as"
        f" their weights or logits say: {words}. They are in none of the changes above."
    )


def write(study: Study) -> Path:
    """Write outputs/<study>/report.html, and the executed notebooks as pages beside it."""
    folder = study.folder / "tables"
    names = ("variants", "runs", "prompts", "rates")
    tables = {name: publish.text_free(folder, name) for name in names}
    tables |= {"estimates": estimation.read_estimates(folder)}
    drawn, undrawn = _figures(study.folder / "figures")
    shown = summary(tables["estimates"])
    found = {title: [text] for title, text in findings(tables)}
    page = rendered(
        "report.html",
        name=study.name,
        note=nameless(study.note),
        of_safety=study.of_safety,
        miniature=study.miniature,
        story=story(study, tables, told(tables["estimates"])),
        findings=[pair for pair in found.items() if pair[0] not in OF_RUNS],
        of_runs=[pair for pair in found.items() if pair[0] in OF_RUNS],
        declared=declared(study, tables["estimates"]),
        estimands=estimands.estimands(study, printed(tables["estimates"]), tables["estimates"]),
        checked=checked(study),
        summary=shown,
        compared=BASE in shown,
        guidance=guidance(tables["estimates"], told(tables["estimates"]), Tables(study)),
        figures=drawn,
        undrawn=undrawn,
        overview=overview(tables["variants"], tables["runs"]),
        failures=_failures(tables["runs"]),
        no_ops=no_ops(tables["variants"], tables["runs"]),
        unscored=unscored(tables["rates"], tables["estimates"]),
        made=made_with(tables["runs"]),
        timeline=timeline.figure(study),
        notebooks=notebook_pages(study.folder / "notebooks"),
    )
    with replacing(study.folder / "report.html") as new:
        new.write_text(page, encoding="utf-8")
    return study.folder / "report.html"


def declared(study: Study, estimates: pd.DataFrame) -> list[str]:
    """What the declared tests say, with the hash and the date of their register, and every
    deviation from it.
    """
    entries, deviations = preregistration.registered(study), preregistration.deviations(study)
    tested = picked(estimates, notebook="19_primary", group=primary.DECLARED)
    text = primary.primary_sentence(tested, deviations)
    registered = (
        f" Registered as {entries[-1]['hash']} on {entries[-1]['registered']}."
        if entries
        else " Never registered."
    )
    return [with_minus(text) + registered, *(f"Deviation: {one}." for one in deviations)]


def printed(estimates: pd.DataFrame) -> pd.DataFrame:
    """The estimates that the findings print: the summary's changes, the extremes and controls of
    safety's outcome, the declared tests; of base models alone their levels.
    """
    keys = zip(estimates["outcome"], estimates["benchmark"], strict=True)
    ours = set(told(estimates).values())
    known = pd.Series([key in ours for key in keys], estimates.index, dtype=bool)
    core = estimates["estimator"].eq(PRIMARY) & known
    pooled = estimates["base_model"].eq("all")
    safety = estimates["outcome"].eq(safety_outcome(estimates))
    shown = estimates["group"].eq(TRAINED)
    alone = not (shown & pooled & estimates["contrast"].eq(CHANGE)).any()  # no setting in common
    shown &= pooled | safety | alone
    shown |= estimates["group"].eq(UNTRAINED) & pooled & safety
    changed = estimates[core & shown & estimates["contrast"].eq(CHANGE)]
    if changed.empty:
        level = core & estimates["contrast"].eq(LEVEL) & estimates["method"].eq("none")
        return estimates[level & estimates["group"].eq("all")]
    tested = picked(estimates, notebook="19_primary", group=primary.DECLARED)
    return pd.concat([changed, tested], ignore_index=True)


def checked(study: Study) -> pd.DataFrame:
    """The errors and warnings of the study check."""
    folder = study.folder / "tables"
    found = study_check.study_alarms(
        study_check.examine_study(
            {
                name: TABLES[name].read(folder)
                for name in (
                    "variants",
                    "runs",
                    "curves",
                    "prompts",
                    "verdicts",
                    "rates",
                    "answers",
                )
                if TABLES[name].path(folder).is_file()
            }
            | {"information": information.base_information(estimation.read_estimates(folder))}
        )
    )
    frame = found[["finding", "severity", "sentence"]].assign(
        finding=found["finding"].str.replace("_", " ")
    )
    return frame.set_axis(["Finding", "Severity", "What was seen, and what to do"], axis=1)


def overview(variants: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Counts of runs by method and objective (rows) and base model (columns)."""
    frame = variants.merge(runs[["run_id"]], on="run_id")
    frame = frame.assign(order=frame["method"].map(METHODS.index)).sort_values(
        "order", kind="stable"
    )
    words = {"none": "", "sft": ", SFT", "dpo": ", DPO"}
    frame["Method"] = frame["method"].map(METHOD_LABELS) + frame["objective"].map(
        lambda objective: words.get(objective, f", {objective}")
    )
    table = pd.crosstab(frame["Method"], frame["base_model"]).loc[
        frame["Method"].unique(), variants["base_model"].unique()
    ]
    return table.rename_axis(None, axis=1).reset_index()


def _failures(runs: pd.DataFrame) -> pd.DataFrame:
    """The failed runs and why."""
    return runs.loc[runs["status"].eq("failed"), ["run_id", "failure"]].set_axis(
        ["Run", "Why it failed"], axis=1
    )


def no_ops(variants: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """The runs that training left as they were."""
    frame = variants.merge(runs, on="run_id")
    frame = frame[frame["no_op"].fillna(False).astype(bool)]
    return (
        frame[["run_id", "learning_rate", "kl_init"]]
        .assign(
            learning_rate=frame["learning_rate"].map("{:.0e}".format),
            kl_init=frame["kl_init"].map("{:.1e}".format),
        )
        .set_axis(["Run", "Learning rate", "KL to its start (nats per token)"], axis=1)
    )


def unscored(rates: pd.DataFrame, estimates: pd.DataFrame) -> pd.DataFrame:
    """The share of answers without a score, by benchmark and judge."""
    counts = (
        rates.groupby(["benchmark", "judge", "outcome"], sort=False)[["n", "n_scored"]]
        .sum()
        .reset_index()
    )
    counts["share"] = (1 - counts["n_scored"].astype(float) / counts["n"].astype(float)).map(
        "{:.2%}".format
    )
    table = counts[["benchmark", "judge", "outcome", "n", "share"]]
    base = estimates[
        estimates["benchmark"].isin(["bbq", "utility"])
        & estimates["contrast"].eq(LEVEL)
        & estimates["base_model"].ne("all")
        & estimates["estimator"].isin([PRIMARY, UNREADABLE])
    ]
    base = base[base["group"].isin(["all", TRAINED, UNTRAINED, NO_OP])]
    base = (
        base.assign(n=base["n_items"] * base["n_runs"])
        .groupby(["benchmark", "outcome"], sort=False)[["n", "n_unscored"]]
        .sum()
        .reset_index()
    )
    base["share"] = (base["n_unscored"].astype(float) / base["n"].astype(float)).map(
        "{:.2%}".format
    )
    table = pd.concat([table, base.assign(judge="none")[table.columns]], ignore_index=True)
    return table.set_axis(["Benchmark", "Judge", "Outcome", "Answers", "Without a score"], axis=1)


def made_with(runs: pd.DataFrame) -> list[tuple[str, str]]:
    """Packages, machines and revisions behind the runs, and the packages behind this page."""
    versions = set(runs["versions"].dropna())
    rows = [
        (
            "Packages of the runs",
            ", ".join(f"{name} {number}" for name, number in json.loads(text).items()),
        )
        for text in sorted(versions)
    ]
    rows.append(("Hardware", "; ".join(sorted(runs["hardware"].dropna().unique()))))
    rows.append(("Base revisions", ", ".join(sorted(runs["base_revision"].dropna().unique()))))
    rows.append(
        (
            "Packages of this page",
            ", ".join(f"{name} {number}" for name, number in environment.versions().items()),
        )
    )
    seconds = runs["cpu_seconds"].fillna(0).sum()
    return [*rows, ("Training", f"{seconds:,.0f} CPU seconds in all")]


def _figures(folder: Path) -> tuple[list[tuple[str, list[dict[str, str]]]], list[tuple[str, str]]]:
    """The figures of the study as data, by theme, any others after them; and the titles of those
    that have nothing to draw, each with the reason.
    """
    known = {name for titles in TITLES.values() for name in titles}
    others = sorted(path.stem for path in folder.glob("*.png") if path.stem not in known)
    others = {name: name.replace("_", " ").capitalize() for name in others}
    found, missing = [], []
    for theme, titles in {**TITLES, OTHERS_DRAWN: others}.items():
        drawn = []
        for name, title in titles.items():
            if not (folder / f"{name}.png").is_file():
                continue
            caption, _, source = _caption(folder / f"{name}.md").rpartition("\n\n")
            if caption.startswith(NOTHING):
                missing.append((title, caption.removeprefix(NOTHING).rstrip(".")))
                continue
            image = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
            own = {"caption": caption or source, "source": source if caption else ""}
            drawn.append({"name": name, "title": title, "image": image, **own})
        found += [(theme, drawn)] * bool(drawn)
    return found, missing


def _caption(path: Path) -> str:
    return plain_caption(path.read_text(encoding="utf-8").strip()) if path.is_file() else ""


@command(wrong=1)
def main(study: str, key: str = "", mark: str = "") -> None:
    """Write a study's report; as a job of the batch also its mark, with the key that it had at its
    start.
    """
    made_of, of = read_json(Path(key)) if key else {}, load(study)
    with leases.shown(of.folder / leases.JOBS, "report"), notebooks.recorded() as names:
        print(write(of))
        if mark:
            notebooks.write_mark(Path(mark), made_of, names())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
