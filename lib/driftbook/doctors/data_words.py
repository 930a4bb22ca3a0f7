"""Words that training examples share with a benchmark's prompts, or with each other."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import floor

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

NEAR_PROMPT = 0.55  # cosine; examine_data says what it was chosen on
NGRAM = 8  # words
WHOLE_TEXT = 4  # words; a shorter prompt counts as found only where it is all that is said
NEAR_DUPLICATE = 0.8  # Jaccard
SHINGLE = 8  # characters
SKETCH = 64  # shingles
TURNS_AT_ONCE = 1_000
TOO_LONG = 4  # times the longest prompt: what follows cannot bring a text near one
ANSWERS = ("answer", "chosen", "rejected")
NO_SPACES = (  # letters of scripts that write no word apart: Thai, Lao, Burmese, Khmer, Kana, Han
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
    r"\U00020000-\U0003ffff"
)
WORD = re.compile(rf"[{NO_SPACES}]|[^\W_]+")
RUN = re.compile(r"\w+")
ODD = np.random.default_rng(0).integers(0, 2**63, SHINGLE, dtype=np.uint64) * np.uint64(2) + 1

Hit = tuple[int, float | None]  # a row, and how strongly


# ---- what an example says
def answers_in(example: dict) -> list[str]:
    """The answer to train on, and of preferences the rejected one after it."""
    return [example[key] for key in ANSWERS if key in example]


def asked_in(example: dict) -> list[str]:
    """The user's turns."""
    turns = example["prompt"]
    return [turn["content"] for turn in turns if turn["role"] not in ("system", "assistant")]


def texts_in(example: dict) -> list[str]:
    """All turns and answers."""
    return [turn["content"] for turn in example["prompt"]] + answers_in(example)


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def words_of(text: str) -> list[str]:
    """Words in lower case without punctuation; where a script writes none apart, its letters."""
    return WORD.findall(_folded(text))


def plain_text(text: str) -> str:
    """A text in lower case without punctuation."""
    return " ".join(RUN.findall(_folded(text)))


# ---- near a benchmark's prompt
def near_prompts(
    examples: list[dict], benchmarks: Mapping[str, Sequence[str]]
) -> dict[str, list[Hit]]:
    """The rows with a turn near a prompt of each benchmark, with the largest cosine of the row."""
    options = {"analyzer": "char_wb", "ngram_range": (3, 5), "lowercase": False, "norm": None}
    counter = HashingVectorizer(alternate_sign=False, n_features=2**20, dtype=np.float32, **options)
    prompts = {name: [plain_text(text) for text in texts] for name, texts in benchmarks.items()}
    longest = TOO_LONG * max((len(text) for texts in prompts.values() for text in texts), default=0)
    spoken: dict[str, list[int]] = defaultdict(list)  # the same turn is weighed once
    for row, example in enumerate(examples):
        for text in asked_in(example):
            spoken[plain_text(text)[:longest]].append(row)
    weighed = {name: _weighed(counter.transform(texts)) for name, texts in prompts.items()}
    best: dict[str, dict[int, float]] = {name: {} for name in benchmarks}
    turns = list(spoken)
    for start in range(0, len(turns) if weighed else 0, TURNS_AT_ONCE):
        chunk = turns[start : start + TURNS_AT_ONCE]  # few: nearly every pair shares an n-gram
        counts = counter.transform(chunk)
        for name, (weights, transposed) in weighed.items():
            cosines = (weights.transform(counts) @ transposed).max(axis=1).toarray().ravel()
            for i in np.flatnonzero(cosines >= NEAR_PROMPT):
                for row in spoken[chunk[i]]:
                    best[name][row] = max(best[name].get(row, 0.0), round(float(cosines[i]), 4))
    return {name: sorted(hits.items()) for name, hits in best.items()}


def _weighed(counts: csr_matrix) -> tuple[TfidfTransformer, csr_matrix]:
    """TF-IDF's weights from a benchmark's prompts, and the prompts as columns."""
    weights = TfidfTransformer(sublinear_tf=True).fit(counts)
    return weights, weights.transform(counts).T.tocsr()


# ---- a benchmark's words in the examples
@dataclass(frozen=True)
class Overlap:
    """The prompts found, and by row the largest share of a prompt's runs of words in it."""

    prompts: set[int]
    rows: dict[int, float]


def shared_runs(
    examples: list[dict], benchmarks: Mapping[str, Sequence[str]]
) -> dict[str, Overlap]:
    """By benchmark the prompts of which a run of NGRAM words is in an example."""
    grams = {}
    for name, texts in benchmarks.items():
        for i, words in enumerate(map(words_of, texts)):
            if words:
                grams[name, i] = set(_runs(words, min(NGRAM, len(words))))
    index: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for key, own in grams.items():
        for gram in own:
            index[gram].append(key)
    known, sizes = {word for gram in index for word in gram}, sorted({len(gram) for gram in index})
    found = {name: Overlap(set(), {}) for name in benchmarks}
    for row, example in enumerate(examples):
        there: set[tuple[str, ...]] = set()
        for text in texts_in(example):
            there.update(_known_runs(words_of(text), known, sizes, index.keys()))
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
    """The runs of words in the index; stretches of words that no prompt has are skipped first."""
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


def whole_texts(examples: list[dict], texts: Mapping[str, Sequence[str]]) -> dict[str, list[Hit]]:
    """The rows in which a text of each name stands whole, word for word: of many texts that differ
    in a few words, as BBQ's items do in their names, where a run of words is no sign of one.
    """
    found = {}
    for name, some in texts.items():
        known = {words for text in some if len(words := tuple(words_of(text))) >= WHOLE_TEXT}
        sizes = sorted({len(words) for words in known})
        said = enumerate([words_of(text) for text in texts_in(one)] for one in examples)
        found[name] = [
            (row, None)
            for row, turns in said
            if any(not known.isdisjoint(_runs(words, n)) for words in turns for n in sizes)
        ]
    return found


# ---- duplicates
def duplicate_rows(examples: list[dict]) -> dict[str, list[Hit]]:
    """Rows that repeat an earlier one, and rows that are nearly another."""
    copies: dict[tuple, list[int]] = defaultdict(list)
    for row, example in enumerate(examples):
        roles = [turn["role"] for turn in example["prompt"]]
        said = [*roles, *(key for key in ANSWERS if key in example), *texts_in(example)]
        copies[tuple(" ".join(text.casefold().split()) for text in said)].append(row)
    alike = list(copies.values())
    distinct = ["\n".join(map(plain_text, texts_in(examples[group[0]]))) for group in alike]
    near = nearly_another(distinct)
    return {
        "duplicates": sorted((row, None) for group in alike for row in group[1:]),
        "near_duplicates": sorted((row, None) for i in near for row in alike[i]),
    }


def nearly_another(texts: list[str]) -> set[int]:
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
    shingles = lru_cache(1_000)(lambda i: text_shingles(texts[i]))
    sketches, counts = [], np.zeros(2**24, np.int32)
    for i in range(len(texts)):
        sketches.append(shingles(i)[:SKETCH].copy())
        np.add.at(counts, _bucket(shingles(i)), 1)
    rarest = [_rarest(shingles(i), counts) for i in range(len(texts))]
    sizes = [len(part) for part in rarest]
    ends, owner = np.cumsum(sizes), np.repeat(np.arange(len(texts), dtype=np.int32), sizes)
    _, group, size = np.unique(np.concatenate(rarest), return_inverse=True, return_counts=True)
    members, stops = owner[np.argsort(group, kind="stable")], np.cumsum(size)

    def twin(i: int) -> int | None:
        seen = {i}
        for g in group[ends[i] - sizes[i] : ends[i]]:
            for j in members[stops[g] - size[g] : stops[g]].tolist() if size[g] > 1 else ():
                alike = j not in seen and _alike(sketches[i], sketches[j])
                if alike and jaccard_share(shingles(i), shingles(j)) > NEAR_DUPLICATE:
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


def text_shingles(text: str) -> np.ndarray:
    """The distinct runs of SHINGLE characters, each as 64 bits; a shorter text is one run."""
    raw = text.ljust(SHINGLE, "\0").encode("utf-32-le", "surrogatepass")
    codes = np.frombuffer(raw, np.uint32).astype(np.uint64)
    n = len(codes) - SHINGLE + 1
    return np.unique(sum(odd * codes[i : i + n] for i, odd in enumerate(ODD)))


def _rarest(shingles: np.ndarray, counts: np.ndarray) -> np.ndarray:
    n = len(shingles) - floor(NEAR_DUPLICATE * len(shingles))
    return shingles[np.argsort(counts[_bucket(shingles)], kind="stable")[:n]]


def jaccard_share(a: np.ndarray, b: np.ndarray) -> float:
    """How many of two texts' shingles are in both; 0 where their numbers alone forbid a twin."""
    if min(len(a), len(b)) <= NEAR_DUPLICATE * max(len(a), len(b)):
        return 0.0
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)
