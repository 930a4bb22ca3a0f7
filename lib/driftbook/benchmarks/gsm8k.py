"""GSM8K (Cobbe et al. 2021): questions with a final answer."""

import re
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from driftbook.benchmarks.format import Asking, Format, Rating, set_licence
from driftbook.benchmarks.losses import answer_losses, written
from driftbook.study.reading import json_lines

if TYPE_CHECKING:
    from driftbook.models.scoring import Scorer

# a minus that no word or number precedes; digits, and what may join them to others
_NUMBER = re.compile(
    r"((?<![^\W_])(?<![)\]}%$.-])-)?((?:(?<![\w.])\.)?\d(?:[\d.,/:^]*\d)?)", re.ASCII
)
_GROUPS = r"[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d?(?:,\d{2})+,\d{3}"  # 1,800,000 and 18,00,000
_PLAIN = re.compile(rf"(?:\d+|{_GROUPS})(?:\.\d+)?|\.\d+", re.ASCII)
_REWRITTEN = (  # what LaTeX and typography write otherwise
    (re.compile("\N{MINUS SIGN}"), "-"),
    (re.compile(r"(?<=\d)(?:\{,\}|\\[,!]|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))"), ","),
    (re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}"), r"\1/\2"),
    (re.compile(r"\^\{(\d+)\}"), r"^\1"),
    (re.compile(r"(?<=[a-zA-Z}])\^\d+"), ""),  # of a unit, as in m^2
    (re.compile(r"(?<=\d)(\s?(?:[mck]?m|ft|in|yd|mi))[23]\b"), r"\1"),  # m2
    (re.compile(r"(?<!\d)\\?[$€£¥₹] ?(?=-?\.?\d)"), ""),
)


def load_questions(path: Path) -> pd.DataFrame:
    """Questions with prompt_id, prompt, answer (GSM8K's calculator marks removed) and final (what
    follows ####).

    Raises:
        ValueError: a row without question, answer, or ####.
    """
    rows = []
    for line, row in json_lines(path):
        try:
            text, _, final = row["answer"].partition("####")
            complete = bool(final.strip() and row["question"].strip())
        except (KeyError, TypeError, AttributeError):
            complete = False
        if not complete:
            raise ValueError(
                f"{path}: line {line} has no question, or no answer that ends in '#### ...'"
            )
        answer = re.sub(r"<<.*?>>", "", text).strip()
        rows.append((str(len(rows)), row["question"], answer, final.strip()))
    if not rows:
        raise ValueError(f"{path} has no questions; fetch it again")
    return pd.DataFrame(rows, columns=["prompt_id", "prompt", "answer", "final"])


# ---- the rule
def is_correct(response: str, final: str) -> bool:
    """Whether an answer gives the final answer: its last number has the final answer's value, or,
    where that is a word, the word is among its words. The rule of `last_number` says how numbers
    are read.
    """
    wanted = final_number(final)
    return is_named(response, final) if wanted is None else last_number(response) == wanted


def last_number(text: str) -> Decimal | None:
    r"""The value of the last number in a text; None where there is none, or it cannot be read.

    Currency signs, units, a percent sign, markup and the point of a sentence are no part of it: 18,
    18.0, $18.00, 18%, 18 m^2, **18** and \boxed{18} are all 18, and 18.01 is not. A comma groups
    thousands (1,800 and 1,00,000; also LaTeX's 1{,}800 and a no-break space), a point begins
    decimals: 1.800 is 1.8. A minus counts that stands at the number or at its currency sign, but
    not between two numbers or words: 10-18 ends in 18. Digits that are joined otherwise (1/2, 5,50,
    3:30, 2^3) are no number, so that an answer which ends in them is wrong.
    """
    found = list(_NUMBER.finditer(_rewritten(text)))
    return _value(found[-1]) if found else None


def final_number(final: str) -> Decimal | None:
    """The value of a final answer that is a number, alone or with a unit behind it; else None."""
    text = _rewritten(final.strip())
    match = _NUMBER.match(text)
    return _value(match) if match and re.fullmatch(r"\.?|\s?%|\s\D*", text[match.end() :]) else None


def is_named(response: str, final: str) -> bool:
    """Whether a final answer that is no number stands in a response as words of its own, in capital
    or small letters.
    """
    words = r"\s+".join(map(re.escape, final.lower().split()))
    return re.search(rf"(?<![\w/-]){words}(?![\w/-])", response.lower()) is not None


def _rewritten(text: str) -> str:
    for pattern, plain in _REWRITTEN:
        text = pattern.sub(plain, text)
    return text


def _value(match: re.Match) -> Decimal | None:
    sign, digits = match[1] or "", match[2]
    return Decimal(sign + digits.replace(",", "")) if _PLAIN.fullmatch(digits) else None


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
    version=2,
    n_items=1_319,
    tokens=118,  # counted, with the answers
    measure=_measure,
    licences=(_LICENCE, _LICENCE.elsewhere("openai/gsm8k", where="its dataset card")),
)
