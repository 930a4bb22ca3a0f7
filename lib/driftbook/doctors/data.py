"""What is wrong with training examples, found from their words before anything is trained; no model
is run.

An **error** means that the study could not train on the examples, or that it would train on what it
asks later. A **warning** means that it can be done, and that what it shows may not mean what it
seems to. A **note** is a number measured. No example's text is ever in a result: rows are named by
their number.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pandas import DataFrame

from driftbook.benchmarks.bbq import UNKNOWN_FORMS
from driftbook.benchmarks.refusals import is_refusal
from driftbook.doctors.data_words import (
    NGRAM,
    Hit,
    answers_in,
    asked_in,
    duplicate_rows,
    near_prompts,
    shared_runs,
    texts_in,
    whole_texts,
    words_of,
)
from driftbook.doctors.findings import plain_sentence
from driftbook.stats.confidence import CONFIDENCE
from driftbook.stats.intervals import wilson

DATA_COLUMNS = ["finding", "severity", "n", "share", "ci_low", "ci_high", "sentence"]
ROW_COLUMNS = ["row", "finding", "benchmark", "score"]
OVER = 0.01  # a share above this is more than some bad rows
OPTION = re.compile(r"(?<!\w)\(?([A-Ha-h])\s?[.:)]\s*")

# severity up to OVER, and above it
PLAIN, MILD, BAD = ("note", "note"), ("note", "warning"), ("warning", "warning")
GRAVE, FATAL = ("warning", "error"), ("error", "error")


@dataclass(frozen=True)
class DataKind:
    """What a finding counts, its severity up to and above OVER, what is so, and what follows."""

    what: str
    then: str
    severity: tuple[str, str] = MILD
    of: str = "examples"


TEACHES = (
    "they teach refusing, so a change of safety would come from the data and not from the"
    " method alone; remove these rows or report their share"
)
WEIGHS = (
    "they weigh more than others, and the study has fewer distinct examples than it reports;"
    " keep one of each"
)
KINDS = {
    "empty": DataKind(
        "have no prompt, or say nothing in a turn or an answer",
        "the study would refuse to train on them; fill or remove these rows",
        FATAL,
    ),
    "turn_order": DataKind(
        "have a prompt that is not user and assistant in turn, ending with the user (a system"
        " turn may stand first)",
        "chat templates fail on them or merge turns; put the turns in order or remove these rows",
        FATAL,
    ),
    "equal_answers": DataKind(
        "have a chosen and a rejected answer that are the same, white space at the ends apart",
        "they teach nothing, since equal answers have no gradient, so DPO leaves them out; give"
        " pairs whose answers differ",
        BAD,
        "preferences",
    ),
    "one_word": DataKind(
        "have an answer of at most one word",
        "training on them shortens answers, which changes refusals and verdicts for no reason"
        " of safety; check that the data is meant so",
    ),
    "repeated_prompt": DataKind(
        "have an answer that begins by repeating the whole last user turn",
        "they teach the model to repeat what it is asked, which a judge may take for an"
        " unsafe answer; cut the repeated part or remove these rows",
    ),
    "refusals": DataKind(
        "have an answer to train on that declines (found by English phrases)", TEACHES
    ),
    "refusals_rejected": DataKind(
        "have a rejected answer that declines (found by English phrases)",
        "what this teaches depends on the chosen answer; read it with refusal_preferred and"
        " refusal_dispreferred",
        PLAIN,
        "preferences",
    ),
    "refusal_preferred": DataKind(
        "choose an answer that declines over one that does not", TEACHES, MILD, "preferences"
    ),
    "refusal_dispreferred": DataKind(
        "choose an answer that does not decline over one that does",
        "they unlearn refusing, so a loss of safety would come from the data and not from the"
        " method alone; remove these rows or report their share",
        BAD,
        "preferences",
    ),
    "multiple_choice": DataKind(
        "ask to choose from options A, B and C of which one is unknown, as BBQ does",
        "they teach the form of the bias benchmark, so its accuracy would change for no"
        " reason of bias; remove these rows or report their share",
    ),
    "duplicates": DataKind("repeat an earlier example, case and spaces apart", WEIGHS),
    "near_duplicates": DataKind("are nearly another example that is not the same", WEIGHS),
    "cut": DataKind(
        "are longer than max_length and lose their end",
        "answers without an end teach answers without an end, and a prompt that fills"
        " max_length leaves nothing to train on; raise max_length or remove these rows",
    ),
    "tokens_lost": DataKind(
        "stand behind max_length",
        "the study would train on fewer tokens than the data has; raise max_length",
        MILD,
        "tokens",
    ),
    "near_benchmark": DataKind(
        "have a turn whose wording is near a prompt of {benchmark}",
        "training on what the benchmark asks changes its result whatever the method does;"
        " look at these rows with data_rows() and remove them",
        BAD,
    ),
    "benchmark_overlap": DataKind(
        f"of {{benchmark}} have a run of {NGRAM} words, or all of their fewer words, that stands in"
        " a training example",
        "the benchmark would be asked of a model that trained on it; remove the training rows"
        " that data_rows() names",
        GRAVE,
        "prompts",
    ),
    "benchmark_item": DataKind(
        "hold the whole passage of an item of {benchmark}",
        "the benchmark would be asked of a model that trained on it; remove these rows",
        GRAVE,
    ),
}
OVERLAP, ORDER = "benchmark_overlap", {name: place for place, name in enumerate(KINDS)}
Benchmarks = Mapping[str, Sequence[str]]


def examine_data(
    examples: list[dict],
    benchmarks: Benchmarks,
    lengths: Sequence[int] | None = None,
    max_length: int | None = None,
    passages: Benchmarks | None = None,
) -> DataFrame:
    """One row per finding about training examples: finding, severity, n, share, ci_low, ci_high
    (Wilson's), sentence. No row if clean.

    - near_benchmark: cosine of TF-IDF (char_wb 3 to 5, sublinear) of a user turn and a prompt is at
    least NEAR_PROMPT. The weights come from the benchmark alone, so a row's score does not depend
    on the other rows. Measured on AILuminate's 700 demo prompts and XSTest's 450: no user turn of
    the 999 of Alpaca, 562 of DPO, 487 of KTO and 2,000 of GSM8K reaches it (the nearest 0.47, 0.39,
    0.36, 0.53), nor does a prompt of one benchmark against the other (0.49). The benchmarks' own
    prompts with filler words reach at least 0.77 and 0.59 (a tenth of their words inserted), 0.71
    and 0.54 (a fifth). Other words for the same wish are not found.
    - benchmark_overlap: share of a benchmark's prompts of which any run of NGRAM words (lower case,
    no punctuation; a Chinese, Japanese or Thai letter counts as a word), or the whole prompt where
    it is shorter, is in a turn or an answer. Brown et al. 2020 (arXiv 2005.14165, appendix C) clean
    with 13 words and measure with 8 to 13; with 13 most of XSTest's prompts (9 words in the median)
    would be found only whole. A prompt below WHOLE_TEXT words has to be all of a turn or an answer.
    - near_duplicates: more than NEAR_DUPLICATE of the SHINGLE-character runs of both are in both
    (Jaccard), over prompt and answers.
    - tokens_lost has no interval: tokens are lost by the row and not one by one.

    Args:
        examples: {"prompt": [{"role", "content"}, ...], "answer"}, of preferences {"prompt",
            "chosen", "rejected"}.
        benchmarks: the texts of the prompts of each benchmark; the held-out data can be one.
        lengths: tokens of each example, and max_length, after which training cuts them.
        passages: by benchmark those of all its items, which differ in names alone.

    Raises:
        ValueError: an example of another form, no prompts, or lengths that do not fit.
    """
    found = _hits(examples, benchmarks, lengths, max_length) | _items(examples, passages or {})
    totals = {"examples": len(examples), "preferences": sum("chosen" in one for one in examples)}
    rows = [
        _finding(name, len(hits), totals[KINDS[name].of], benchmark)
        for (name, benchmark), hits in found.items()
    ]
    if lengths is not None:
        lost = sum(max(0, length - max_length) for length in lengths)
        rows.append(_finding("tokens_lost", int(lost), int(sum(lengths))))
    for name, overlap in shared_runs(examples, benchmarks).items():
        rows.append(_finding(OVERLAP, len(overlap.prompts), len(benchmarks[name]), name))
    rows = sorted((row for row in rows if row["n"]), key=lambda row: ORDER[row["finding"]])
    types = {"n": "int64", "share": float, "ci_low": float, "ci_high": float}
    return DataFrame(rows, columns=DATA_COLUMNS).astype(types)


def data_rows(
    examples: list[dict],
    benchmarks: Benchmarks,
    lengths: Sequence[int] | None = None,
    max_length: int | None = None,
) -> DataFrame:
    """One row per example and finding: row (its number, from 0), finding, benchmark, and score
    (null where a finding has no degree).

    Score: the cosine for near_benchmark; for benchmark_overlap the largest share of a prompt's runs
    of words; for cut the tokens lost.
    """
    found = _hits(examples, benchmarks, lengths, max_length)
    for name, overlap in shared_runs(examples, benchmarks).items():
        found[OVERLAP, name] = sorted(overlap.rows.items())
    cells = [
        (row, name, benchmark, score)
        for (name, benchmark), hits in found.items()
        for row, score in hits
    ]
    cells.sort(key=lambda cell: (cell[0], ORDER[cell[1]]))
    return DataFrame(cells, columns=ROW_COLUMNS).astype({"row": "int64", "score": float})


def _items(examples: list[dict], passages: Benchmarks) -> dict[tuple[str, str | None], list[Hit]]:
    """The rows that hold a passage of a benchmark's items."""
    return {
        ("benchmark_item", name): rows for name, rows in whole_texts(examples, passages).items()
    }


def _finding(name: str, n: int, total: int, benchmark: str | None = None) -> dict:
    kind, share = KINDS[name], n / total if total else np.nan
    low, high, interval = np.nan, np.nan, ""
    if name != "tokens_lost":
        low, high = map(float, wilson(n, total))
        interval = (
            "" if np.isnan(low) else f", {100 * CONFIDENCE:g} % interval {low:.2%} to {high:.2%}"
        )
    what = kind.what.format(benchmark=plain_sentence(str(benchmark)))
    text = f"{n:,} of {total:,} {kind.of} ({share:.2%}{interval}) {what}: {kind.then}"
    return dict(
        zip(
            DATA_COLUMNS,
            (name, kind.severity[share > OVER], n, share, low, high, text),
            strict=True,
        )
    )


def _check(
    examples: list[dict],
    benchmarks: Benchmarks,
    lengths: Sequence[int] | None,
    max_length: int | None,
) -> None:
    for row, example in enumerate(examples):
        if not _is_example(example):
            raise ValueError(
                f"example {row} is not of the form prompt (messages of role and content) with"
                " answer, or with chosen and rejected"
            )
    for name, texts in benchmarks.items():
        if isinstance(texts, str) or not len(texts) or not _are_texts(texts):
            raise ValueError(
                f"benchmark {name!r} has no prompts, or some that are no text; give the list of its"
                " prompts' texts"
            )
    if (lengths is None) != (max_length is None):
        raise ValueError(
            "lengths and max_length say how much is cut only together; give both or neither"
        )
    if lengths is not None and len(lengths) != len(examples):
        raise ValueError(
            f"{len(lengths)} lengths for {len(examples)} examples; give the tokens of each example"
        )


def _are_texts(values: Sequence) -> bool:
    return all(isinstance(value, str) for value in values)


def _is_example(example: dict) -> bool:
    keys, turns = (
        ("answer",) if "answer" in example else ("chosen", "rejected"),
        example.get("prompt"),
    )
    return (
        isinstance(turns, list)
        and _are_texts([example.get(key) for key in keys])
        and all(isinstance(turn, dict) for turn in turns)
        and _are_texts([turn.get(key) for turn in turns for key in ("role", "content")])
    )


def _hits(
    examples: list[dict],
    benchmarks: Benchmarks,
    lengths: Sequence[int] | None,
    max_length: int | None,
) -> dict[tuple[str, str | None], list[Hit]]:
    """The rows of each finding that is about rows."""
    _check(examples, benchmarks, lengths, max_length)
    found = {name: _where(examples, is_so) for name, is_so in OF_ONE_ROW.items()}
    found |= _refusals(examples) | duplicate_rows(examples)
    if lengths is not None:
        rows = enumerate(lengths)
        found["cut"] = [(row, float(n - max_length)) for row, n in rows if n > max_length]
    near = near_prompts(examples, benchmarks) if examples else {}
    return {(name, None): hits for name, hits in found.items()} | {
        ("near_benchmark", name): hits for name, hits in near.items()
    }


def _where(examples: list[dict], is_so: Callable[[dict], bool]) -> list[Hit]:
    return [(row, None) for row, example in enumerate(examples) if is_so(example)]


# ---- findings about single rows
def _is_empty(example: dict) -> bool:
    return not example["prompt"] or not all(text.strip() for text in texts_in(example))


def equal_answers(example: dict) -> bool:
    """Whether an example is a preference whose two answers are the same, white space at the ends
    apart.
    """
    return "chosen" in example and example["chosen"].strip() == example["rejected"].strip()


def _is_out_of_order(example: dict) -> bool:
    roles = [turn["role"] for turn in example["prompt"]]
    roles = roles[1:] if roles[:1] == ["system"] else roles
    wanted = [("user", "assistant")[i % 2] for i in range(len(roles))]
    return len(roles) % 2 == 0 or roles != wanted


def _is_one_word(example: dict) -> bool:
    answer = answers_in(example)[0]
    return bool(answer.strip()) and len(words_of(answer)) <= 1


def _repeats_prompt(example: dict) -> bool:
    """Whether the answer begins with the last user turn; two words of it may be returned."""
    asked = words_of(asked_in(example)[-1]) if asked_in(example) else []
    return len(asked) > 2 and words_of(answers_in(example)[0])[: len(asked)] == asked


def _is_multiple_choice(example: dict) -> bool:
    """Whether a turn offers A, B and C alone, one of which begins as BBQ's unknown options do."""
    return any(_has_unknown_of_three(text) for text in asked_in(example))


def _has_unknown_of_three(text: str) -> bool:
    pieces = OPTION.split(text.replace("’", "'"))
    labels, options = [label.upper() for label in pieces[1::2]], pieces[2::2]
    return labels[-3:] == ["A", "B", "C"] and any(
        re.match(rf"{re.escape(form)}\b", option.strip().lower())
        for option in options[-3:]
        for form in UNKNOWN_FORMS
    )


OF_ONE_ROW = {
    "empty": _is_empty,
    "turn_order": _is_out_of_order,
    "equal_answers": equal_answers,
    "one_word": _is_one_word,
    "repeated_prompt": _repeats_prompt,
    "multiple_choice": _is_multiple_choice,
}


def _refusals(examples: list[dict]) -> dict[str, list[Hit]]:
    """Rows whose answers decline; an empty answer (None) declines nothing."""
    first = [one is True for one in is_refusal([answers_in(example)[0] for example in examples])]
    pairs = [row for row, example in enumerate(examples) if "chosen" in example]
    declined = is_refusal([examples[row]["rejected"] for row in pairs])
    second = {row: one is True for row, one in zip(pairs, declined, strict=True)}
    said = [row for row in pairs if all(text.strip() for text in answers_in(examples[row]))]
    rows = {
        "refusals": [row for row, declines in enumerate(first) if declines],
        "refusals_rejected": [row for row in pairs if second[row]],
        "refusal_preferred": [row for row in said if first[row] and not second[row]],
        "refusal_dispreferred": [row for row in said if second[row] and not first[row]],
    }
    return {name: [(row, None) for row in found] for name, found in rows.items()}
