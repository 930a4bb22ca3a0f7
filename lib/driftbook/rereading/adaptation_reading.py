"""The second study read again, whole: its tables, what comes back of its figures, and every
estimate.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from driftbook.rereading import adaptation_judges, adaptation_units
from driftbook.rereading.adaptation_published import protection, reproduced
from driftbook.rereading.adaptation_study import (
    ADAPTATION_FOLDER,
    ADAPTATION_NAME,
    ADAPTATION_NOTE,
    ADAPTATION_NOTEBOOK,
    CONFIGS,
    JUDGES,
    MODEL_FAMILIES,
    TUNED,
    WHITE_BOX,
    AdaptationData,
    adaptation_located,
    adaptation_provenance,
    read_tables,
    traps,
)
from driftbook.stats.confidence import ALPHA
from driftbook.stats.estimation import complete, read_estimates
from driftbook.stats.intervals import t_interval
from driftbook.stats.mixed import MixedFit
from driftbook.stats.terms import CHANGE, LEVEL, MITIGATION, PRIMARY, UNSAFE
from driftbook.study.files import ROOT, write_json
from driftbook.study.tables import ESTIMATES, TABLES, VARIANTS

OURS = "safe_lora"  # our published study of that repair, and the repair's name
_PUBLISHED = ROOT / "outputs" / "published" / OURS / "tables"
_AGAINST_PARENT = "change against the parent"  # notebook 14's contrast
REPAIR_CHANGE, REPAIR_OF_SEED = "Safe LoRA less LoRA, same seed", "seed"
REPAIR_POPULATION = "seeds like these three; one family, one attack, these prompts"
_ONE_SEED = 42  # of the re-trained grid


@dataclass(frozen=True)
class AdaptationReading:
    """The study's tables, and a sentence on where they come from."""

    data: AdaptationData
    source: str

    @property
    def figures(self) -> Path:
        return ADAPTATION_FOLDER / "figures"

    @cached_property
    def reproduction(self) -> pd.DataFrame:
        """Which published figures come back: one row per kind."""
        return reproduced(self.data)

    @property
    def traps(self) -> pd.DataFrame:
        """What would mislead a reader of the files, and what is done."""
        return traps(self.data)

    def pair(self, one: str, other: str, judge: str = JUDGES[0]) -> pd.Series:
        """The difference of two configurations in each cell of the grid of one seed."""
        return adaptation_units.changed(self.data.controlled, judge, one, other)

    def cell(self, family: str, attack: str, config: str) -> pd.Series:
        """The judges' rates in one labelled cell of the published grid, in percent."""
        rows = self.data.asr[self.data.asr["dataset"].eq(adaptation_judges.LABELLED_BENCHMARK)]
        keys = {"family": family, "attack": attack, "config": config}
        rows = rows[rows[list(keys)].eq(keys).all(axis=1)]
        return rows.set_index("judge")["asr"].loc[list(JUDGES)]

    @property
    def shares(self) -> pd.Series:
        """The share of harmful answers of each pattern of verdicts, by the human labels."""
        found = adaptation_judges.shares_of(self.data.labels).value
        return pd.Series(found, adaptation_judges.PATTERNS)

    def cell_bounds(self, rates: pd.Series) -> tuple[float, float]:
        """The least and the largest percentage of harmful answers that three rates allow."""
        shares = self.shares.to_numpy()
        low, high = adaptation_judges.bounded(rates.to_numpy() / 100, shares, shares)
        return 100 * low, 100 * high

    def estimates(
        self, n_draws: int = 2000, seed: int = 0
    ) -> tuple[dict[str, pd.DataFrame], dict[str, MixedFit]]:
        """All estimates by what they answer, and the mixed models by name."""
        parts, fits = adaptation_units.all_of_units(self.data)
        parts |= adaptation_judges.all_of_judges(self.data, n_draws, seed)
        return {**parts, "repair": repair_changes(self.data), "our repair": our_repair()}, fits

    @staticmethod
    def sentences(estimates: pd.DataFrame) -> str:
        """What the study read again says, a line each: units, seeds, judges, repair."""
        told = (units_sentence, seeds_sentence, judges_sentence, repair_sentence)
        return "\n".join(f"- {sentence(estimates)}" for sentence in told)

    def write(self, parts: dict[str, pd.DataFrame]) -> dict:
        """Write all parts as one table of estimates, with the other tables: what figures read."""
        estimates = ESTIMATES.concat(list(parts.values()))
        made, folder = declared_runs(), ADAPTATION_FOLDER / "tables"
        for name, frame in made.items():
            TABLES[name].write(frame, folder)
        write_json(
            ADAPTATION_FOLDER / "study.json", {"name": ADAPTATION_NAME, "note": ADAPTATION_NOTE}
        )
        ESTIMATES.write(estimates, folder / "estimates" / f"{ADAPTATION_NAME}.parquet")
        return {**made, "estimates": estimates, "note": ADAPTATION_NOTE}


def read_adaptation(folder: str = "") -> AdaptationReading:
    """A second study's tables: a local folder, else its public repository at a pinned commit.

    Raises:
        ValueError: the files are not there, or are of another version.
    """
    found = adaptation_located(folder)
    return AdaptationReading(read_tables(found), adaptation_provenance(found))


# ---- as our tables
def declared_runs() -> dict[str, pd.DataFrame]:
    """The declared tables: variants and runs by name and seed; curves, prompts and rates empty,
    since the study's own tables are not passed on.
    """
    rows = [
        (family, config, "original", None, 1) for family in MODEL_FAMILIES for config in CONFIGS
    ]
    rows += [
        (family, config, "one seed", _ONE_SEED, 2) for family in MODEL_FAMILIES for config in TUNED
    ]
    rows += [
        (family, "lora", f"seed {seed}", seed, 3 + place)
        for family in MODEL_FAMILIES
        for place, seed in enumerate((0, 123))
    ]
    names = ["family", "config", "settings", "seed", "repetition"]
    frame = pd.DataFrame(rows, columns=names)
    base = ~frame["config"].isin(TUNED)
    frame = frame.assign(
        run_id=frame["family"]
        + "."
        + frame["config"]
        + "."
        + frame["settings"].str.replace(" ", "_"),
        base_model=frame["family"].map(MODEL_FAMILIES),
        method=frame["config"].mask(base, "none"),
        method_class=frame["config"].map({"fft": "full", "lora": "adapter", "qlora": "adapter"}),
        objective=base.map({True: "none", False: "sft"}),
        dataset=base.map({True: None, False: "Alpaca-cleaned"}),
        template="of the study",
        settings=frame["settings"].map('{{"run": "{}"}}'.format),
        status="ok",
    )
    frame["method_class"] = frame["method_class"].fillna("base")
    runs = TABLES["runs"]
    return {
        "variants": VARIANTS.check(frame.reindex(columns=list(VARIANTS.columns))),
        "runs": runs.check(frame.reindex(columns=list(runs.columns))),
        **{name: TABLES[name].empty() for name in ("curves", "prompts", "rates")},
    }


# ---- Safe LoRA, theirs and ours
def repair_changes(data: AdaptationData) -> pd.DataFrame:
    """Safe LoRA less LoRA over the study's three seeds, with t at two degrees of freedom, and each
    seed's own change; negative is safer.
    """
    found = []
    for judge in JUDGES:
        change = -protection(data, judge)
        n = len(change)
        names = {"judge": judge, "method": "lora", "contrast": REPAIR_CHANGE}
        found.append(
            {
                **names,
                "group": MITIGATION,
                "member": OURS,
                "value": change.mean(),
                **t_interval(change.mean(), change.var() / n, n - 1),
                "population": REPAIR_POPULATION,
                "how": f"mean over seeds, t with {n - 1} degrees of freedom",
                "n_runs": n,
            }
        )
        found += [
            {
                **names,
                "group": REPAIR_OF_SEED,
                "member": seed,
                "value": value,
                "population": "this seed",
                "how": "one run less another: no interval",
                "n_runs": 1,
            }
            for seed, value in change.items()
        ]
    lora = data.repaired[data.repaired["judge"].eq(JUDGES[0]) & data.repaired["method"].eq("lora")]
    level = {"judge": JUDGES[0], "method": "lora", "contrast": LEVEL, "group": REPAIR_OF_SEED}
    found += [
        {
            **level,
            "member": row.seed,
            "value": row.asr,
            "population": "this seed",
            "how": "as the paper's text gives it",
            "n_runs": 1,
        }
        for row in lora.itertuples()
    ]
    rows = adaptation_units.of_success(found)
    return rows.assign(base_model=MODEL_FAMILIES["llama31"], category=WHITE_BOX)


def our_repair() -> pd.DataFrame:
    """Our own published changes of Safe LoRA against the adapter that it repaired, by base model of
    the miniature.

    Raises:
        ValueError: our published estimates hold none.
    """
    rows = read_estimates(_PUBLISHED)
    rows = rows[
        rows["outcome"].eq(UNSAFE)
        & rows["group"].eq(MITIGATION)
        & rows["member"].eq(OURS)
        & rows["contrast"].eq(_AGAINST_PARENT)
        & rows["estimator"].eq(PRIMARY)
    ]
    if rows.empty:
        raise ValueError(f"{_PUBLISHED} holds no {_AGAINST_PARENT} of {OURS}; publish it again")
    how = "miniature, not a finding about real models; " + rows["how"]
    return complete(
        rows.assign(notebook=ADAPTATION_NOTEBOOK, contrast=REPAIR_CHANGE, how=how).drop(
            columns=["p_adjusted", "family_of_tests"]
        )
    )


# ---- in words
def _one(rows: pd.DataFrame, **keys) -> pd.Series:
    """The one row of these keys."""
    found = rows[rows[list(keys)].eq(keys).all(axis=1)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} estimates of {keys}")
    return found.iloc[0]


def units_sentence(estimates: pd.DataFrame) -> str:
    """Whether LoRA differs from full fine-tuning, and whether it is equivalent, by unit."""
    pair = {"method": "lora", "against": "fft"}
    grid = {"contrast": adaptation_units.ONE_SEED, "group": "all", "estimator": PRIMARY}
    own = _one(estimates, **pair, **grid, judge=JUDGES[0])
    keys = {**pair, "contrast": adaptation_units.EQUIVALENCE, "margin": 5.0}
    rows = estimates[estimates[list(keys)].eq(keys).all(axis=1)]
    n = rows["p"].lt(ALPHA).groupby(rows["estimator"]).sum()
    later, three = (n[unit] for unit in (adaptation_units.LATER_RERUNS, adaptation_units.RERUNS))
    return (
        f"LoRA less full fine-tuning is {_with_ends(own)} points by {own.judge} with families as"
        f" units. Equivalence at 5 points holds by {n[adaptation_units.CELLS]} of {len(JUDGES)}"
        f" judges if cells are units and by {n[PRIMARY]} if families are; against other seeds of"
        f" these five families by {three} if the original run counts as a seed, and by {later} if"
        " it does not."
    )


def seeds_sentence(estimates: pd.DataFrame) -> str:
    """Whether LoRA's change is more than what another seed would bring."""
    keys = {"outcome": adaptation_units.SUCCESS, "contrast": CHANGE, "method": "lora"}
    keys |= {"group": "all", "judge": JUDGES[0]}
    family, rerun = (
        _one(estimates, **keys, estimator=unit) for unit in (PRIMARY, adaptation_units.RERUNS)
    )
    levels = estimates[estimates["contrast"].eq(LEVEL) & estimates["group"].eq(REPAIR_OF_SEED)]
    gaps = estimates[
        estimates["contrast"].eq(adaptation_units.SEED_GAP) & estimates["group"].eq("all")
    ]
    apart = gaps[gaps["ci_low"].gt(0) | gaps["ci_high"].lt(0)]
    words = ", ".join(f"{row.judge} {_with_ends(row)}" for row in apart.itertuples())
    return (
        f"LoRA's change under black-box attacks is {_with_ends(rerun)} points by {JUDGES[0]}"
        f" against other seeds of these five families and {_with_ends(family)} for families like"
        f" them; under {WHITE_BOX} one family's three seeds succeed"
        f" {' / '.join(f'{value:.1f}' for value in levels['value'])} % of the time. The two later"
        f" seeds differ from the original in one direction by {len(apart)} of {len(gaps)} judges"
        + (f" ({words} points), where the three are not draws of one kind." if words else ".")
    )


def judges_sentence(estimates: pd.DataFrame) -> str:
    """How much of LoRA's change is the judge's, and what cannot be told."""
    keys = {"outcome": adaptation_judges.HARMFUL, "method": "lora", "contrast": CHANGE}
    raked, bounds, own = (
        _one(estimates, **keys, judge=adaptation_judges.HUMANS, estimator=name)
        for name in (PRIMARY, adaptation_judges.BOUNDED, adaptation_judges.OWN_SHARES)
    )
    said = [
        _one(estimates, **keys, judge=judge, estimator=adaptation_judges.SAID).value
        for judge in JUDGES
    ]
    words = ", ".join(f"{judge} {value:+.1f}" for judge, value in zip(JUDGES, said, strict=True))
    keys = {"outcome": adaptation_judges.PRECISION_OF, "method": "lora"}
    falls = [
        [
            _one(estimates, **keys, judge=judge, contrast=name)
            for name in (adaptation_judges.TIPPING, adaptation_judges.PRECISION_CHANGE)
        ]
        for judge in JUDGES
    ]
    open_ = [fall.judge for fall, told in falls if told.ci_low <= fall.value]
    return (
        f"By the judges' own word LoRA adds {words} points of harmful answers. Raked to the human"
        f" labels it adds {_with_ends(raked)} if verdicts mean the same for both models, and"
        f" {_with_ends(own)} if each model's own labels say what they mean; the judges' rates alone"
        f" allow {bounds.ci_low:+.1f} to {bounds.ci_high:+.1f}. A loss of precision on LoRA's"
        f" answers large enough to make the whole change is excluded by the labels for"
        f" {len(JUDGES) - len(open_)} of {len(JUDGES)} judges"
        + (f", not for {', '.join(open_)}." if open_ else ".")
    )


def repair_sentence(estimates: pd.DataFrame) -> str:
    """What three seeds of Safe LoRA say, and what ours do."""
    rows = estimates[estimates["contrast"].eq(REPAIR_CHANGE) & estimates["group"].eq(MITIGATION)]
    theirs = rows[rows["study"].eq(ADAPTATION_NAME)]
    ours = _one(rows, study=OURS, base_model="all")
    words = "; ".join(f"{row.judge} {_with_ends(row)}" for row in theirs.itertuples())
    n = int((theirs["ci_low"].gt(0) | theirs["ci_high"].lt(0)).sum())
    return (
        f"Safe LoRA moves attack success by {words} points over three seeds, and {n} of"
        f" {len(theirs)} intervals leave out no change; on our miniature it moves unsafe answers by"
        f" {_with_ends(ours)}, which is no finding about real models."
    )


def _with_ends(row) -> str:
    return f"{row.value:+.1f} ({row.ci_low:+.1f} to {row.ci_high:+.1f})"
