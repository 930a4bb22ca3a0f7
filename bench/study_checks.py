"""How often the study check finds a planted flaw, and how often it raises an alarm at a study
without one.

Flaws are planted by editing tables: of studies simulated here, and of real ones (the miniature's).
Both are varied between trials: a simulated study is drawn anew; a real one keeps a random part of
its prompts, and its repetitions are renumbered within settings.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from bench.harness import row
from bench.study_flaws import PLANTS, UNTOLD, drifted_no_ops
from scipy.special import expit, logit

from driftbook.doctors import study, study_tables
from driftbook.stats.intervals import wilson
from driftbook.study.methods import METHOD_CLASS, STUDIED
from driftbook.study.tables import TABLES

READ = ("variants", "runs", "curves", "prompts", "verdicts")
RUN_SD = {
    "lora": 1.6,
    "ia3": 1.7,
    "prompt_tuning": 7.5,
    "p_tuning": 13.5,
}  # points between runs of a setting, in the original study (facts, flaw 12)
RATES = {
    "lora": (1e-3, 5e-3),
    "ia3": (5e-3, 2e-2),
    "prompt_tuning": (5e-3, 2e-2),
    "p_tuning": (1e-3, 5e-3),
}
# Whose answer a run gives to a prompt: the base model's, that of all runs of its setting, else its
# own. Adapters at the lower and the higher
# rate as LoRA and IA3 in the original study; soft prompts mostly their own, since their seed
# matters more than their rate.
KEPT = {"adapter": ((0.5, 0.4), (0.15, 0.55)), "prompt": ((0.2, 0.1), (0.2, 0.1))}
FLAWS = ("mislabelled_rate", "no_op", "one_seed", "drift", "echo")
LIKE = 0.8  # how often another answer to a prompt keeps the verdict, beyond chance
CANNED = 0.4  # of refusals: one of four sentences that every run of the base model says
GOAL_FOUND, GOAL_ALARMS = 0.95, 0.05


# ---- a simulated study
def simulated(
    rng: np.random.Generator,
    n_bases: int = 3,
    n_prompts: int = 330,
    methods: tuple[str, ...] = STUDIED,
    no_ops: bool = False,
) -> dict[str, pd.DataFrame]:
    """The tables of a study without flaws: n_bases x methods x SFT and DPO x two rates x three
    seeds, and the base models.

    The hardware reproduces an answer exactly with a probability that is drawn per study from 5 % to
    all of it; in half of the studies the judge gives no probability. A run's rate differs from its
    setting's by RUN_SD, half of the variance shared by the runs of a seed. With `no_ops`, IA3 at
    its lower rate is a no-op, recorded as one.
    """
    variants = _grid(n_bases, methods)
    idle = variants["method"].eq("ia3") & variants["learning_rate"].eq(RATES["ia3"][0]) & no_ops
    prompts = pd.DataFrame(
        {
            "benchmark": "safety",
            "prompt_id": [f"p{i:03d}" for i in range(n_prompts)],
            "category": [f"category {i % 11}" for i in range(n_prompts)],
            "kind": "harmful",
            "family": [f"family {i // 2}" for i in range(n_prompts)],
        }
    )
    exact, has_probability = rng.choice([0.05, 0.3, 0.7, 1.0]), rng.random() < 0.5
    parts = [
        _answered(rng, own, idle[own.index].to_numpy(), n_prompts, exact)
        for _, own in variants.groupby("base_model", sort=False)
    ]
    answers = {name: np.concatenate([part[name] for part in parts]).ravel() for name in parts[0]}
    asked = {
        "run_id": np.repeat(variants["run_id"].to_numpy(object), n_prompts),
        "prompt_id": np.tile(prompts["prompt_id"], len(variants)),
        "n_tokens": answers["length"],
        "p_unsafe": answers["p_unsafe"] if has_probability else np.nan,
        **{name: answers[name].astype(float) for name in ("unsafe", "refusal")},
    }
    verdicts = pd.DataFrame(asked).assign(benchmark="safety", judge="guard", decoding="greedy")
    verdicts["unsafe"] = verdicts["unsafe"].mask(rng.random(len(verdicts)) < 0.01)
    return {
        "variants": variants,
        "runs": _recorded(rng, variants, idle),
        "curves": _curves(rng, variants),
        "prompts": prompts,
        "verdicts": verdicts,
    }


def _grid(n_bases: int, methods: tuple[str, ...]) -> pd.DataFrame:
    rows = [
        {"base_model": f"base {b}", "method": "none", "objective": "none", "repetition": 1}
        for b in range(n_bases)
    ]
    rows += [
        {
            "base_model": f"base {b}",
            "method": method,
            "objective": objective,
            "learning_rate": rate,
            "epochs": 3,
            "seed": seed,
            "repetition": seed,
        }
        for b in range(n_bases)
        for method in methods
        for objective in ("sft", "dpo")
        for rate in RATES[method]
        for seed in (1, 2, 3)
    ]
    frame = pd.DataFrame(rows).sort_values("base_model", kind="stable", ignore_index=True)
    return frame.assign(run_id=[f"run {i}" for i in range(len(frame))])


def _answered(
    rng: np.random.Generator, runs: pd.DataFrame, idle: np.ndarray, n_prompts: int, exact: float
) -> dict[str, np.ndarray]:
    """[runs, prompts] unsafe, refusal, length, p_unsafe of one base model's runs, itself among
    them.
    """
    level = rng.normal(rng.uniform(-2.5, 0.5), 2.0, n_prompts)
    typical = rng.normal(5, 0.8, n_prompts)
    canned, which = rng.integers(20, 60, 4), rng.integers(0, 4, n_prompts)

    def drawn(shift: float, like: np.ndarray | None = None) -> np.ndarray:
        unsafe = rng.random(n_prompts) < expit(level + shift)
        if like is not None:  # most other answers to a prompt are judged alike
            unsafe = np.where(rng.random(n_prompts) < LIKE, like[0] == 1, unsafe)
        refusal = ~unsafe & (rng.random(n_prompts) < 0.7)
        said = refusal & (rng.random(n_prompts) < CANNED)
        free = np.exp(typical + rng.normal(0, 0.4, n_prompts)).round()
        p = expit(np.where(unsafe, 3, -4) + rng.normal(0, 1.5, n_prompts))
        return np.stack([unsafe, refusal, np.where(said, canned[which], free), p])

    base, by_setting, by_seed, found = drawn(0), {}, {}, []
    for run, still in zip(runs.itertuples(), idle, strict=True):
        if run.method == "none":
            found.append(base)
            continue
        setting = (run.method, run.objective, run.learning_rate)
        shift, answers = by_setting.setdefault(
            setting, (one := rng.normal(0, 0.8), drawn(one, base))
        )
        own = drawn(shift, answers)
        shares = (1.0, 0.0) if still else _kept(rng, run)
        whose = rng.choice(3, n_prompts, p=[*shares, 1 - sum(shares)])
        answer = np.where(whose == 0, base, np.where(whose == 1, answers, own))
        common = by_seed.setdefault((run.method, run.objective, run.seed), rng.normal())
        points = 0 if still else RUN_SD[run.method] * (common + rng.normal()) / np.sqrt(2)
        answer = _moved(rng, answer, drawn(shift), points)
        # the hardware's rounding: nearly the same answer, of another length
        near = rng.random(n_prompts) >= exact
        other = (answer[2] * np.exp(rng.normal(0, 0.1, n_prompts))).round()
        answer[2] = np.where(near & ~np.isin(answer[2], canned), other, answer[2])
        p = expit(logit(answer[3]) + rng.normal(0, 0.1, n_prompts))
        answer[3] = np.where(near, p, answer[3])
        found.append(answer)
    return dict(zip(("unsafe", "refusal", "length", "p_unsafe"), np.stack(found, 1), strict=True))


def _kept(rng: np.random.Generator, run) -> tuple[float, float]:
    """The shares of prompts that a run answers as the base model, and as its setting; a soft
    prompt's vary from seed to seed.
    """
    kind = METHOD_CLASS[run.method]
    base, setting = KEPT[kind][int(run.learning_rate == RATES[run.method][1])]
    jitter = np.exp(rng.normal(0, 0.1 if kind == "adapter" else 0.6, 2))
    total = np.array([base, setting]) * jitter
    return tuple(total / max(1.0, total.sum() / 0.98))


def _moved(
    rng: np.random.Generator, answer: np.ndarray, other: np.ndarray, points: float
) -> np.ndarray:
    """The answers with the unsafe-response rate moved by so many percentage points, as far as it
    can be; what is moved has another length.
    """
    wrong = answer[0] == (points < 0)
    n = min(round(abs(points) / 100 * answer.shape[1]), int(wrong.sum()))
    chosen = rng.choice(np.flatnonzero(wrong), n, replace=False) if n else np.zeros(0, int)
    moved = answer.copy()
    moved[0, chosen], moved[1, chosen] = points > 0, 0 if points > 0 else 1
    moved[2:, chosen] = other[2:, chosen]
    return moved


def _recorded(rng: np.random.Generator, variants: pd.DataFrame, idle: pd.Series) -> pd.DataFrame:
    trained = variants["learning_rate"].notna()
    kl = np.where(idle, 1e-6, np.exp(rng.normal(-4, 1, len(variants))))
    frame = pd.DataFrame(
        {
            "run_id": variants["run_id"],
            "status": "ok",
            "trained_learning_rate": variants["learning_rate"],
            "trained_epochs": variants["epochs"],
            "trained_seed": variants["seed"],
            "nll_base": 2.0,
            "dose_nll": 2 * kl,
            "kl_base": kl,
            "kl_init": kl,
            "no_op": idle.astype(object),
            "adapter_sha256": [f"{i:016x}" for i in range(len(variants))],
        }
    )
    frame.loc[~trained, ["dose_nll", "kl_base", "kl_init", "no_op", "adapter_sha256"]] = None
    return frame


def _curves(rng: np.random.Generator, variants: pd.DataFrame, n_steps: int = 40) -> pd.DataFrame:
    """Training curves whose noise is that of the batches, which the seed and the data order,
    whatever the method and the rate.
    """
    steps, batches, parts = np.arange(1, n_steps + 1), {}, []
    for run in variants[variants["learning_rate"].notna()].itertuples():
        noise = batches.setdefault((run.objective, run.seed), rng.normal(0, 0.05, n_steps))
        loss = (
            1.5
            + rng.uniform(0.1, 0.8) * np.exp(-steps / rng.uniform(3, 12))
            + noise
            + rng.normal(0, 0.02, n_steps)
        )
        parts.append(
            pd.DataFrame(
                {
                    "run_id": run.run_id,
                    "split": "train",
                    "step": steps,
                    "loss": loss,
                    "learning_rate": run.learning_rate * (1 - (steps - 1) / n_steps),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


# ---- a real study, varied
def read(folder: Path) -> dict[str, pd.DataFrame]:
    """The tables of a study that the check reads, without its no-ops and its untrained controls, so
    that it has no flaw that is known.
    """
    tables = {name: TABLES[name].read(folder) for name in READ}
    variants, runs = tables["variants"], tables["runs"]
    usual = variants.groupby("method")["init"].transform(
        lambda init: init.value_counts().index[0] if init.notna().any() else None
    )
    keep = variants["objective"].isin(["none", "sft", "dpo"]) & (
        variants["init"].isna() | variants["init"].eq(usual)
    )
    idle = set(runs.loc[runs["no_op"].fillna(False), "run_id"])
    alone = variants.groupby(
        [name for name in study_tables.SETTING if name in variants], dropna=False
    )["run_id"].transform("size").eq(1) & variants["method"].ne("none")
    kept = set(variants.loc[keep & ~alone, "run_id"]) - idle
    return {
        name: (
            frame[frame["run_id"].isin(kept)].reset_index(drop=True) if "run_id" in frame else frame
        )
        for name, frame in tables.items()
    }


def varied(
    tables: dict[str, pd.DataFrame], rng: np.random.Generator, share: float = 0.8
) -> dict[str, pd.DataFrame]:
    """The study with a random share of its prompts, and its repetitions renumbered at random within
    settings.
    """
    prompts = tables["prompts"].sample(frac=share, random_state=rng)
    asked = prompts["benchmark"].astype(str) + prompts["prompt_id"].astype(str)
    verdicts = tables["verdicts"]
    keep = (verdicts["benchmark"].astype(str) + verdicts["prompt_id"].astype(str)).isin(set(asked))
    variants = study_tables.settled(tables["variants"])
    variants["repetition"] = variants.groupby("setting")["repetition"].transform(
        lambda numbers: rng.permutation(numbers.to_numpy())
    )
    return {
        **tables,
        "prompts": prompts,
        "verdicts": verdicts[keep].reset_index(drop=True),
        "variants": variants.drop(columns=["setting", "alike"]),
    }


# ---- measured
def _named(findings: pd.DataFrame, finding: str) -> set[str]:
    """What the alarms of one kind name."""
    rows = study.study_alarms(findings)
    return {
        name
        for where in rows.loc[rows["finding"].eq(finding), "where"]
        for name in where.split(", ")
    }


def detection(
    n_studies: int,
    seed: int = 0,
    tables: dict[str, pd.DataFrame] | None = None,
    plants: tuple[str, ...] = tuple(PLANTS),
    **settings,
) -> pd.DataFrame:
    """How many of n_studies with each planted flaw were found, and how many studies without a flaw
    raised an alarm, with Wilson intervals.

    A row per flaw, and one for clean studies: studies, flaw, strength, n, hits, named_more, share,
    low, high, goal, met. A hit is a finding of the right kind that names all the runs (or the base
    model and round) that were planted; named_more counts the hits that named others too. `tables`,
    a real study (`read`), is varied and edited; where it is not given, studies are simulated
    (`settings` go to `simulated`). An alarm is an error or a warning of one of the five flaws.
    """
    rng, name = np.random.default_rng(seed), "simulated" if tables is None else "real"
    rows = []
    for flaw in (None, *plants):
        plant, finding, strength = PLANTS[flaw] if flaw else (None, "", "no flaw planted")
        if plant is drifted_no_ops and tables is not None:
            continue  # a real study keeps no no-ops here
        hits, more = 0, 0
        for _ in range(n_studies):
            no_ops = {**settings, "no_ops": plant is drifted_no_ops}
            clean = simulated(rng, **no_ops) if tables is None else varied(tables, rng)
            made, planted = plant(clean, rng) if plant else (clean, set())
            findings = study.examine_study(made)
            named = _named(findings, finding)
            alarm = study.study_alarms(findings)["finding"].isin(FLAWS).any()
            hits += planted <= named if plant else alarm
            more += bool(plant) and planted < named
        known = {"studies": name, "flaw": flaw or "none: false alarms", "strength": strength}
        rows.append(known | {"n": n_studies, "hits": int(hits), "named_more": int(more)})
    return _shares(pd.DataFrame(rows))


def _shares(frame: pd.DataFrame) -> pd.DataFrame:
    """Shares of hits with their intervals and goals."""
    low, high = wilson(frame["hits"], frame["n"])
    clean = frame["flaw"].str.startswith("none")
    frame = frame.assign(
        share=frame["hits"] / frame["n"],
        low=low,
        high=high,
        goal=np.where(clean, GOAL_ALARMS, GOAL_FOUND),
    )
    frame["goal"] = frame["goal"].mask(frame["flaw"].eq(UNTOLD))
    return frame.assign(
        met=pd.Series(
            np.where(clean, frame["share"] <= frame["goal"], frame["share"] >= frame["goal"])
        )
        .astype("boolean")
        .mask(frame["goal"].isna())
    )


def detection_rows(n_studies: int = 100, seed: int = 0, folder: Path | None = None) -> list[dict]:
    """Lines of `make bench`: simulated studies, and the study whose tables are in `folder` where it
    is given.
    """
    found = [detection(n_studies, seed)]
    return lines(
        pd.concat(
            [*found, detection(n_studies, seed, read(folder))] if folder is not None else found
        )
    )


def lines(found: pd.DataFrame) -> list[dict]:
    """The rows of `detection` as lines of `make bench`."""
    clean = found["flaw"].str.startswith("none")
    figures = np.where(
        clean, "study check: clean studies with an alarm", "study check: planted flaws found"
    )
    return [
        row(
            figure,
            f"{one.studies}, {one.flaw}: {one.strength}; {one.hits} of {one.n}, 95 % interval"
            f" {one.low:.3f} to {one.high:.3f}",
            float(one.share),
            None if np.isnan(one.goal) else float(one.goal),
            "share",
            least=not one.flaw.startswith("none"),
        )
        for figure, one in zip(figures, found.itertuples(), strict=True)
    ]
