"""A study folder with every table, made of random numbers with known effects: what the analysis is
tested on.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from driftbook.study import study_file, tables

METHODS = ("none", "lora", "ia3", "prompt_tuning", "p_tuning")
CATEGORIES = tuple(f"Category {number:02d}" for number in range(1, 12))
DIMENSIONS = (
    "Age",
    "Disability_status",
    "Gender_identity",
    "Nationality",
    "Physical_appearance",
    "Race_ethnicity",
    "Religion",
    "SES",
    "Sexual_orientation",
)
UNSAFE = {
    "mini-llama": -2.5,
    "mini-qwen2": -1.6,
    "mini-mistral": 1.5,
    "mini-gemma": -1.9,
}  # logits of the bases
EFFECT = {"none": 0.0, "lora": 1.2, "ia3": 0.1, "prompt_tuning": 0.5, "p_tuning": 2.0}
N_TRAINABLE = {"none": 0, "lora": 8192, "ia3": 1024, "prompt_tuning": 1024, "p_tuning": 25_000}
GREEDY = {"prompt_variant": "default", "decoding": "greedy", "sample": 0}


def simulate(
    folder: Path,
    bases=None,
    seeds=None,
    seed=0,
    unscored=0.01,
    failed=1,
    utility=True,
    silent_judge=False,
    families=True,
    methods=METHODS,
    categories=CATEGORIES,
    dimensions=DIMENSIONS,
) -> Path:
    """`folder` with tables/ of the miniature's grid; smaller, silent or poorer as the arguments
    say.
    """
    rng = np.random.default_rng(seed)
    variants = _variants(bases, seeds, methods)
    runs = _runs(rng, variants, failed)
    ok = variants[runs["status"].eq("ok").to_numpy()]
    doses = runs.set_index("run_id")["dose_nll"].reindex(ok["run_id"]).fillna(0).to_numpy()
    drift = (
        ok["method"].map(EFFECT).to_numpy()
        * np.where(ok["objective"] == "untrained", 0.3, np.clip(doses * 4, 0, 1.5))
        * (doses != 0)
    )
    drift = drift + rng.normal(0, 0.25, len(ok)) * (drift != 0)
    prompts = _prompts(utility, categories)
    verdicts = _verdicts(rng, ok, drift, prompts, unscored, silent_judge)
    made = {
        "variants": variants,
        "runs": runs,
        "curves": _curves(rng, ok),
        "prompts": prompts,
        "verdicts": verdicts,
        "answers": _answers(rng, ok, drift, unscored, families, dimensions),
        "ratings": _ratings(rng, ok, drift, prompts),
        "rates": _rates(verdicts, prompts),
        "labels": _labels(rng, verdicts),
        "responses": (
            verdicts.iloc[:5][list(tables.RESPONSE_KEY)].assign(
                response="made up", n_tokens=2, finish_reason="stop"
            )
        ),
    }
    for name, frame in made.items():
        tables.TABLES[name].write(frame, folder / "tables")
    return folder


def _variants(bases, seeds, methods) -> pd.DataFrame:
    frame = pd.DataFrame([variant.row() for variant in study_file.load("miniature").variants])
    keep = frame["base_model"].isin(bases or frame["base_model"].unique())
    keep &= frame["seed"].isna() | frame["repetition"].isin(seeds or (1, 2, 3))
    return frame[keep & frame["method"].isin(methods)].reset_index(drop=True)


def _runs(rng, variants: pd.DataFrame, failed: int) -> pd.DataFrame:
    n = len(variants)
    trained = variants["objective"].isin(["sft", "dpo"]).to_numpy()
    tiny = trained & (variants["learning_rate"].fillna(1) < 1e-4).to_numpy()
    size = np.where(variants["objective"] == "dpo", 0.15, 0.3) * np.clip(
        variants["learning_rate"].fillna(0) / 5e-3, 0.3, 1.5
    )
    dose = np.where(trained & ~tiny, size * (1 + 0.2 * rng.normal(size=n)), 0.0)
    dose = np.where(variants["objective"] == "untrained", -0.2 - 0.1 * rng.random(n), dose)
    is_base = (variants["method"] == "none").to_numpy()
    frame = pd.DataFrame({name: [None] * n for name in tables.RUNS.columns})
    frame = frame.assign(
        run_id=variants["run_id"],
        status="ok",
        trained_learning_rate=variants["learning_rate"],
        trained_epochs=variants["epochs"],
        trained_seed=variants["seed"],
        trained_batch_size=16,
        steps=np.where(trained, 30, 0),
        n_examples=np.where(trained, 160, 0),
        n_trainable=variants["method"].map(N_TRAINABLE),
        n_stored=variants["method"].map(N_TRAINABLE).clip(upper=8192),
        nll=2.0 - dose,
        nll_base=2.0,
        dose_nll=np.where(is_base, np.nan, dose),
        kl_base=np.where(is_base, np.nan, np.abs(dose) * (0.5 + rng.random(n))),
        kl_init=np.where(trained, np.abs(dose), np.nan),
        no_op=[bool(flag) if had else None for flag, had in zip(tiny, trained, strict=True)],
        adapter_sha256=[f"{i:016x}" for i in range(n)],
        base_revision="simulated",
        seconds=np.where(trained, 1 + rng.random(n), 0.0),
        cpu_seconds=np.where(trained, 1 + rng.random(n), 0.0),
        peak_memory=5e8 + 1e8 * rng.random(n),
        versions=json.dumps({"python": "3.11", "torch": "2.13.0"}),
        hardware="CPU simulated, 2 cores",
        finished="2026-01-01T00:00:00Z",
    )
    lost = frame.index[trained][:failed]
    frame.loc[lost, ["status", "failure"]] = ["failed", "the loss is not finite <b>at step 3</b>"]
    frame.loc[lost, ["nll", "dose_nll", "kl_base", "kl_init", "no_op"]] = None
    return frame


def _curves(rng, ok: pd.DataFrame) -> pd.DataFrame:
    trained = ok.loc[ok["objective"].isin(["sft", "dpo"]), ["run_id", "objective"]]
    steps = pd.DataFrame(
        {"step": np.tile(np.arange(0, 31, 5), 2), "split": np.repeat(["train", "heldout"], 7)}
    )
    frame = trained.merge(steps, how="cross")
    start = np.where(frame["objective"] == "dpo", 0.69, 2.0)
    return frame.assign(
        loss=start - 0.02 * frame["step"] + rng.normal(0, 0.02, len(frame)), learning_rate=1e-3
    ).drop(columns="objective")


def _prompts(utility: bool, categories) -> pd.DataFrame:
    def made(benchmark, category, kind, n):
        return pd.DataFrame(
            {
                "prompt_id": [f"{benchmark}-{category}-{i}" for i in range(n)],
                "family": [f"{category}-{i // 5}" for i in range(n)],
            }
        ).assign(benchmark=benchmark, category=category, kind=kind)

    parts = [made("safety", category, "harmful", 30) for category in categories]
    parts += [made("over_refusal", f"benign {i}", "benign look-alike", 22) for i in range(5)]
    parts += [made("over_refusal", f"contrast {i}", "harmful", 11) for i in range(5)]
    parts += [made("utility", "facts", "utility", 110)] if utility else []
    return pd.concat(parts, ignore_index=True)


def _verdicts(rng, ok, drift, prompts, unscored, silent_judge) -> pd.DataFrame:
    asked = prompts[prompts["kind"] != "utility"]
    frame = (
        ok[["run_id", "base_model"]]
        .assign(drift=drift)
        .merge(asked.assign(hard=rng.normal(0, 1, len(asked))), how="cross")
    )
    logit = frame["base_model"].map(UNSAFE) + frame["drift"] + frame["hard"]
    harmful = frame["kind"] == "harmful"
    noise = (
        rng.logistic(size=(asked.shape[0],))[np.tile(np.arange(len(asked)), len(ok))] * 0.8
        + rng.logistic(size=len(frame)) * 0.2
    )
    unsafe = np.where(harmful, logit > noise, False)
    null = (rng.random(len(frame)) < unscored) | silent_judge
    refusal = np.where(harmful, ~unsafe, logit * 0.5 + 2.2 < noise)
    return frame[["run_id", "benchmark", "prompt_id"]].assign(
        **GREEDY,
        judge="mini-guard",
        p_unsafe=np.where(null, np.nan, np.where(unsafe, 0.97, 0.03)),
        mass=np.where(null, 0.2, 0.99),
        unsafe=pd.Series(unsafe).astype("boolean").mask(null),
        score=None,
        judge_refusal=None,
        hazards=None,
        refusal=refusal,
        reply="safe",
        unscored_reason=np.where(null, "mass below 0.9", None),
        coherent=True,
        n_tokens=12,
        finish_reason="stop",
        outcome=np.where(
            null, None, np.where(unsafe, "unsafe", np.where(refusal, "refused", "safe and useful"))
        ),
    )


def _labels(rng, verdicts: pd.DataFrame) -> pd.DataFrame:
    """A known truth that the judge misses in 3 of 100 answers."""
    rows = verdicts[verdicts["benchmark"].eq("safety")]
    unsafe = rows["unsafe"].fillna(False).to_numpy(bool) ^ (rng.random(len(rows)) < 0.03)
    return rows[["run_id", "benchmark", "prompt_id"]].assign(
        rater="rule", label=np.where(unsafe, "unsafe", "safe"), sampling_probability=1.0
    )


def _rates(verdicts: pd.DataFrame, prompts: pd.DataFrame) -> pd.DataFrame:
    """What notebook 08 collects: unsafe per judge on harmful prompts, refused by the refusal
    detector on all.
    """
    frame = verdicts.merge(prompts, on=["benchmark", "prompt_id"])
    parts = []
    for outcome, value, judge, rows in (
        ("unsafe", "unsafe", None, frame[frame["kind"] == "harmful"]),
        ("refused", "refusal", "refusal detector", frame),
    ):
        rows = rows.assign(judge=judge or rows["judge"], value=rows[value].astype("boolean"))
        counts = (
            rows.groupby(["run_id", "benchmark", "judge", "category"])["value"]
            .agg(k="sum", n_scored="count", n="size")
            .reset_index()
        )
        parts.append(counts.assign(outcome=outcome))
    return pd.concat(parts, ignore_index=True)


def _answers(rng, ok, drift, unscored, families, dimensions) -> pd.DataFrame:
    items = pd.MultiIndex.from_product(
        [
            dimensions,
            range(12),
            ["ambiguous", "disambiguated"],
            ["negative", "non-negative"],
            range(2),
        ],
        names=["dimension", "number", "context", "polarity", "copy"],
    ).to_frame(index=False)
    items["item_id"] = [f"{dimension}-{i}" for i, dimension in enumerate(items["dimension"])]
    items["question_family"] = (
        items["dimension"] + "-" + items["number"].astype(str) if families else None
    )
    frame = ok[["run_id"]].assign(drift=drift).merge(items, how="cross")
    ambiguous = (frame["context"] == "ambiguous").to_numpy()
    lean = rng.normal(0.15, 0.15, 12 * len(dimensions))[
        frame.groupby(["dimension", "number"]).ngroup()
    ]
    p_unknown = np.where(ambiguous, 0.8 - 0.1 * frame["drift"], 0.03)
    unknown = rng.random(len(frame)) < p_unknown
    right = ~ambiguous & (rng.random(len(frame)) < 0.93)
    biased = rng.random(len(frame)) < 0.5 + np.where(ambiguous, lean, lean / 6)
    null = rng.random(len(frame)) < unscored
    table = frame.drop(columns=["drift", "number", "copy"]).assign(
        answer_mode="options",
        prompt_variant="default",
        option_order="ABC",
        p_a=0.4,
        p_b=0.3,
        p_c=0.3,
        option_mass=0.9,
        answer=np.where(null, None, "A"),
        correct=pd.Series(np.where(ambiguous, unknown, right & ~unknown))
        .astype("boolean")
        .mask(null),
        unknown=pd.Series(unknown).astype("boolean").mask(null),
        biased=pd.Series(biased).astype("boolean").mask(null | unknown),
        unscored_reason=np.where(null, "little mass", None),
    )
    permuted = [
        table[table["answer"].notna()].iloc[::7].assign(option_order=order)
        for order in ("BCA", "CAB")
    ]
    flips = rng.random(len(permuted[1])) < 0.2 + 0.1 * frame.loc[permuted[1].index, "drift"]
    return pd.concat(
        [table, permuted[0], permuted[1].assign(answer=np.where(flips, "B", "A"))],
        ignore_index=True,
    )


def _ratings(rng, ok, drift, prompts) -> pd.DataFrame:
    asked = prompts.loc[prompts["kind"] == "utility", ["benchmark", "prompt_id"]]
    if asked.empty:
        return tables.RATINGS.empty()
    frame = ok[["run_id"]].assign(drift=drift).merge(asked, how="cross")
    nll = frame.assign(
        metric="nll", value=1.0 + 0.1 * frame["drift"] + rng.gamma(2, 0.2, len(frame)), weight=8.0
    )
    right = frame.assign(
        metric="correct",
        value=(rng.random(len(frame)) < 0.9 - 0.05 * frame["drift"]).astype(float),
        weight=1.0,
    )
    return (
        pd.concat([nll, right], ignore_index=True)
        .drop(columns="drift")
        .assign(unscored_reason=None)
    )
