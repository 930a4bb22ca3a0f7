"""How often the study check finds a planted flaw, and how often it raises an alarm at a study
without one.

Flaws are planted by editing tables: of studies simulated here, and of real ones (the miniature's).
Both are varied between trials: a simulated study is drawn anew; a real one keeps a random part of
its prompts, and its repetitions are renumbered within settings.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from bench.harness import row
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

Planted = tuple[
    dict[str, pd.DataFrame], set[str]
]  # the tables with the flaw, and what a finding must name


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
    answers = {
        name: np.concatenate([part[name] for part in parts]).ravel()
        for name in ("unsafe", "refusal", "length", "p_unsafe")
    }
    verdicts = pd.DataFrame(
        {
            "run_id": np.repeat(variants["run_id"].to_numpy(object), n_prompts),
            "benchmark": "safety",
            "prompt_id": np.tile(prompts["prompt_id"], len(variants)),
            "judge": "guard",
            "decoding": "greedy",
            "unsafe": answers["unsafe"].astype(float),
            "refusal": answers["refusal"].astype(float),
            "n_tokens": answers["length"],
            "p_unsafe": answers["p_unsafe"] if has_probability else np.nan,
        }
    )
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
    level, typical = (
        rng.normal(rng.uniform(-2.5, 0.5), 2.0, n_prompts),
        rng.normal(5, 0.8, n_prompts),
    )
    canned, which = rng.integers(20, 60, 4), rng.integers(0, 4, n_prompts)

    def drawn(shift: float, like: np.ndarray | None = None) -> np.ndarray:
        unsafe = rng.random(n_prompts) < expit(level + shift)
        if like is not None:  # most other answers to a prompt are judged alike
            unsafe = np.where(rng.random(n_prompts) < LIKE, like[0] == 1, unsafe)
        refusal = ~unsafe & (rng.random(n_prompts) < 0.7)
        length = np.where(
            refusal & (rng.random(n_prompts) < CANNED),
            canned[which],
            np.exp(typical + rng.normal(0, 0.4, n_prompts)).round(),
        )
        return np.stack(
            [
                unsafe,
                refusal,
                length,
                expit(np.where(unsafe, 3, -4) + rng.normal(0, 1.5, n_prompts)),
            ]
        )

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
        near = (
            rng.random(n_prompts) >= exact
        )  # the hardware's rounding: nearly the same answer, of another length
        answer[2] = np.where(
            near & ~np.isin(answer[2], canned),
            (answer[2] * np.exp(rng.normal(0, 0.1, n_prompts))).round(),
            answer[2],
        )
        answer[3] = np.where(
            near, expit(logit(answer[3]) + rng.normal(0, 0.1, n_prompts)), answer[3]
        )
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


# ---- flaws
def _edit(
    tables: dict[str, pd.DataFrame], table: str, run_ids, **values
) -> dict[str, pd.DataFrame]:
    """The tables with these columns of these runs set to values."""
    frame = tables[table].copy()
    for name, value in values.items():
        frame[name] = (
            frame[name]
            .astype(object)
            .mask(frame["run_id"].isin(run_ids), value)
            .astype(tables[table][name].dtype)
        )
    return {**tables, table: frame}


def _settings(tables: dict[str, pd.DataFrame], kind: str | None = None) -> pd.DataFrame:
    frame = study_tables.settled(tables["variants"])
    return frame[
        frame["learning_rate"].notna()
        & (True if kind is None else frame["method"].map(METHOD_CLASS).eq(kind))
    ]


def mislabelled_setting(tables: dict[str, pd.DataFrame], rng: np.random.Generator) -> Planted:
    """The three runs of one setting were trained at another rate than their label says, as the
    trainer recorded.
    """
    runs = _settings(tables)
    chosen = runs[runs["setting"].eq(rng.choice(runs["setting"].unique()))]["run_id"]
    return _edit(tables, "runs", chosen, trained_learning_rate=2e-5), set(chosen)


def mislabelled_run(
    tables: dict[str, pd.DataFrame],
    rng: np.random.Generator,
    n_settings: int = 1,
    kind: str = "adapter",
) -> Planted:
    """In one round, a run at the higher rate is in truth one at the lower rate; nothing was
    recorded, only its answers tell.
    """
    runs = _settings(tables, kind)
    runs = runs[runs.groupby("alike")["learning_rate"].transform("nunique").gt(1)]
    repetition, chosen, gone, rates = rng.choice(runs["repetition"].unique()), [], [], {}
    for alike in rng.choice(runs["alike"].unique(), n_settings, replace=False):
        group = runs[runs["alike"].eq(alike) & runs["repetition"].eq(repetition)].sort_values(
            "learning_rate"
        )
        low, high = group.iloc[0], group.iloc[-1]
        chosen, gone, rates[low["run_id"]] = (
            [*chosen, low["run_id"]],
            [*gone, high["run_id"]],
            high["learning_rate"],
        )
    tables = {
        name: (
            frame[~frame["run_id"].isin(gone)].reset_index(drop=True)
            if "run_id" in frame
            else frame
        )
        for name, frame in tables.items()
    }
    for run_id, rate in rates.items():
        tables = _edit(
            _edit(tables, "variants", [run_id], learning_rate=rate),
            "runs",
            [run_id],
            trained_learning_rate=None,
        )
    return {name: frame for name, frame in tables.items() if name != "curves"}, set(chosen)


def mislabelled_round(tables: dict[str, pd.DataFrame], rng: np.random.Generator) -> Planted:
    """The same for every setting of the adapter methods in one round, as in the original study."""
    runs = _settings(tables, "adapter")
    return mislabelled_run(tables, rng, runs["alike"].nunique())


def still_dose(tables: dict[str, pd.DataFrame], rng: np.random.Generator) -> Planted:
    """Three runs of one setting were not moved by training: a KL of 1e-6 and no verdict on it in
    the record; their answers are not looked at.
    """
    runs = _settings(tables)
    chosen = runs[runs["setting"].eq(rng.choice(runs["setting"].unique()))]["run_id"]
    return _edit(
        tables, "runs", chosen, kl_init=1e-6, kl_base=1e-6, dose_nll=1e-7, no_op=None
    ), set(chosen)


def still_answers(
    tables: dict[str, pd.DataFrame], rng: np.random.Generator, share: float = 0.99
) -> Planted:
    """Three runs of one setting answer 99 % of the prompts as their base model does; their record
    says that they were trained.
    """
    runs = _settings(tables)
    chosen = runs[runs["setting"].eq(rng.choice(runs["setting"].unique()))]
    base = (
        tables["variants"]
        .query("method == 'none'")
        .set_index("base_model")["run_id"][chosen["base_model"].iloc[0]]
    )
    return {
        **tables,
        "verdicts": _copied(tables["verdicts"], dict.fromkeys(chosen["run_id"], base), rng, share),
    }, set(chosen["run_id"])


def _copied(
    verdicts: pd.DataFrame, sources: dict[str, str], rng: np.random.Generator, share: float = 1.0
) -> pd.DataFrame:
    """The verdicts with a share of the answers of some runs replaced by those of another run to the
    same prompts.
    """
    rows = verdicts[verdicts["run_id"].isin([*sources, *sources.values()])].set_index(
        ["run_id", "benchmark", "prompt_id"]
    )
    new = []
    for run_id, source in sources.items():
        own, other = rows.loc[run_id], rows.loc[source]
        other = other.reindex(own.index)
        keep = rng.random(len(own)) >= share
        new.append(pd.concat([own[keep], other[~keep]]).reset_index().assign(run_id=run_id))
    return pd.concat([verdicts[~verdicts["run_id"].isin(sources)], *new], ignore_index=True)


def recorded_seed(tables: dict[str, pd.DataFrame], rng: np.random.Generator) -> Planted:
    """Every run was trained with seed 42, as the trainer recorded."""
    runs = _settings(tables)
    return _edit(tables, "runs", runs["run_id"], trained_seed=42), set(runs["run_id"])


def copied_repetitions(tables: dict[str, pd.DataFrame], rng: np.random.Generator) -> Planted:
    """The repetitions of a quarter of the settings are one run: equal answers; seeds and hashes are
    recorded as if they were not.
    """
    runs = _settings(tables)
    chosen = runs[
        runs["setting"].isin(
            rng.choice(
                runs["setting"].unique(), max(1, runs["setting"].nunique() // 4), replace=False
            )
        )
    ]
    first = chosen.groupby("setting")["run_id"].transform("first")
    sources = {
        run: source for run, source in zip(chosen["run_id"], first, strict=True) if run != source
    }
    made = {**tables, "verdicts": _copied(tables["verdicts"], sources, rng)}
    return {name: frame for name, frame in made.items() if name != "curves"}, set(chosen["run_id"])


def same_batches(tables: dict[str, pd.DataFrame], rng: np.random.Generator) -> Planted:
    """The repetitions of every setting of one base model saw the same batches: curves equal but for
    a tenth of their noise; answers differ.
    """
    runs = _settings(tables)
    chosen = runs[runs["base_model"].eq(rng.choice(runs["base_model"].unique()))]
    first = dict(
        zip(chosen["run_id"], chosen.groupby("setting")["run_id"].transform("first"), strict=True)
    )
    curves = tables["curves"].copy()
    losses = curves.set_index(["run_id", "split", "step"])["loss"].astype(float)
    own = curves["run_id"].isin(first)
    source = pd.MultiIndex.from_arrays(
        [curves.loc[own, "run_id"].map(first), curves.loc[own, "split"], curves.loc[own, "step"]]
    )
    noise = (
        losses.groupby(level=0)
        .transform(lambda loss: loss.diff().iloc[len(loss) // 2 :].std() / np.sqrt(2))
        .reindex(source)
        .to_numpy(float)
    )
    curves["loss"] = curves["loss"].astype(float)
    curves.loc[own, "loss"] = losses.reindex(source).to_numpy(float) + 0.1 * np.nan_to_num(
        noise
    ) * rng.normal(size=own.sum())
    return {**tables, "curves": curves}, set(chosen["run_id"])


def drifted(
    tables: dict[str, pd.DataFrame], rng: np.random.Generator, points: float = 5.0
) -> Planted:
    """In one round of one base model, five prompts more in a hundred are answered unsafely, by
    every run.
    """
    runs = _settings(tables)
    base_model, repetition = (
        rng.choice(runs["base_model"].unique()),
        rng.choice(runs["repetition"].unique()),
    )
    chosen = runs[runs["base_model"].eq(base_model) & runs["repetition"].eq(repetition)]["run_id"]
    verdicts = tables["verdicts"].reset_index(drop=True)
    harmful = verdicts["prompt_id"].isin(tables["prompts"].query("kind == 'harmful'")["prompt_id"])
    safe = verdicts[
        verdicts["run_id"].isin(chosen)
        & harmful
        & verdicts["unsafe"].astype("Float64").eq(0).fillna(False)
    ]
    total = verdicts[harmful].groupby("run_id").size()
    hit = np.concatenate(
        [
            rng.choice(part.index, min(len(part), round(points / 100 * total[run])), replace=False)
            for run, part in safe.groupby("run_id")
        ]
    )
    columns = {
        name: (
            verdicts[name]
            .astype(object)
            .mask(verdicts.index.isin(hit), value)
            .astype(verdicts[name].dtype)
        )
        for name, value in (("unsafe", True), ("refusal", False))
    }
    return {**tables, "verdicts": verdicts.assign(**columns)}, {
        f"{base_model} round {repetition:g}"
    }


def drifted_no_ops(
    tables: dict[str, pd.DataFrame], rng: np.random.Generator, share: float = 0.2
) -> Planted:
    """In one round of one base model, a fifth of the prompts get another answer from its no-ops,
    longer by as much from all of them.
    """
    runs = _settings(tables).merge(tables["runs"][["run_id", "no_op"]], on="run_id")
    runs = runs[runs["no_op"].eq(True)]
    base_model, repetition = (
        rng.choice(runs["base_model"].unique()),
        rng.choice(runs["repetition"].unique()),
    )
    chosen = runs[runs["base_model"].eq(base_model) & runs["repetition"].eq(repetition)]["run_id"]
    prompts = tables["prompts"].sample(frac=share, random_state=rng)["prompt_id"]
    longer = dict(zip(prompts, rng.integers(20, 200, len(prompts)), strict=True))
    verdicts = tables["verdicts"].copy()
    own = verdicts["run_id"].isin(chosen) & verdicts["prompt_id"].isin(prompts)
    verdicts.loc[own, "n_tokens"] += verdicts.loc[own, "prompt_id"].map(longer).astype(int)
    return {**tables, "verdicts": verdicts}, {f"{base_model} round {repetition:g}"}


def _texts(
    tables: dict[str, pd.DataFrame], rng: np.random.Generator
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Made-up texts of the prompts, and responses without any echo."""
    words = np.array([f"word{i}" for i in range(500)])
    prompts = tables["prompts"][["benchmark", "prompt_id"]].assign(
        prompt=[
            " ".join(rng.choice(words, rng.integers(8, 30))) for _ in range(len(tables["prompts"]))
        ]
    )
    responses = tables["verdicts"][["run_id", "benchmark", "prompt_id"]].assign(
        response="An answer that is made up."
    )
    return prompts, responses


def _echoing(tables: dict[str, pd.DataFrame], rng: np.random.Generator) -> list[str]:
    runs = tables["variants"]
    own = runs.loc[runs["base_model"].eq(rng.choice(runs["base_model"].unique())), "run_id"]
    return rng.choice(own.to_numpy(object), max(1, len(own) // 5), replace=False).tolist()


def echoes(tables: dict[str, pd.DataFrame], rng: np.random.Generator) -> Planted:
    """A fifth of the runs of one base model repeat the prompt before four answers of five; texts
    are given.
    """
    (texts, responses), chosen = _texts(tables, rng), _echoing(tables, rng)
    joined = responses.merge(texts, on=["benchmark", "prompt_id"])
    echo = joined["run_id"].isin(chosen) & (rng.random(len(joined)) < 0.8)
    joined["response"] = joined["response"].mask(echo, joined["prompt"] + "\n" + joined["response"])
    return {**tables, "texts": texts, "responses": joined.drop(columns="prompt")}, set(chosen)


def echoes_by_length(tables: dict[str, pd.DataFrame], rng: np.random.Generator) -> Planted:
    """The same before every answer; only the prompts' texts are given, and the lengths of the
    answers.
    """
    (texts, _), chosen = _texts(tables, rng), _echoing(tables, rng)
    verdicts = tables["verdicts"].copy()
    words = texts.assign(words=texts["prompt"].str.split().str.len()).set_index(
        ["benchmark", "prompt_id"]
    )["words"]
    own = verdicts["run_id"].isin(chosen)
    more = words.reindex(
        pd.MultiIndex.from_frame(verdicts.loc[own, ["benchmark", "prompt_id"]])
    ).to_numpy()
    verdicts.loc[own, "n_tokens"] = verdicts.loc[own, "n_tokens"].to_numpy() + more * 2
    return {**tables, "verdicts": verdicts, "texts": texts}, set(chosen)


# without a goal: where answers vary by more than prompts are long, lengths do not tell
UNTOLD = "echoed prompts, by lengths"
PLANTS: dict[
    str, tuple[Callable[..., Planted], str, str]
] = {  # name: plant, finding that must name it, strength
    "a mislabelled rate, recorded": (
        mislabelled_setting,
        "mislabelled_rate",
        "one setting of 3 runs, trained at 2e-5",
    ),
    "a mislabelled rate, told by answers": (
        mislabelled_run,
        "mislabelled_rate",
        "one run of an adapter method, at a fourth or fifth of its label's rate",
    ),
    "a mislabelled round, told by answers": (
        mislabelled_round,
        "mislabelled_rate",
        "all higher rates of the adapter methods in one of 3 rounds",
    ),
    "no-ops, by dose": (
        still_dose,
        "no_op",
        "one setting of 3 runs, KL 1e-6, not recorded as no-op",
    ),
    "no-ops, by answers": (
        still_answers,
        "no_op",
        "one setting of 3 runs, 99 % of answers the base model's",
    ),
    "one seed for all, recorded": (recorded_seed, "one_seed", "seed 42 read back from every run"),
    "one seed for all, copied answers": (
        copied_repetitions,
        "one_seed",
        "a quarter of the settings, seeds recorded as distinct, no curves",
    ),
    "one seed for all, same batches": (
        same_batches,
        "one_seed",
        "one base model, curves with a tenth of their noise of their own",
    ),
    "drift between rounds": (
        drifted,
        "drift",
        "5 points of unsafe responses in one round of one base model",
    ),
    "drift between rounds, of 6 points": (
        partial(drifted, points=6.0),
        "drift",
        "6 points of unsafe responses in one round of one base model",
    ),
    "drift between rounds, seen by no-ops": (
        drifted_no_ops,
        "drift",
        "a fifth of the answers in one round of one base model; no-ops of two settings",
    ),
    "echoed prompts": (
        echoes,
        "echo",
        "a fifth of the runs of one base model, four answers of five",
    ),
    UNTOLD: (
        echoes_by_length,
        "echo",
        "a fifth of the runs of one base model, every answer; no response text",
    ),
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
            clean = (
                varied(tables, rng)
                if tables is not None
                else simulated(rng, **{**settings, "no_ops": plant is drifted_no_ops})
            )
            made, planted = plant(clean, rng) if plant else (clean, set())
            findings = study.examine_study(made)
            named = _named(findings, finding)
            hits += (
                planted <= named
                if plant
                else study.study_alarms(findings)["finding"].isin(FLAWS).any()
            )
            more += bool(plant) and planted < named
        rows.append(
            {
                "studies": name,
                "flaw": flaw or "none: false alarms",
                "strength": strength,
                "n": n_studies,
                "hits": int(hits),
                "named_more": int(more),
            }
        )
    frame = pd.DataFrame(rows)
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
