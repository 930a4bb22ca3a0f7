"""General text, such as WikiText (Merity et al. 2016): its loss rises where a model forgets."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from driftbook.benchmarks.format import Asking, Format, Rating, set_licence
from driftbook.study.reading import columns_of, table_frame, utf8_text

if TYPE_CHECKING:
    from driftbook.models.scoring import Scorer

TOKENS_READ = 512  # of each text


def load_text(path: Path) -> pd.DataFrame:
    """General text with prompt_id and text: of JSONL or parquet the column `text`, of a text file
    its paragraphs (between blank lines); those under 200 characters are left out.

    Raises:
        ValueError: the file has no such column, or no text.
    """
    if path.suffix == ".txt":
        texts = re.split(r"\r?\n[ \t]*\r?\n", utf8_text(path))
    else:
        frame = table_frame(path)
        if "text" not in frame:
            raise ValueError(f"{path} has no column text; it has {columns_of(frame)}")
        texts = frame.text.astype(str)
    stripped = ((str(number), text.strip()) for number, text in enumerate(texts))
    rows = [(number, text) for number, text in stripped if len(text) >= 200]
    if not rows:
        raise ValueError(f"{path} has no text of 200 characters or more")
    return pd.DataFrame(rows, columns=["prompt_id", "text"])


def _measure(items: pd.DataFrame, scorer: "Scorer", asking: Asking) -> list[Rating]:
    """The loss of each text without any template (nats per token of its first TOKENS_READ)."""
    ids = [scorer.tokenizer.encode(text)[:TOKENS_READ] for text in items.text]
    losses = scorer.token_logprobs([(one[:1], one[1:]) for one in ids])
    return [
        (name, "nll", -loss.mean(), len(loss), None)
        for name, loss in zip(items.prompt_id, losses, strict=True)
    ]


GENERAL_TEXT = Format(
    name="text",
    kind="utility",
    read=load_text,
    version=2,
    n_items=1_000,  # a guess
    tokens=TOKENS_READ,
    is_written=False,
    measure=_measure,
    licences=(
        set_licence(
            "Salesforce/wikitext",
            "CC-BY-SA-3.0 and GFDL",
            credit="Merity et al. 2016, WikiText; the authors of Wikipedia",
            use="Anyone, with attribution, and what is adapted from it under the same licence.",
            leaves="items text",
            seen="licence use text",
            where="datasets/wikitext/README.md of huggingface/datasets on GitHub, an earlier place"
            " of its card",
        ),
    ),
)
