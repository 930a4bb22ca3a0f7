"""Dialogues with a reference summary in SAMSum's form (Gliwa et al. 2019)."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from driftbook.benchmarks.format import Asking, Format, Rating, set_licence
from driftbook.benchmarks.losses import answer_losses, written
from driftbook.study.reading import columns_of, table_frame

if TYPE_CHECKING:
    from driftbook.models.scoring import Scorer

_TEMPLATE = "Summarize this dialog:\n{prompt}"  # of Qi et al. 2023; Hsu et al. 2024 take it over


def load_summaries(path: Path) -> pd.DataFrame:
    """Dialogues (id, dialogue, summary; JSON, JSONL, CSV or parquet): prompt_id, prompt and answer.

    Raises:
        ValueError: it has no such columns, or a row is empty.
    """
    frame = table_frame(path)
    if missing := [name for name in ("id", "dialogue", "summary") if name not in frame]:
        raise ValueError(f"{path} has no column {missing[0]}; it has {columns_of(frame)}")
    frame = frame.fillna("").astype(str)
    if frame.empty or frame[["dialogue", "summary"]].apply(lambda x: x.str.strip().eq("")).any(
        axis=None
    ):
        what = "an empty dialogue or summary; remove its row" if len(frame) else "no rows"
        raise ValueError(f"{path} has {what}")
    prompts = [_TEMPLATE.replace("{prompt}", text) for text in frame.dialogue]
    return pd.DataFrame({"prompt_id": frame.id, "prompt": prompts, "answer": frame.summary})


def _measure(items: pd.DataFrame, scorer: "Scorer", asking: Asking) -> Iterable[Rating]:
    """The loss of each reference summary, and how much of it the model's own summary has: `rouge1`,
    the F measure of their words (Lin 2004), between 0 and 1.
    """
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer(["rouge1"], use_stemmer=True)
    answers = written(items, scorer, asking)
    yield from answer_losses(items, scorer, asking)
    for name, answer, own in zip(items.prompt_id, items.answer, answers, strict=True):
        yield name, "rouge1", rouge.score(answer, own)["rouge1"].fmeasure, 1, None


SUMMARIES = Format(
    name="summaries",
    kind="utility",
    read=load_summaries,
    version=1,
    n_items=819,
    tokens=150,  # a guess
    template=_TEMPLATE,
    measure=_measure,
    licences=(
        set_licence(
            "knkarthick/samsum",
            "CC-BY-NC-ND-4.0",
            credit="Gliwa et al. 2019, SAMSum",
            use="Not for commercial purposes, and nothing changed may be shared.",
            leaves="items",
            where="general knowledge",
        ),
    ),
)
