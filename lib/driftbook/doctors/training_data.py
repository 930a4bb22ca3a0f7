"""What is wrong with training examples, found from their words before anything is trained; no model
is run.

An **error** means that the study could not train on the examples, or that it would train on what it
asks later. A **warning** means that it can be done, and that what it shows may not mean what it
seems to. A **note** is a number measured. No example's text is ever in a result: rows are named by
their number.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import floor

import numpy as np
from pandas import DataFrame
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

from driftbook.benchmarks.bbq import UNKNOWN_FORMS
from driftbook.benchmarks.refusals import is_refusal
from driftbook.stats.intervals import wilson

COLUMNS = ["finding", "severity", "n", "share", "ci_low", "ci_high", "sentence"]
ROW_COLUMNS = ["row", "finding", "benchmark", "score"]
OVER = 0.01  # a share above this is more than some bad rows
NEAR_PROMPT = 0.55  # cosine; what it was chosen on is told in examine
NGRAM = 8  # words
WHOLE_TEXT = (
    4  # words below which a benchmark's prompt counts as found only where it is all that is said
)
NEAR_DUPLICATE = 0.8  # Jaccard
SHINGLE = 8  # characters
SKETCH = 64  # shingles
ROWS_AT_ONCE = 1_000
TOO_LONG = 4  # times the longest prompt: what follows cannot bring a text near one

# At most OVER of the whole, and above it.
_NOTE, _NOTE_WARNING, _WARNING, _WARNING_ERROR, _ERROR = (
    ("note", "note"),
    ("note", "warning"),
    ("warning", "warning"),
    ("warning", "error"),
    ("error", "error"),
)


@dataclass(frozen=True)
class _Kind:
    """How a finding is told: what it is counted of, its severity up to and above OVER, what is so,
    and what follows from it.
    """

    of: str
    severity: tuple[str, str]
    what: str
    then: str


KINDS = {
    "empty": _Kind(
        "examples",
        _ERROR,
        "have no prompt, or say nothing in a turn or an answer",
        "the study would refuse to train on them; fill or remove these rows",
    ),
    "turn_order": _Kind(
        "examples",
        _ERROR,
        "have a prompt that is not user and assistant in turn, ending with the user (a system turn"
        " may stand first)",
        "chat templates fail on them or merge turns; put the turns in order or remove these rows",
    ),
    "one_word": _Kind(
        "examples",
        _NOTE_WARNING,
        "have an answer of at most one word",
        "training on them shortens answers, which changes refusals and verdicts for no reason of"
        " safety; check that the data is meant so",
    ),
    "repeated_prompt": _Kind(
        "examples",
        _NOTE_WARNING,
        "have an answer that begins by repeating the whole last user turn",
        "they teach the model to repeat what it is asked, which a judge may take for an unsafe"
        " answer; cut the repeated part or remove these rows",
    ),
    "refusals": _Kind(
        "examples",
        _NOTE_WARNING,
        "have an answer to train on that declines (found by English phrases)",
        "they teach refusing, so a change of safety would come from the data and not from the"
        " method alone; remove these rows or report their share",
    ),
    "refusals_rejected": _Kind(
        "preferences",
        _NOTE,
        "have a rejected answer that declines (found by English phrases)",
        "what this teaches depends on the chosen answer; read it with refusal_preferred and"
        " refusal_dispreferred",
    ),
    "refusal_preferred": _Kind(
        "preferences",
        _NOTE_WARNING,
        "choose an answer that declines over one that does not",
        "they teach refusing, so a change of safety would come from the data and not from the"
        " method alone; remove these rows or report their share",
    ),
    "refusal_dispreferred": _Kind(
        "preferences",
        _WARNING,
        "choose an answer that does not decline over one that does",
        "they unlearn refusing, so a loss of safety would come from the data and not from the"
        " method alone; remove these rows or report their share",
    ),
    "multiple_choice": _Kind(
        "examples",
        _NOTE_WARNING,
        "ask to choose from options A, B and C of which one is unknown, as BBQ does",
        "they teach the form of the bias benchmark, so its accuracy would change for no reason of"
        " bias; remove these rows or report their share",
    ),
    "duplicates": _Kind(
        "examples",
        _NOTE_WARNING,
        "repeat an earlier example, case and spaces apart",
        "they weigh more than others, and the study has fewer distinct examples than it reports;"
        " keep one of each",
    ),
    "near_duplicates": _Kind(
        "examples",
        _NOTE_WARNING,
        "are nearly another example that is not the same",
        "they weigh more than others, and the study has fewer distinct examples than it reports;"
        " keep one of each",
    ),
    "cut": _Kind(
        "examples",
        _NOTE_WARNING,
        "are longer than max_length and lose their end",
        "answers without an end teach answers without an end, and a prompt that fills max_length"
        " leaves nothing to train on; raise max_length or remove these rows",
    ),
    "tokens_lost": _Kind(
        "tokens",
        _NOTE_WARNING,
        "stand behind max_length",
        "the study would train on fewer tokens than the data has; raise max_length",
    ),
    "near_benchmark": _Kind(
        "examples",
        _WARNING,
        "have a turn whose wording is near a prompt of {benchmark}",
        "training on what the benchmark asks changes its result whatever the method does; look at"
        " these rows with rows() and remove them",
    ),
    "benchmark_overlap": _Kind(
        "prompts",
        _WARNING_ERROR,
        f"of {{benchmark}} have a run of {NGRAM} words, or all of their fewer words, that stands in"
        " a training example",
        "the benchmark would be asked of a model that trained on it; remove the training rows that"
        " rows() names",
    ),
}
_Hit = tuple[int, float | None]  # a row, and how strongly


def examine(
    examples: list[dict],
    benchmarks: Mapping[str, Sequence[str]],
    lengths: Sequence[int] | None = None,
    max_length: int | None = None,
) -> DataFrame:
    """One row per finding about training examples: finding, severity, n, share, ci_low, ci_high
    (Wilson's 95 %), sentence. None if clean.

    - near_benchmark: cosine of TF-IDF (char_wb 3 to 5, sublinear) of a user turn and a prompt is at
    least NEAR_PROMPT. The weights come from the benchmark alone, so a row's score does not depend
    on the other rows. Measured on AILuminate's 700 demo prompts and XSTest's 450: no user turn of
    the 999 of Alpaca, 562 of DPO, 487 of KTO and 2,000 of GSM8K reaches it (the nearest 0.47, 0.39,
    0.36, 0.53), nor does a prompt of one benchmark against the other (0.49). The benchmarks' own
    prompts in other case and punctuation with filler words: for a tenth of their words inserted at
    least 0.77 and 0.59, for a fifth 0.71 and 0.54, for three tenths 0.65 and 0.47 (95 % of them
    above 0.73 and 0.59). Other words for the same wish are not found.
    - benchmark_overlap: share of a benchmark's prompts of which any run of NGRAM words (lower case,
    no punctuation; a Chinese, Japanese or Thai letter counts as a word), or the whole prompt where
    it is shorter, stands in a turn or an answer. Brown et al. 2020 (arXiv 2005.14165, appendix C)
    clean with 13 words; to measure they take the 5th percentile of the examples' length, at least 8
    and at most 13. Prompts are short, 9 words (XSTest) or 24 (AILuminate) in the median: with 13
    most of XSTest's would be found only whole. A prompt below WHOLE_TEXT words has to be all of a
    turn or an answer.
    - near_duplicates: more than NEAR_DUPLICATE of the SHINGLE-character runs of both are in both
    (Jaccard), over prompt and answers.
    - tokens_lost has no interval: tokens are lost by the row and not one by one.

    Args:
        examples: {"prompt": [{"role", "content"}, ...], "answer"}, of preferences {"prompt",
            "chosen", "rejected"}.
        benchmarks: the texts of the prompts of each benchmark; the held-out data can be one.
        lengths: tokens of each example, and max_length, after which training cuts them.

    Raises:
        ValueError: an example of another form, a benchmark without prompts, or lengths that do not
            fit.
    """
    _check(examples, benchmarks, lengths, max_length)
    found = _hits(examples, benchmarks, lengths, max_length)
    totals = {
        "examples": len(examples),
        "preferences": sum("chosen" in example for example in examples),
    }
    told = [
        _finding(name, len(hits), totals[KINDS[name].of], benchmark)
        for (name, benchmark), hits in found.items()
        if KINDS[name].of in totals
    ]
    if lengths is not None:
        lost = sum(max(0, length - max_length) for length in lengths)
        told.append(_finding("tokens_lost", int(lost), int(sum(lengths))))
    for benchmark, overlap in _overlaps(examples, benchmarks).items():
        told.append(
            _finding(
                "benchmark_overlap", len(overlap.prompts), len(benchmarks[benchmark]), benchmark
            )
        )
    order = list(KINDS)
    told = sorted((row for row in told if row["n"]), key=lambda row: order.index(row["finding"]))
    return DataFrame(told, columns=COLUMNS).astype(
        {"n": "int64", "share": float, "ci_low": float, "ci_high": float}
    )


def rows(
    examples: list[dict],
    benchmarks: Mapping[str, Sequence[str]],
    lengths: Sequence[int] | None = None,
    max_length: int | None = None,
) -> DataFrame:
    """One row per example and finding: row (its number, from 0), finding, benchmark, and score
    (null where a finding has no degree).

    Score: the cosine for near_benchmark; for benchmark_overlap the largest share of a prompt's runs
    of words; for cut the tokens lost.
    """
    _check(examples, benchmarks, lengths, max_length)
    found = _hits(examples, benchmarks, lengths, max_length)
    found |= {
        ("benchmark_overlap", name): sorted(overlap.rows.items())
        for name, overlap in _overlaps(examples, benchmarks).items()
    }
    order = list(KINDS)
    cells = [
        (row, name, benchmark, score)
        for (name, benchmark), hits in found.items()
        for row, score in hits
    ]
    cells.sort(key=lambda cell: (cell[0], order.index(cell[1])))
    return DataFrame(cells, columns=ROW_COLUMNS).astype({"row": "int64", "score": float})


def _finding(name: str, n: int, total: int, benchmark: str | None = None) -> dict:
    kind, share = KINDS[name], n / total if total else np.nan
    low, high = (
        (np.nan, np.nan) if name == "tokens_lost" else (float(end) for end in wilson(n, total))
    )
    what = kind.what.format(benchmark=" ".join(str(benchmark).split()))
    part = (
        f"{n:,} of {total:,} {kind.of} ({share:.2%})"
        if np.isnan(low)
        else f"{n:,} of {total:,} {kind.of} ({share:.2%}, 95 % interval {low:.2%} to {high:.2%})"
    )
    return {
        "finding": name,
        "severity": kind.severity[share > OVER],
        "n": n,
        "share": share,
        "ci_low": low,
        "ci_high": high,
        "sentence": f"{part} {what}: {kind.then}",
    }


def _check(
    examples: list[dict],
    benchmarks: Mapping[str, Sequence[str]],
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
        if (
            isinstance(texts, str)
            or not len(texts)
            or not all(isinstance(text, str) for text in texts)
        ):
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


def _is_example(example: dict) -> bool:
    answers = [
        example.get(key) for key in (("answer",) if "answer" in example else ("chosen", "rejected"))
    ]
    turns = example.get("prompt")
    return (
        isinstance(turns, list)
        and all(isinstance(answer, str) for answer in answers)
        and all(
            isinstance(turn, dict)
            and isinstance(turn.get("role"), str)
            and isinstance(turn.get("content"), str)
            for turn in turns
        )
    )


def _hits(
    examples: list[dict],
    benchmarks: Mapping[str, Sequence[str]],
    lengths: Sequence[int] | None,
    max_length: int | None,
) -> dict[tuple[str, str | None], list[_Hit]]:
    """The rows of each finding that is about rows."""
    found = {
        "empty": _where(examples, _is_empty),
        "turn_order": _where(examples, _is_out_of_order),
        "one_word": _where(examples, _is_one_word),
        "repeated_prompt": _where(examples, _repeats_prompt),
        **_refusals(examples),
        "multiple_choice": _where(examples, _is_multiple_choice),
        **_duplicates(examples),
    }
    if lengths is not None:
        found["cut"] = [
            (row, float(length - max_length))
            for row, length in enumerate(lengths)
            if length > max_length
        ]
    near = _near(examples, benchmarks) if examples else {}
    return {(name, None): hits for name, hits in found.items()} | {
        ("near_benchmark", name): hits for name, hits in near.items()
    }


def _where(examples: list[dict], is_so: Callable[[dict], bool]) -> list[_Hit]:
    return [(row, None) for row, example in enumerate(examples) if is_so(example)]


# ---- what an example says
def _answers(example: dict) -> list[str]:
    """The answer to train on, and of preferences the rejected one after it."""
    return [example[key] for key in ("answer", "chosen", "rejected") if key in example]


def _asked(example: dict) -> list[str]:
    return [
        turn["content"] for turn in example["prompt"] if turn["role"] not in ("system", "assistant")
    ]


def _texts(example: dict) -> list[str]:
    return [turn["content"] for turn in example["prompt"]] + _answers(example)


_WORD = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|[^\W_]+"
)
_RUN = re.compile(r"\w+")


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _words(text: str) -> list[str]:
    """Words in lower case without punctuation; where a script writes none apart, its letters."""
    return _WORD.findall(_folded(text))


def _plain(text: str) -> str:
    return " ".join(_RUN.findall(_folded(text)))


# ---- findings about single rows
def _is_empty(example: dict) -> bool:
    return not example["prompt"] or not all(text.strip() for text in _texts(example))


def _is_out_of_order(example: dict) -> bool:
    roles = [turn["role"] for turn in example["prompt"]]
    roles = roles[1:] if roles[:1] == ["system"] else roles
    return len(roles) % 2 == 0 or any(
        role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)
    )


def _is_one_word(example: dict) -> bool:
    answer = _answers(example)[0]
    return bool(answer.strip()) and len(_words(answer)) <= 1


def _repeats_prompt(example: dict) -> bool:
    """Whether the answer begins with the last user turn; a greeting of two words may be returned."""
    asked = _words(_asked(example)[-1]) if _asked(example) else []
    return len(asked) > 2 and any(
        _words(answer)[: len(asked)] == asked for answer in _answers(example)[:1]
    )


_OPTION = re.compile(r"(?<!\w)\(?([A-Ha-h])\s?[.:)]\s*")


def _is_multiple_choice(example: dict) -> bool:
    """Whether a turn offers A, B and C and no more, and one of them begins as one of BBQ's unknown
    options.
    """
    return any(_has_unknown_of_three(text) for text in _asked(example))


def _has_unknown_of_three(text: str) -> bool:
    pieces = _OPTION.split(text.replace("’", "'"))
    labels, options = [label.upper() for label in pieces[1::2]], pieces[2::2]
    return labels[-3:] == ["A", "B", "C"] and any(
        re.match(rf"{re.escape(form)}\b", option.strip().lower())
        for option in options[-3:]
        for form in UNKNOWN_FORMS
    )


def _refusals(examples: list[dict]) -> dict[str, list[_Hit]]:
    first = is_refusal([_answers(example)[0] for example in examples]) == True  # noqa: E712  (None, of an empty answer, is none)
    pairs = [row for row, example in enumerate(examples) if "chosen" in example]
    second = dict(
        zip(pairs, is_refusal([examples[row]["rejected"] for row in pairs]) == True, strict=True)
    )  # noqa: E712
    said = [row for row in pairs if all(text.strip() for text in _answers(examples[row]))]
    return {
        "refusals": [(int(row), None) for row in np.flatnonzero(first)],
        "refusals_rejected": [(row, None) for row in pairs if second[row]],
        "refusal_preferred": [(row, None) for row in said if first[row] and not second[row]],
        "refusal_dispreferred": [(row, None) for row in said if second[row] and not first[row]],
    }


# ---- near a benchmark's prompt
def _near(examples: list[dict], benchmarks: Mapping[str, Sequence[str]]) -> dict[str, list[_Hit]]:
    """The rows with a turn near a prompt of each benchmark, with the largest cosine of the row."""
    counter = HashingVectorizer(
        analyzer="char_wb",
        ngram_range=(3, 5),
        lowercase=False,
        norm=None,
        alternate_sign=False,
        n_features=2**20,
        dtype=np.float32,
    )
    prompts = {name: [_plain(text) for text in texts] for name, texts in benchmarks.items()}
    longest = TOO_LONG * max((len(text) for texts in prompts.values() for text in texts), default=0)
    spoken: dict[str, list[int]] = defaultdict(list)  # the same turn is weighed once
    for row, example in enumerate(examples):
        for text in _asked(example):
            spoken[_plain(text)[:longest]].append(row)
    weighed = {name: _weighed(counter.transform(texts)) for name, texts in prompts.items()}
    best: dict[str, dict[int, float]] = {name: {} for name in benchmarks}
    turns = list(spoken)
    for start in range(0, len(turns) if weighed else 0, ROWS_AT_ONCE):
        chunk = turns[start : start + ROWS_AT_ONCE]
        counts = counter.transform(chunk)
        for name, (weights, transposed) in weighed.items():
            cosines = _largest(weights.transform(counts), transposed)
            for i in np.flatnonzero(cosines >= NEAR_PROMPT):
                for row in spoken[chunk[i]]:
                    best[name][row] = max(best[name].get(row, 0.0), round(float(cosines[i]), 4))
    return {name: sorted(hits.items()) for name, hits in best.items()}


def _weighed(counts: csr_matrix) -> tuple[TfidfTransformer, csr_matrix]:
    """TF-IDF's weights from a benchmark's prompts, and the prompts as columns."""
    weights = TfidfTransformer(sublinear_tf=True).fit(counts)
    return weights, weights.transform(counts).T.tocsr()


def _largest(turns: csr_matrix, prompts: csr_matrix) -> np.ndarray:
    """The largest cosine of each turn with any prompt; few turns at once, since nearly every pair
    shares an n-gram.
    """
    return (turns @ prompts).max(axis=1).toarray().ravel()


# ---- a benchmark's words in the examples
@dataclass(frozen=True)
class _Overlap:
    """The prompts found, and by row the largest share of a prompt's runs of words that stands in
    it.
    """

    prompts: set[int]
    rows: dict[int, float]


def _overlaps(examples: list[dict], benchmarks: Mapping[str, Sequence[str]]) -> dict[str, _Overlap]:
    prompts = {
        (name, i): _words(text)
        for name, texts in benchmarks.items()
        for i, text in enumerate(texts)
    }
    grams = {
        key: set(_runs(words, min(NGRAM, len(words)))) for key, words in prompts.items() if words
    }
    index: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for key, own in grams.items():
        for gram in own:
            index[gram].append(key)
    known, sizes = {word for gram in index for word in gram}, sorted({len(gram) for gram in index})
    found = {name: _Overlap(set(), {}) for name in benchmarks}
    for row, example in enumerate(examples):
        there = {
            gram
            for text in _texts(example)
            for gram in _known_runs(_words(text), known, sizes, index.keys())
        }
        times = Counter(key for gram in there for key in index[gram])
        for (name, i), n in times.items():
            found[name].prompts.add(i)
            found[name].rows[row] = max(found[name].rows.get(row, 0.0), n / len(grams[name, i]))
    return found


def _runs(words: list[str], n: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(n)), strict=False)


def _known_runs(
    words: list[str], known: set[str], sizes: list[int], index: Iterable
) -> Iterator[tuple[str, ...]]:
    """The runs of words in the index; words that no prompt has are skipped first, since most text
    is not of the benchmark.
    """
    if len(words) < WHOLE_TEXT and tuple(words) in index:
        yield tuple(words)
    stretch: list[str] = []
    for word in [*words, None]:
        if word in known:
            stretch.append(word)
        elif stretch:
            for n in sizes:
                if WHOLE_TEXT <= n <= len(stretch):
                    yield from index & set(_runs(stretch, n))
            stretch = []


# ---- duplicates
def _duplicates(examples: list[dict]) -> dict[str, list[_Hit]]:
    """Rows that repeat an earlier one, and rows that are nearly another."""
    copies: dict[tuple, list[int]] = defaultdict(list)
    for row, example in enumerate(examples):
        copies[
            tuple(
                " ".join(text.casefold().split()) for text in (*_roles(example), *_texts(example))
            )
        ].append(row)
    alike = list(copies.values())
    near = _nearly_another(["\n".join(map(_plain, _texts(examples[group[0]]))) for group in alike])
    return {
        "duplicates": sorted((row, None) for group in alike for row in group[1:]),
        "near_duplicates": sorted((row, None) for i in near for row in alike[i]),
    }


def _roles(example: dict) -> tuple[str, ...]:
    return (
        *(turn["role"] for turn in example["prompt"]),
        *(key for key in ("answer", "chosen", "rejected") if key in example),
    )


def _nearly_another(texts: list[str]) -> set[int]:
    """Which texts have a Jaccard similarity above NEAR_DUPLICATE with another one.

    Two such texts share one of their rarest shingles, the first 1 - NEAR_DUPLICATE of them (Bayardo
    et al. 2007, Scaling up all pairs similarity search), so that only texts which share one of
    these are compared. Rarity is a count by the hash's first bits: any order gives the same answer,
    a good one sooner. Of these, pairs whose SKETCH smallest hashes are not half the same are passed
    over: these are a sample of all, and for a pair above NEAR_DUPLICATE fewer than half are the
    same less than once in 10^7.
    """
    if not texts:
        return set()
    shingles = lru_cache(1_000)(lambda i: _shingles(texts[i]))
    sketches, counts = [], np.zeros(2**24, np.int32)
    for i in range(len(texts)):
        sketches.append(shingles(i)[:SKETCH].copy())
        np.add.at(counts, _bucket(shingles(i)), 1)
    rarest = [_rarest(shingles(i), counts) for i in range(len(texts))]
    ends = np.cumsum([len(part) for part in rarest])
    owner = np.repeat(np.arange(len(texts), dtype=np.int32), [len(part) for part in rarest])
    _, group, size = np.unique(np.concatenate(rarest), return_inverse=True, return_counts=True)
    members, stops = owner[np.argsort(group, kind="stable")], np.cumsum(size)

    def twin(i: int) -> int | None:
        seen = {i}
        for g in group[ends[i] - len(rarest[i]) : ends[i]]:
            for j in members[stops[g] - size[g] : stops[g]].tolist() if size[g] > 1 else ():
                if (
                    j not in seen
                    and _alike(sketches[i], sketches[j])
                    and _jaccard(shingles(i), shingles(j)) > NEAR_DUPLICATE
                ):
                    return j
                seen.add(j)
        return None

    near: set[int] = set()
    for i in range(len(texts)):
        if i not in near and (other := twin(i)) is not None:
            near |= {i, other}
    return near


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    both = np.sort(np.concatenate([a, b]))
    return 2 * np.count_nonzero(both[1:] == both[:-1]) >= min(len(a), len(b))


def _bucket(shingles: np.ndarray) -> np.ndarray:
    return (shingles >> np.uint64(40)).astype(np.int64)


_ODD = np.random.default_rng(0).integers(0, 2**63, SHINGLE, dtype=np.uint64) * np.uint64(
    2
) + np.uint64(1)


def _shingles(text: str) -> np.ndarray:
    """The distinct runs of SHINGLE characters, each as 64 bits; a shorter text is one run."""
    codes = np.frombuffer(
        text.ljust(SHINGLE, "\0").encode("utf-32-le", "surrogatepass"), np.uint32
    ).astype(np.uint64)
    n = len(codes) - SHINGLE + 1
    return np.unique(sum(odd * codes[i : i + n] for i, odd in enumerate(_ODD)))


def _rarest(shingles: np.ndarray, counts: np.ndarray) -> np.ndarray:
    n = len(shingles) - floor(NEAR_DUPLICATE * len(shingles))
    return shingles[np.argsort(counts[_bucket(shingles)], kind="stable")[:n]]


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    if min(len(a), len(b)) <= NEAR_DUPLICATE * max(len(a), len(b)):
        return 0.0
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)
