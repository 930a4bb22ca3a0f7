"""How long the texts of a study are: in a base model's own tokens where its tokenizer and the texts
are here, laid out as the scorer and the trainer lay them out; else as their format declares.

Texts that begin alike share what they begin with, batches are padded to their longest row, and of
a training example only the answer meets the head: a mean length times a number of items would be
wrong by a factor.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any

import numpy as np

from driftbook.benchmarks import data
from driftbook.benchmarks.format import Format
from driftbook.benchmarks.formats import FORMATS
from driftbook.study import packages, sources
from driftbook.study.reading import csv_rows
from driftbook.study.sections import Benchmark, Source
from driftbook.study.study_file import Study

SAMPLE = 300  # texts of a set that are counted; the rest is taken to be like them
CHARACTERS = 4.0  # a token, of English text
TURN = 8  # tokens of a template about a turn, where it is not here
PASS_TOKENS, CACHED_TOKENS, STEP_TOKENS = 2_048, 32_768, 1_024  # of a CPU: see scoring and steps
MINIATURE_TOKENS = 30  # of an item of the miniature
ANSWER_SHARE = 0.6  # of an example's tokens, where they are not counted


@dataclass(frozen=True)
class Amount:
    """Work on texts: tokens that go through the layers, places at which the head is computed, the
    tokens of a row, and, of what is written, tokens and the passes in which they are.
    """

    tokens: float
    places: float
    length: float
    new: float = 0.0
    passes: float = 0.0

    def times(self, factor: float) -> "Amount":
        """So many times as many rows of the same length."""
        numbers = (self.tokens, self.places, self.new, self.passes)
        tokens, places, new, passes = (one * factor for one in numbers)
        return Amount(tokens, places, self.length, new, passes)


class Lengths:
    """The amounts of a study's texts for one of its base models."""

    def __init__(self, study: Study, base_model: str):
        self.study, self.base = study, study.bases[base_model]
        self.system = self.base.system_prompt

    @cached_property
    def tokenizer(self) -> Any | None:
        """The base model's tokenizer; None where it is not here."""
        return tokenizer_here(self.base, self.study)

    # ---- training
    @cache  # noqa: B019 - a plan is short-lived
    def examples(self, name: str, both: bool) -> tuple[np.ndarray, np.ndarray] | None:
        """Tokens [n] and counted tokens [n] of training examples as they are cut, those that do not
        fit left out; of preferences (`both`) the prompt once and both answers. None where they are
        not here.
        """
        parts = self.study.together(name)
        if not all(is_here(self.study.data[one], self.study) for one in parts):
            return None
        try:
            found = data.training_examples(name, self.study)[:SAMPLE]
        except ValueError:  # said where sources are checked
            return None
        limit = self.study.training.max_length
        rows = [self._example(one, both, limit) for one in found]
        kept = [(tokens, counted) for tokens, counted in rows if counted > 0]
        tokens, counted = np.array(kept or [(limit, limit / 2)], float).T
        return tokens, counted

    def _example(self, example: dict, both: bool, limit: int) -> tuple[float, float]:
        keys = ("chosen", "rejected") if both else ("answer", "chosen")
        answers = [example[key] for key in keys if key in example]
        answers = answers if both else answers[:1]
        prompt, said = self._turns(example["prompt"], answers)
        counted = [min(n, limit - prompt) for n in said]
        return prompt + sum(counted), sum(counted) if min(counted) > 0 else 0

    def _turns(self, prompt: list[dict], answers: list[str]) -> tuple[int, list[int]]:
        if self.tokenizer is not None:
            from driftbook.models.conversations import conversation_ids

            made = [conversation_ids(self.tokenizer, prompt, answer) for answer in answers]
            return len(made[0][0]), [len(said) for _, said in made]
        size = sum(len(turn["content"]) for turn in prompt) / CHARACTERS + TURN * len(prompt)
        return round(size), [round(len(one) / CHARACTERS) + TURN for one in answers]

    def trained(self, name: str, both: bool, n: int, padded: bool) -> tuple[Amount, bool]:
        """One epoch over n examples, and whether they were counted: packed, or padded to the
        longest of a pass.
        """
        limit = float(self.study.training.max_length)
        found = self.examples(name, both)
        if found is None:
            tokens = limit * (2 - ANSWER_SHARE / 2 if both else 1) * n
            return Amount(tokens, tokens * ANSWER_SHARE, limit), False
        tokens, counted = found
        share = len(tokens) / min(SAMPLE, self.study.n_examples(name))  # that fit
        rows = _padded(tokens, self.study.training.batch_size) if padded else tokens.sum()
        factor = n * share / len(tokens)
        return Amount(float(rows), float(counted.sum()), float(tokens.mean())).times(factor), True

    def held_out(self) -> Amount:
        """All held-out answers, read once."""
        n = self.study.data["heldout"].n
        return self.trained("heldout", False, n, padded=False)[0]

    # ---- benchmarks
    def prompts(self, name: str) -> tuple[list[list[int]], int] | None:
        """Token ids of a sample of a benchmark's prompts as they are asked, and how many prompts
        there are; None where they are not here.
        """
        return _prompts(self, name)

    def n_items(self, name: str) -> float:
        """How many items a benchmark has."""
        found = self.prompts(name)
        return n_items(self.study.benchmarks[name]) if found is None else found[1]

    def written(self, name: str, new: int) -> Amount:
        """An answer of `new` tokens to each prompt of a benchmark, in the batches of a CPU."""
        found, one = self.prompts(name), self.study.benchmarks[name]
        if found is None:
            n, length = self.n_items(name), _declared(one) + 3.0 * TURN
            passes = new * np.ceil(n * (length + new) / CACHED_TOKENS)
            return Amount(n * length, n, length + new, n * new, passes)
        rows, n = found
        shared = _shared(rows)
        sizes = sorted((len(row) for row in rows), reverse=True)
        tokens, passes = float(shared), 0.0
        for batch in _batches([size + new for size in sizes], CACHED_TOKENS):
            tokens += len(batch) * (batch[0] - new - shared)
            passes += new
        length = float(np.mean(sizes)) + new
        factor = n / len(rows)
        return Amount(tokens, len(rows), length, len(rows) * new, passes).times(factor)

    def read(self, name: str, n: float | None = None, behind: float = 0.0) -> Amount:
        """Every prompt of a benchmark (or n of them), and `behind` tokens after each that are
        scored; at least the first token after it.
        """
        found, one = self.prompts(name), self.study.benchmarks[name]
        if found is None:
            length = _declared(one) + 3.0 * TURN
            return Amount(length + behind, max(1.0, behind), length).times(n or self.n_items(name))
        rows, total = found
        tokens = _read_tokens(rows) + behind * len(rows)
        length = float(np.mean([len(row) for row in rows])) + behind
        amount = Amount(tokens, max(1.0, behind) * len(rows), length)
        return amount.times((total if n is None else min(n, total)) / len(rows))

    @cache  # noqa: B019 - a plan is short-lived
    def answer_tokens(self, name: str) -> float:
        """The mean tokens of a benchmark's reference answers; where they are not here a share of
        what its form declares.
        """
        benchmark = self.study.benchmarks[name]
        if self.prompts(name) is not None:
            items = data.items(name, self.study)
            if "answer" in items:
                texts = [str(one) for one in items.answer[:SAMPLE]]
                made = [len(self.tokenizer.encode(one, add_special_tokens=False)) for one in texts]
                return float(np.mean(made)) + 1
        return ANSWER_SHARE * _declared(benchmark)


# ---- what is here
def is_here(source: Source, study: Study) -> bool:
    """Whether a source can be read without fetching or making anything."""
    kind = source.source.partition(":")[0]
    if source.local is not None:
        return source.local.exists()
    if kind in ("miniature", "random"):
        return (sources.made_folder(study, kind) / source.source.partition(":")[2]).exists()
    if kind == "twin":
        return sources.twin_folder(study, source.source.partition(":")[2]).exists()
    if kind == "package":
        return packages.shipped(source.source).path(sources.MODELS).exists()
    if kind == "github":
        return all(path.is_file() for path in github_files(source))
    return False


def github_files(source: Source) -> list:
    """Where the files of a source on GitHub are kept once they are fetched."""
    folder = sources.github_folder(source)
    return [folder / name for name in source.files] or [folder / "missing"]


def tokenizer_here(source: Source, study: Study) -> Any | None:
    """The tokenizer of a model that is here or in the hub's cache, with the study's template; None
    where it is not, or cannot be read.
    """
    try:
        if sources.is_gguf(source) or (source.local is None and ":" not in source.source):
            where, options = _cached(source)
        elif is_here(source, study):
            where, options = sources.locate(source, study), {}
        else:
            return None
        if where is None:
            return None
        from driftbook.models.loading import source_tokenizer

        return source_tokenizer(source, where, options, study)
    except Exception:  # of a dozen kinds; what is wrong with a model is said where it is checked
        return None


def _cached(source: Source) -> tuple[Any, dict]:
    """Where the loader finds a tokenizer without a download: in a GGUF file, or the hub's cache."""
    if sources.is_gguf(source):
        file = sources.gguf_file(source, fetch=False)
        return (file and file.parent), {"gguf_file": file and file.name}
    return source.source, {"revision": source.revision, "local_files_only": True}


@lru_cache(maxsize=256)
def _prompts(lengths: Lengths, name: str) -> tuple[list[list[int]], int] | None:
    study, benchmark = lengths.study, lengths.study.benchmarks[name]
    if lengths.tokenizer is None or not is_here(benchmark, study):
        return None
    from driftbook.models.conversations import ask

    try:
        texts = list(_asked_texts(name, benchmark, study))
        kept = [ask(lengths.tokenizer, text, lengths.system) for text in texts[:SAMPLE]]
    except Exception:  # of a dozen kinds; what is wrong with a set is said where it is checked
        return None
    return (kept, len(texts)) if kept else None


def _asked_texts(name: str, benchmark: Benchmark, study: Study) -> Iterator[str]:
    """What is asked of a model, in the study's own wording."""
    form = FORMATS[benchmark.format]
    if form.kind == "prompts":
        way = data.wordings(name, study)["default"]
        yield from data.worded(data.prompts(name, study), way, study).prompt
        return
    items = data.items(name, study)
    if form.kind != "items":
        yield from items[next(one for one in ("prompt", "text", "passage") if one in items)]
        return
    template = benchmark.template or form.template or "{context} {question}"
    for row in items.rename(columns={"context": "kind", "passage": "context"}).to_dict("records"):
        yield template.format(**row)


def n_items(benchmark: Benchmark) -> float:
    """How many items a benchmark has: those of its BBQ files, the rows of a local CSV, or what the
    public set of its form holds; at most its n.
    """
    kind, form = benchmark.source.partition(":")[0], FORMATS[benchmark.format]
    if known := _known_items(benchmark, form):
        n = sum(known)
    elif benchmark.format == "csv" and benchmark.local is not None and benchmark.local.is_file():
        n = len(csv_rows(benchmark.local))
    else:
        n = benchmark.n or 300 if kind in ("miniature", "tests") else form.n_items
    return min(benchmark.n or n, n)


def _declared(benchmark: Benchmark) -> float:
    """Tokens of an item by its format; the miniature's texts are shorter than real ones."""
    made_here = benchmark.source.partition(":")[0] in ("miniature", "tests")
    return MINIATURE_TOKENS if made_here else FORMATS[benchmark.format].tokens


def _known_items(benchmark: Benchmark, form: Format) -> list[int]:
    names = [file.rpartition("/")[2].removesuffix(".jsonl") for file in benchmark.files]
    return [form.file_items[name] for name in names if name in form.file_items]


# ---- the layouts of scorer and trainer
def _batches(sizes: Sequence[float], budget: int) -> Iterator[list[float]]:
    """Rows, longest first, as many together as fit a budget when padded: `Scorer._batches`."""
    left = list(sizes)
    while left:
        n = max(1, int(budget // max(left[0], 1)))
        yield left[:n]
        left = left[n:]


def _padded(tokens: np.ndarray, batch_size: int) -> float:
    """Tokens of rows that are padded to the longest of their pass, in batches as they come."""
    total = 0.0
    for first in range(0, len(tokens), batch_size):
        step = sorted(tokens[first : first + batch_size], reverse=True)
        total += sum(len(part) * part[0] for part in _batches(step, STEP_TOKENS))
    return total


def _shared(rows: list[list[int]]) -> int:
    """How many first tokens of all rows are computed once: `Scorer._common`."""
    from driftbook.models.trees import LEAST_SHARED, common_prefix

    shared = min(min(map(len, rows)) - 1, common_prefix(min(rows), max(rows)))
    return shared if shared >= LEAST_SHARED and len(rows) > 1 else 0


def _read_tokens(rows: list[list[int]]) -> float:
    """Tokens that are computed when all rows are read: what they share once, as trees, padded."""
    from driftbook.models.trees import groups

    shared = _shared(rows)
    sizes = sorted((size for _, size in groups(rows, shared)), reverse=True)
    return shared + sum(len(part) * part[0] for part in _batches(sizes, PASS_TOKENS))
