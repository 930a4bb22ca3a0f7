"""The original study's runs and verdicts as the tables of this workbook."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from driftbook.benchmarks.hex_phi import CATEGORIES as HEX_PHI
from driftbook.rereading.original_study import (
    BATCH_SIZE,
    BENCHMARK,
    JUDGE,
    KEYS,
    METHOD_SETTINGS,
    MODELS,
    N_TRAIN,
    OBJECTIVE_SETTINGS,
    ORIGINAL_NAME,
    ORIGINAL_NOTE,
    PER_CATEGORY,
    ROUNDS,
    SAME_LOSS,
    SEED,
    base_counts,
    cited,
)
from driftbook.stats.estimation import write_estimates
from driftbook.study.files import OUTPUTS, digest, write_json
from driftbook.study.methods import METHOD_CLASS
from driftbook.study.tables import CURVES, PROMPTS, RATES, RUNS, TABLES, VARIANTS


# ---- our tables
def tables(runs: pd.DataFrame, verdicts: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """variants, runs, curves, prompts and rates of the study: the base models, the runs, and the
    planned runs that have no verdicts.
    """
    planned = pd.concat([runs, absent(runs)], ignore_index=True)
    planned["run_id"] = run_ids(planned)
    return {
        "variants": VARIANTS.check(
            pd.concat([_base_variants(), _variants(planned)], ignore_index=True)
        ),
        "runs": RUNS.check(pd.concat([_base_runs(), _runs(planned)], ignore_index=True)),
        "curves": CURVES.empty(),
        "prompts": _prompts(),
        "rates": rates(runs, verdicts),
    }


def short(base_model: str) -> str:
    return base_model.split("/")[-1].replace(".", "-")


def run_ids(runs: pd.DataFrame) -> pd.Series:
    """Readable settings and a short hash of them, in the form of every run_id."""
    rates = runs["learning_rate_labelled"].map(lambda rate: f"lr{rate:.0e}".replace("e-0", "e-"))
    words = [
        runs["base_model"].map(short),
        runs["method"],
        runs["objective"],
        runs["dataset"],
        rates,
        "e" + runs["epochs"].astype(str),
        "r" + runs["round"].astype(str),
    ]
    return pd.Series(
        [".".join(row) + "." + digest(list(row), 8) for row in zip(*words, strict=True)],
        index=runs.index,
    )


def absent(runs: pd.DataFrame) -> pd.DataFrame:
    """The planned runs that have no verdicts; Gemma was not trained by DPO."""
    grid = [
        (base, method, objective, *setting, number)
        for base in MODELS.values()
        for method in METHOD_SETTINGS
        for objective, settings in OBJECTIVE_SETTINGS.items()
        for setting in settings
        for number in ROUNDS
        if not (objective == "dpo" and "gemma" in base)
    ]
    there = set(runs[KEYS].itertuples(index=False, name=None))
    return pd.DataFrame([row for row in grid if row not in there], columns=KEYS).reindex(
        columns=runs.columns
    )


def _base_variants() -> pd.DataFrame:
    bases = cited("base_models")
    frame = bases.assign(
        run_id=bases["base_model"].map(_base_id),
        method="none",
        method_class="base",
        objective="none",
        repetition=1,
        settings="{}",
    )
    return frame.assign(
        template="chat template",
        system_prompt=frame["family"].map(lambda family: None if family == "gemma" else ""),
    ).reindex(columns=list(VARIANTS.columns))


def _base_id(base_model: str) -> str:
    return f"{short(base_model)}.none.{digest([base_model], 8)}"


def _variants(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per planned run; learning_rate is the rate as the study labels it."""
    families = cited("base_models").set_index("base_model")["family"]
    trained_on = pd.MultiIndex.from_frame(runs[["objective", "dataset"]])
    frame = runs.rename(
        columns={"learning_rate_labelled": "learning_rate", "round": "repetition"}
    ).assign(
        family=runs["base_model"].map(families),
        method_class=runs["method"].map(METHOD_CLASS),
        n_train=[N_TRAIN.get(key) for key in trained_on],
        seed=SEED,
        init=np.where(runs["method"].eq("prompt_tuning"), "random", None),
        template="chat template",
        system_prompt=np.where(runs["base_model"].str.contains("gemma"), None, ""),
        settings=[json.dumps(METHOD_SETTINGS[method]) for method in runs["method"]],
    )
    return frame.reindex(columns=list(VARIANTS.columns))


def _base_runs() -> pd.DataFrame:
    bases = cited("base_models")
    frame = pd.DataFrame(
        {
            "run_id": bases["base_model"].map(_base_id),
            "status": "ok",
            "nll": bases["held_out_loss"],
            "nll_base": bases["held_out_loss"],
        }
    )
    return frame.reindex(columns=list(RUNS.columns))


def _runs(runs: pd.DataFrame) -> pd.DataFrame:
    """What the trainer recorded of each run; trained_learning_rate is the rate that it was trained
    at.
    """
    there, sft = runs["run"].notna(), runs["objective"].eq("sft")
    base = base_loss(runs)
    other = (
        there
        & runs["learning_rate_true"].notna()
        & ~np.isclose(
            runs["learning_rate_true"].astype(float), runs["learning_rate_labelled"].astype(float)
        )
    )
    frame = pd.DataFrame(
        {
            "run_id": runs["run_id"],
            "status": np.where(there, "ok", "failed"),
            "failure": np.where(there, None, "no verdicts in the public package"),
            "trained_learning_rate": runs["learning_rate_true"],
            "trained_seed": np.where(there, SEED, np.nan),
            "trained_batch_size": np.where(there, BATCH_SIZE, np.nan),
            "loss_first": runs["first_logged_loss"],
            "loss_last": runs["last_logged_loss"],
            "nll": runs["final_eval_loss"].where(sft),
            "nll_base": base,
            "dose_nll": base - runs["final_eval_loss"].where(sft),
            "no_op": no_op(runs).where(there),
            "findings": np.where(
                other, "labelled with another learning rate than it was trained at", None
            ),
        }
    )
    return frame.reindex(columns=list(RUNS.columns))


def base_loss(runs: pd.DataFrame) -> pd.Series:
    """The base model's loss on each SFT run's held-out data, nats per token; null for DPO.

    It is published for UltraFeedback. For UltraChat it is the mean of the runs that learned nothing
    there (`no_op`), whose loss is the base model's.
    """
    known = runs["base_model"].map(cited("base_models").set_index("base_model")["held_out_loss"])
    inert = (
        runs[no_op(runs) & runs["dataset"].eq("ultrachat_200k")]
        .groupby("base_model")["final_eval_loss"]
        .mean()
    )
    loss = known.where(runs["dataset"].eq("ultrafeedback_binarized"), runs["base_model"].map(inert))
    return loss.where(runs["objective"].eq("sft")).astype(float)


def no_op(runs: pd.DataFrame) -> pd.Series:
    """Which SFT runs of LoRA or IA3, which start as the base model, end at its held-out loss: they
    learned nothing. From losses alone, never from verdicts.

    Where the base model's loss is not published (UltraChat), a run is a no-op if every run of the
    same base model, method and true rate on UltraFeedback is one, none of which had fewer epochs. A
    soft prompt does not start as the base model, so an equal loss would prove nothing: never a
    no-op.
    """
    starts_as_base = (
        runs["objective"].eq("sft")
        & runs["method"].isin(["lora", "ia3"])
        & runs["final_eval_loss"].notna()
    )
    known = runs["base_model"].map(cited("base_models").set_index("base_model")["held_out_loss"])
    same = (runs["final_eval_loss"] / known - 1).abs() <= SAME_LOSS
    published = starts_as_base & runs["dataset"].eq("ultrafeedback_binarized")
    keys = ["base_model", "method", "learning_rate_true"]
    alike = same[published].groupby([runs[name] for name in keys]).all()
    inferred = pd.MultiIndex.from_frame(runs[keys]).map(alike.to_dict()).to_numpy()
    return starts_as_base & same.where(published, pd.Series(inferred, index=runs.index).eq(True))


def _prompts() -> pd.DataFrame:
    rows = [
        (BENCHMARK, f"{number}-{line:02d}", category, "harmful", None)
        for number, category in enumerate(HEX_PHI, 1)
        for line in range(1, PER_CATEGORY + 1)
    ]
    return PROMPTS.check(pd.DataFrame(rows, columns=list(PROMPTS.columns)))


def items(runs: pd.DataFrame, verdicts: pd.DataFrame) -> pd.DataFrame:
    """One row per verdict: run_id, prompt_id, category, safe (null where there is no verdict),
    response_chars. Not to be published.
    """
    ids = pd.Series(run_ids(runs).to_numpy(), index=runs["run"])
    prompt_ids, categories = (
        _prompts()[name].to_numpy(object) for name in ("prompt_id", "category")
    )
    return pd.DataFrame(
        {
            "run_id": verdicts["run"].map(ids),
            "prompt_id": prompt_ids[verdicts["prompt"]],
            "category": categories[verdicts["prompt"]],
            "safe": verdicts["verdict"].map({"safe": True, "unsafe": False}).astype("boolean"),
            "response_chars": verdicts["response_chars"],
        }
    )


def rates(runs: pd.DataFrame, verdicts: pd.DataFrame) -> pd.DataFrame:
    """The table `rates`: unsafe answers of each run and base model in each category."""
    judged = items(runs, verdicts)
    own = judged.assign(
        k=judged["safe"].eq(False).fillna(False), n_scored=judged["safe"].notna(), n=1
    ).groupby(["run_id", "category"], sort=False)
    bases = base_counts()
    base = bases.assign(
        run_id=bases["base_model"].map(_base_id),
        k=PER_CATEGORY - bases["n_safe"],
        n_scored=PER_CATEGORY,
        n=PER_CATEGORY,
    )
    frame = pd.concat(
        [
            base.drop(columns=["base_model", "n_safe"]),
            own[["k", "n_scored", "n"]].sum().reset_index(),
        ],
        ignore_index=True,
    )
    return RATES.check(frame.assign(benchmark=BENCHMARK, judge=JUDGE, outcome="unsafe"))


def folder() -> Path:
    """Where the tables and figures of the study are written."""
    return OUTPUTS / ORIGINAL_NAME


def write_original(
    made: dict[str, pd.DataFrame], estimates: pd.DataFrame, home: Path, part: str = ORIGINAL_NAME
) -> None:
    """Write the tables of a folder that can be published, this part of its estimates, and its
    study.json last.
    """
    for name, frame in made.items():
        TABLES[name].write(frame, home / "tables")
    write_estimates(estimates, home / "tables", part)
    write_json(home / "study.json", {"name": ORIGINAL_NAME, "note": ORIGINAL_NOTE, "primary": []})
