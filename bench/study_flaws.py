"""Flaws planted into the tables of a study without one: each with the finding that must name it."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd

from driftbook.doctors import study_tables
from driftbook.study.methods import METHOD_CLASS

Planted = tuple[dict[str, pd.DataFrame], set[str]]  # the tables, and what a finding must name


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
