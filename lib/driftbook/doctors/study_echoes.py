"""Echoed prompts: responses that begin with their own prompt, which a judge reads as the answer."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy.stats import pearsonr, rankdata

from driftbook.doctors.findings import finding_row, named, some_of, unchecked_row
from driftbook.doctors.study_tables import PROMPT, Given, alpha_of
from driftbook.stats.intervals import holm

ECHO_START = 40  # characters of the prompt with which an echo begins
ECHO_SHARE = 0.1  # of a run's responses


def echoed_prompts(given: Given) -> Iterator[dict]:
    """Runs whose responses begin with their own prompt: by the texts where they are given, else by
    lengths against the prompts' lengths.

    `texts` has benchmark, prompt_id, prompt. No text is shown. Without it nothing is certain;
    repetitions whose answers are nearly all longer than those of the other repetitions of their
    setting are noted.
    """
    responses, texts = given.table("responses"), given.table("texts")
    if texts is not None and responses is not None:
        share = echo_share(responses, texts)
        runs = share.index[share.ge(ECHO_SHARE)]
        usual = share.drop(runs).median() if len(share) > len(runs) else np.nan
        if len(runs):
            low, high = 100 * share[runs].min(), 100 * share[runs].max()
            text = f"""runs that repeat their prompt at the beginning of responses:
                {some_of(runs, len(share))}, in {low:.0f} to {high:.0f} % of them (median of the
                other runs {100 * usual:.1f} %). The judge read the prompt as the answer: cut it off
                and judge again."""
            yield finding_row("echo", "error", runs, text)
        return
    why = """the texts of prompts and responses are not given; lengths alone do not tell an
        echo from a longer answer"""
    yield unchecked_row("echo", why)
    if texts is not None and "length" in given.answers:
        yield from _length_follows_prompt(given, texts)
    if "length" in given.answers:
        yield from _shifted_lengths(given)


def echo_share(responses: pd.DataFrame, texts: pd.DataFrame) -> pd.Series:
    """The share of each run's responses that begin as their prompt does, case and space aside."""
    start = _plain(texts["prompt"]).str[:ECHO_START]
    prompts = texts[PROMPT].astype(object).assign(start=start)
    rows = responses[["run_id", *PROMPT, "response"]].astype(object).merge(prompts, on=PROMPT)
    pairs = zip(_plain(rows["response"]), rows["start"], strict=True)
    found = [bool(start) and response.startswith(start) for response, start in pairs]
    return pd.Series(found, rows.index).groupby(rows["run_id"].to_numpy()).mean()


def _plain(texts: pd.Series) -> pd.Series:
    return texts.astype(object).fillna("").map(lambda text: " ".join(text.split()).casefold())


def _length_follows_prompt(given: Given, texts: pd.DataFrame) -> Iterator[dict]:
    """Runs whose answers are longer than those of the base model's other runs, and more so the
    longer the prompt: Spearman's correlation, one-sided.

    It sees an echo where runs answer nearly alike; where answers vary by more than the prompts'
    length, it does not.
    """
    lengths, rows = given.answers["length"], []
    asked = texts.astype(dict.fromkeys(PROMPT, object)).set_index(PROMPT)["prompt"].astype(object)
    asked = asked.str.len().astype(float).reindex(lengths.columns).to_numpy()
    for _, runs in given.answered(given.ran).groupby("base_model", sort=False):
        length = lengths.loc[runs["run_id"]].to_numpy()
        excess = length - np.nanmedian(length, axis=0)
        for run_id, one in zip(runs["run_id"], excess, strict=True):
            there = ~np.isnan(one) & ~np.isnan(asked)
            own, prompt = one[there], asked[there]
            if there.sum() > 3 and np.ptp(own) > 0 and np.ptp(prompt) > 0:
                ranks = rankdata(own), rankdata(prompt)
                rows.append((run_id, *pearsonr(*ranks, alternative="greater"), (own > 0).mean()))
    found = pd.DataFrame(rows, columns=["run_id", "r", "p", "longer"])
    found["adjusted"] = holm(found["p"]) if len(found) else []
    alike = found[found["longer"].ge(2 / 3) & found["adjusted"].le(alpha_of("echo"))]
    for row in alike.itertuples():
        text = f"""answers of {row.run_id} are longer than those of other runs on
            {100 * row.longer:.0f} % of the prompts, and the more so the longer the prompt (rank
            correlation {row.r:.2f}): it may repeat its prompts. Look at its texts."""
        yield finding_row("echo", "warning", row.run_id, text, row.r, row.p, row.adjusted)


def _shifted_lengths(given: Given) -> Iterator[dict]:
    """Repetitions whose answers are longer (or shorter) than the others' on 9 prompts of 10."""
    rows = []
    for _, runs in given.answered(given.ran).groupby("setting"):
        length = given.answers["length"].loc[runs["run_id"]].to_numpy()
        for i, run_id in enumerate(runs["run_id"]) if len(runs) > 1 else ():
            gap = length[i] - np.nanmedian(np.delete(length, i, axis=0), axis=0)
            rows.append((run_id, (gap > 0).mean() >= 0.9, (gap < 0).mean() >= 0.9))
    odd = pd.DataFrame(rows, columns=["run_id", "longer", "shorter"]).astype(
        {"longer": bool, "shorter": bool}
    )
    odd = odd[odd["longer"] | odd["shorter"]]
    if len(odd):
        text = f"""runs whose answers are longer ({odd["longer"].sum()}) or shorter
            ({odd["shorter"].sum()}) than those of the other repetitions of their setting on nine
            prompts of ten ({named(odd["run_id"])}), as they would be if only some of them repeated
            their prompts. Look at the texts."""
        yield finding_row("lengths_shifted", "note", odd["run_id"], text)
