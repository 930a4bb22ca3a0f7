"""Requests with a reference answer in Alpaca's form (Taori et al. 2023)."""

from pathlib import Path

import pandas as pd

from driftbook.benchmarks.format import Format, set_licence
from driftbook.benchmarks.losses import answer_losses
from driftbook.study.reading import json_rows


def load_answers(path: Path) -> pd.DataFrame:
    """Requests of a JSON or JSONL file: prompt_id, prompt (instruction and input) and answer.

    Raises:
        ValueError: it is no list of such rows, or one is empty.
    """
    rows = json_rows(path)
    try:
        found = [
            (str(i), "\n".join(filter(None, (one["instruction"], one.get("input")))), one["output"])
            for i, one in enumerate(rows)
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no list of rows with instruction and output ({type(error).__name__}:"
            f" {error}); write it in Alpaca's form"
        ) from None
    if not found or not all(prompt.strip() and answer.strip() for _, prompt, answer in found):
        what = "an empty request or answer; fill it or remove its row" if found else "no rows"
        raise ValueError(f"{path} has {what}")
    return pd.DataFrame(found, columns=["prompt_id", "prompt", "answer"])


REFERENCE_ANSWERS = Format(
    name="answers",
    kind="utility",
    read=load_answers,
    version=1,
    n_items=1_000,  # a guess, as its tokens are
    tokens=118,
    is_written=False,
    measure=answer_losses,  # its fall on held-out examples of a training is what training gained
    licences=(
        set_licence(
            "tatsu-lab/alpaca",
            "CC-BY-NC-4.0",
            credit="Taori et al. 2023, Stanford Alpaca",
            use="Not for commercial purposes; it was written by a model whose terms forbid to train"
            " competing ones on what it says.",
            leaves="items",
            seen="licence",
            where="quotations of its dataset card in public repositories",
        ),
    ),
)
