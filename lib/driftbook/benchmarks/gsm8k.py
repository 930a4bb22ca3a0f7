"""GSM8K (Cobbe et al. 2021): questions with a final answer."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from driftbook.benchmarks.format import Asking, Format, Rating, set_licence
from driftbook.benchmarks.losses import answer_losses, written

if TYPE_CHECKING:
    from driftbook.models.scoring import Scorer

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def load_questions(path: Path) -> pd.DataFrame:
    """Questions with prompt_id, prompt, answer (GSM8K's calculator marks removed) and final (what
    follows ####).

    Raises:
        ValueError: a row without question, answer, or ####.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n")):
        try:
            row = json.loads(line)
            text, _, final = row["answer"].partition("####")
            complete = bool(final.strip() and row["question"].strip())
        except (ValueError, KeyError, TypeError, AttributeError):
            complete = False
        if not complete:
            raise ValueError(
                f"{path}: line {number + 1} is torn, or has no question, or no answer that ends in"
                " '#### ...'"
            )
        answer = re.sub(r"<<.*?>>", "", text).strip()
        rows.append((str(number), row["question"], answer, final.strip()))
    return pd.DataFrame(rows, columns=["prompt_id", "prompt", "answer", "final"])


def is_correct(response: str, final: str) -> bool:
    """Whether an answer gives the final answer: as its last number, or a word among its words."""
    if _NUMBER.fullmatch(final):
        numbers = _NUMBER.findall(response)
        return bool(numbers) and numbers[-1].replace(",", "") == final.replace(",", "")
    return final.lower() in response.lower().split()


def _measure(items: pd.DataFrame, scorer: "Scorer", asking: Asking) -> Iterable[Rating]:
    """The held-out loss of the reference answer, whether the model's own answer is right, and each
    rater's grade of it.
    """
    losses, answers = answer_losses(items, scorer, asking), written(items, scorer, asking)
    for loss, final, answer in zip(losses, items.final, answers, strict=True):
        yield loss
        yield loss[0], "correct", float(is_correct(answer, final)), 1, None
    for name, grader in asking.graders.items():
        grades = grader(list(items.prompt), answers)
        rows = zip(items.prompt_id, grades.score, grades.unscored_reason, strict=True)
        yield from ((item, f"grade by {name}", grade, 1, reason) for item, grade, reason in rows)


_LICENCE = set_licence(
    "github:openai/grade-school-math",
    "MIT",
    credit="Cobbe et al. 2021, GSM8K, Copyright (c) 2021 OpenAI",
    use="Anyone, for any purpose.",
    leaves="items text",
    seen="licence use text",
    where="LICENSE of the repository",
)
GSM8K = Format(
    name="gsm8k",
    kind="utility",
    read=load_questions,
    version=1,
    n_items=1_319,
    tokens=118,  # counted, with the answers
    measure=_measure,
    licences=(_LICENCE, _LICENCE.elsewhere("openai/gsm8k", where="its dataset card")),
)
