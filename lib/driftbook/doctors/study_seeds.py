"""Repetitions that are none: one seed, one adapter, one order of batches, the same answers."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy.stats import pearsonr, rankdata

from driftbook.doctors.findings import finding_row, named, unchecked_row
from driftbook.doctors.study_answers import equal_share
from driftbook.doctors.study_no_ops import NEARLY_ALL
from driftbook.doctors.study_tables import Given, alpha_of, is_no_op, numbers_of
from driftbook.stats.intervals import holm

IN_STEP = 0.9  # rank correlation of two curves' steps; above it they saw the same batches in order


def one_seed(given: Given) -> Iterator[dict]:
    """Repetitions that are none: one recorded seed, one adapter, the same batches or answers."""
    trained = given.trained
    seeds = numbers_of(trained, "trained_seed").fillna(numbers_of(trained, "seed"))
    if seeds.isna().all():
        yield unchecked_row("one_seed", "no seed is recorded")
    twice = trained.assign(read=seeds).duplicated(["setting", "read"], keep=False)
    shared = trained[seeds.notna() & twice]
    if len(shared):
        text = f"""runs that share their seed with another repetition of the same setting:
            {len(shared)} of {len(trained)}, in {shared["setting"].nunique()} settings (distinct
            seeds: {seeds[shared.index].nunique()}, the first {seeds[shared.index[0]]:g}). They are
            copies of one run but for the hardware's rounding, and their spread says nothing about
            seeds: call them one run, or run again with distinct seeds."""
        yield finding_row("one_seed", "error", shared["run_id"], text)
    for check in (_one_adapter, _curves_in_step, _same_answers, _shared_by_settings):
        yield from check(given)


def _shared_by_settings(given: Given) -> Iterator[dict]:
    """Settings of one method, base model and objective that were run with the same seeds."""
    runs = given.trained
    if not {"method", "objective", "seed"} <= set(runs) or runs["seed"].isna().all():
        return
    runs = runs[runs["seed"].notna()]
    alike = runs.groupby(["base_model", "method", "objective", "seed"])["setting"]
    shared = runs[alike.transform("nunique").gt(1)]
    if len(shared):
        text = f"""runs that share their seed with another setting of the same method and
            objective: {len(shared)} of {len(runs)}. They begin alike and err together, so
            intervals over several settings take their seeds as clusters and are wider. Leave
            shared_seeds out of the study file, and every setting draws seeds of its own."""
        yield finding_row("shared_seeds", "note", shared["run_id"], text)


def _one_adapter(given: Given) -> Iterator[dict]:
    """Trained runs of one base model with the same bytes; untrained adapters may be equal."""
    trained = given.trained
    if "adapter_sha256" not in trained or trained["adapter_sha256"].isna().all():
        yield unchecked_row("one_adapter", "no adapter's hash is recorded")
        return
    trained = trained[trained["learning_rate"].notna() & trained["adapter_sha256"].notna()]
    same = trained[trained.duplicated(["base_model", "adapter_sha256"], keep=False)]
    if len(same):
        text = f"""trained runs with the adapter of another run, byte for byte: {len(same)} of
            {len(trained)}, under {same["adapter_sha256"].nunique()} hashes
            ({named(same["run_id"])}). A seed or a setting did not reach the trainer, or files were
            copied: train them again."""
        yield finding_row("one_seed", "error", same["run_id"], text)


def _repetitions(runs: pd.DataFrame) -> list[tuple[str, str]]:
    """The pairs of runs with the same setting."""
    groups = [group.tolist() for _, group in runs.groupby("setting")["run_id"]]
    return [(a, b) for group in groups for i, a in enumerate(group) for b in group[:i]]


def _curves_in_step(given: Given) -> Iterator[dict]:
    """Repetitions whose training losses rise and fall together: Spearman's correlation of the steps
    of the curves' second half, one-sided.

    The first half is left out, where every curve falls for the same reason. Distinct seeds draw
    distinct batches, so that the rest of the noise is theirs alone; one seed draws the same batches
    in the same order, whatever the init.
    """
    curves, trained = given.table("curves"), given.trained
    if curves is None:
        yield unchecked_row("curves_in_step", "there are no training curves")
        return
    rows = curves[curves["split"].eq("train") & curves["run_id"].isin(trained["run_id"])]
    losses = rows.astype({"loss": float}).pivot(index="run_id", columns="step", values="loss")
    tests = []
    for pair in _repetitions(trained[trained["run_id"].isin(losses.index)]):
        both = losses.loc[list(pair)].to_numpy()
        both = both[:, ~np.isnan(both).any(0)]
        if both.shape[1] >= 16:
            tests.append((*pair, *_in_step(both)))
    if not tests:
        why = "no two repetitions have training curves of 16 common steps"
        yield unchecked_row("curves_in_step", why)
        return
    found = pd.DataFrame(tests, columns=["a", "b", "r", "p"])
    found["adjusted"] = holm(found["p"])
    alike = found[found["r"].ge(IN_STEP) & found["adjusted"].le(alpha_of("one_seed"))]
    if len(alike):
        runs = sorted({*alike["a"], *alike["b"]})
        text = f"""pairs of repetitions whose training losses rise and fall together step by
            step: {len(alike)} of {len(found)} (rank correlation from {alike["r"].min():.2f};
            {named(runs)}). They saw the same batches in the same order, as one seed gives: check
            that the seed reaches the data's order."""
        numbers = alike["r"].min(), alike["p"].max(), alike["adjusted"].max()
        yield finding_row("one_seed", "error", runs, text, *numbers)


def _in_step(losses: np.ndarray) -> tuple[float, float]:
    """Spearman's correlation of the steps of two curves' second half, and its one-sided p."""
    steps = np.diff(losses[:, losses.shape[1] // 2 :], axis=1)
    if (np.ptp(steps, axis=1) < 1e-12).any():
        return np.nan, 1.0
    r, p = pearsonr(*rankdata(steps, axis=1), alternative="greater")
    return float(r), float(p)


def _same_answers(given: Given) -> Iterator[dict]:
    """Repetitions that answer every prompt alike though training did change the model."""
    of = given.answers
    if "length" not in of:
        yield unchecked_row("same_answers", "there are no verdicts, so no answers to compare")
        return
    if of["length"].nunique().max() < 2:
        yield unchecked_row("same_answers", "answers to a prompt are all of one length")
        return
    moved = given.answered(given.trained)
    moved = moved[moved["learning_rate"].notna() & ~is_no_op(moved)]
    pairs = _repetitions(moved)
    bases = given.bases[given.bases.isin(of["length"].index)]
    home = moved.set_index("run_id")["base_model"].map(bases)
    equal = equal_share(of, [a for a, _ in pairs], [b for _, b in pairs])
    runs, n = [], 0
    for pair, share in zip(pairs, equal, strict=True):
        base = home[pair[0]]
        if share == 1 and (pd.isna(base) or equal_share(of, [pair[0]], [base])[0] < NEARLY_ALL):
            runs, n = [*runs, *pair], n + 1
    if runs:
        runs = sorted(set(runs))
        text = f"""pairs of repetitions that answer all {of["length"].shape[1]} prompts alike,
            and not as the base model does: {n} of {len(pairs)} ({named(runs)}). Distinct seeds do
            not: check that the seed reaches init, data order and dropout, and that no answers were
            copied."""
        yield finding_row("one_seed", "error", runs, text)
