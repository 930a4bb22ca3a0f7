"""What a study costs: operations by stage, and from measured rates hours; memory and disk.

The model of cost is small. A stage of a variant takes `fixed` seconds, `step` seconds an optimiser
step, and its arithmetic divided by the measured rate of that kind of work: 4 operations a weight
and token of training (2 forward, 2 backward to the activations: the base's weights get no
gradient), 2 of reading, 2 of writing, 4 x layers x width x length of attention besides. Where an
amount is not known beforehand (tokens of a set that is not there), we take an upper bound.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import pandas as pd

from driftbook.benchmarks.data import training_examples
from driftbook.benchmarks.format import PROMPT_TOKENS
from driftbook.benchmarks.formats import FORMATS
from driftbook.benchmarks.utility import REFUSALS
from driftbook.study import sources
from driftbook.study.files import OUTPUTS, ROOT, read_json
from driftbook.study.gguf_files import TABLE, Header, read_header
from driftbook.study.methods import PEFT_METHODS
from driftbook.study.reading import csv_rows
from driftbook.study.sections import Base, Benchmark, Judge, Rater, Source, TrainingData
from driftbook.study.study_file import Study
from driftbook.study.variants import Variant

MEASURED = OUTPUTS / "costs.json"  # of this machine, by `make calibrate`
PUBLISHED = ROOT / "outputs" / "published" / "peft_results" / "tables"
PEFT_WEIGHTS = 2.8e9  # of Llama-3.2-3B without its embeddings
PEFT_TOKENS = 4_198_051  # "train total tokens" in each of PEFT's result files
CHARACTERS = 4.0  # a token, of English text
VERDICT_TOKENS = 200  # of a judge's own prompt
BEGINNING_TOKENS = 3 * len(REFUSALS)  # of the beginnings of a refusal, behind one prompt
# On disk: a row of the miniature's runs, the rest of a run without its adapter, and a character of
# English answers (parquet, zstd).
BYTES = {"verdict": 42, "answer": 37, "run": 27_000, "character": 0.41}
WEIGHT_BYTES = {None: {"float32": 4, "bfloat16": 2}, "int8": 1.1, "nf4": 0.56}
COLUMNS = ["base_model", "stage", "run_id", "steps", "kind", "operations"]


# ---- sizes
@dataclass(frozen=True)
class Size:
    """What a model's arithmetic and memory follow from: weights in its layers, of its embeddings
    and head, layers, width, key/value width, vocabulary.
    """

    body: float
    embeddings: float
    layers: int
    width: int
    kv_width: int
    vocabulary: int
    known: bool = True  # read from its configuration; else guessed from its name

    @property
    def weights(self) -> float:
        return self.body + self.embeddings


BERT = Size(8.5e7, 2.4e7, 12, 768, 768, 30_522, known=False)  # most classifiers are of this size


def size_of(config: dict) -> Size:
    """The size of a decoder (Llama's layers) from its config.json."""
    config = config.get("text_config", config)
    width, layers, vocabulary = (
        config[name] for name in ("hidden_size", "num_hidden_layers", "vocab_size")
    )
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or width // heads
    kv = (config.get("num_key_value_heads") or heads) * head
    attention = 2 * width * heads * head + 2 * width * kv
    body = float(layers * (attention + 3 * width * config["intermediate_size"]))
    tied = config.get("tie_word_embeddings", config.get("model_type", "").startswith("gemma"))
    return Size(body, vocabulary * width * (1.0 if tied else 2.0), layers, width, kv, vocabulary)


def size_of_gguf(header: Header) -> Size:
    """The size of a model from its GGUF file's header, all its weights counted."""
    rows, width = header.tensors[TABLE][0]
    heads = header.own("attention.head_count", 1)
    kv_heads = header.own("attention.head_count_kv", heads)
    kv_heads = max(kv_heads) if isinstance(kv_heads, list) else kv_heads
    kv = kv_heads * header.own("attention.key_length", width // heads)
    tables = [TABLE, *({"output.weight"} & set(header.tensors))]
    embeddings = sum(prod(header.tensors[name][0]) for name in tables)
    body, layers = header.n_weights - embeddings, header.own("block_count", 1)
    return Size(float(body), float(embeddings), layers, width, kv, rows)


def is_made_here(source: Source) -> bool:
    """Whether notebook 01 makes a model."""
    return source.local is None and source.source.partition(":")[0] in ("miniature", "random")


def size(source: Base | Judge | Rater, study: Study) -> Size:
    """The size of a model: from its configuration or GGUF file where it is here or cached; else
    from the billions in its name, as a Llama of that size.
    """
    from huggingface_hub import try_to_load_from_cache

    kind, _, name = source.source.partition(":")
    if kind == "twin" and source.local is None:
        return size(study.bases[study.twins[name].of], study)
    try:
        if file := sources.gguf_file(source, fetch=False):
            return size_of_gguf(read_header(file))
        if source.local is not None or is_made_here(source):
            found = Path(sources.locate(source, study), "config.json")
        else:
            found = try_to_load_from_cache(source.source, "config.json", revision=source.revision)
        return size_of(json.loads(Path(found).read_text()))
    except (ValueError, OSError, TypeError, KeyError):
        is_classifier = getattr(source, "format", None) == "classifier"
        return BERT if is_classifier else guessed_size(source.source)


def guessed_size(name: str) -> Size:
    """The size of a model by the billions or millions in its name; 8 billion, as of most judges,
    where it names none.
    """
    if name.startswith(("miniature:", "random:")):
        return Size(3e5, 1e5, 2, 96, 48, 500, known=False)
    billion = re.search(r"(\d+(?:\.\d+)?)\s*[bB](?![a-z])", name)
    million = re.search(r"(\d+)\s*[mM](?![a-zA-Z])", name)
    eighths = (float(billion[1]) if billion else float(million[1]) / 1000 if million else 8.0) / 8
    layers, width, kv = (round(full * eighths ** (1 / 3)) for full in (32, 4096, 1024))
    return Size(7e9 * eighths, 1e9 * eighths, layers, width, kv, 128_000, known=False)


# ---- rates
@dataclass(frozen=True)
class Rates:
    """Measured rates of a machine: arithmetic a second by kind of work (train by method, dpo, read,
    write), fixed seconds a variant, seconds a step.
    """

    name: str
    flops: dict[str, float]
    fixed: float
    step: float
    how: str

    def of(self, kind: str) -> float:
        """The rate of a kind of work; of a method that was not measured that of LoRA."""
        word = kind.partition(" ")[0]
        return self.flops.get(kind) or self.flops.get(word) or self.flops[f"{word} lora"]


def machines() -> dict[str, Callable[[], Rates]]:
    """The machines whose rates are known, by name: this one where it was measured, and the GPU of
    PEFT's published runs.
    """
    known = {"here": (MEASURED, _here), "L40S": (PUBLISHED / "runs.parquet", published_rates)}
    return {name: rates for name, (file, rates) in known.items() if file.is_file()}


def _here() -> Rates:
    kept = read_json(MEASURED)
    how = f"measured on this machine ({kept['when']})"
    return Rates(kept["hardware"], kept["flops"], kept["fixed"], kept["step"], how)


@cache
def published_rates() -> Rates:
    """Rates from the training seconds of PEFT's own runs of Llama-3.2-3B.

    They timed training alone. We take reading at the same rate, since it is the same arithmetic,
    and bound writing by reading the weights once for each token of a batch of 32.
    """
    variants = pd.read_parquet(PUBLISHED / "variants.parquet")
    runs = pd.read_parquet(PUBLISHED / "runs.parquet").merge(variants, on="run_id")
    seconds = runs.groupby("method").seconds.median()
    names = {**{name: name for name in PEFT_METHODS}, "bitfit": "beft"}
    flops = {
        f"train {ours}": 4 * PEFT_WEIGHTS * PEFT_TOKENS / seconds[theirs]
        for ours, theirs in names.items()
        if theirs in seconds
    }
    lora = flops["train lora"]
    how = (
        "PEFT's published runs of a 3B model on one L40S (notebook 22); reading and writing are"
        " inferred from its training"
    )
    flops |= {"dpo lora": lora, "read": lora, "write": lora / 4}
    return Rates("NVIDIA L40S", flops, 30.0, 0.0, how)


# ---- amounts
def operations(model: Size, tokens: float, each: int) -> float:
    """Of one text: its tokens through the layers and the head, and attention over its length."""
    attention = 2 * model.layers * model.width * tokens / 2
    return each * tokens * (model.body + model.vocabulary * model.width + attention)


def amounts(study: Study) -> pd.DataFrame:
    """The work by base model and stage: variants, optimiser steps, and operations by kind (train
    METHOD, dpo METHOD, read, write).
    """
    lengths, rows = {name: tokens_of(one, study)[0] for name, one in study.data.items()}, []
    for name, base in study.bases.items():
        own = size(base, study)
        asked, looks = asked_of_variant(study, own), list(_looks(study, own))
        drawn = [
            (stage, n * _drawn_share(study), *rest)
            for stage, n, *rest in asked
            if stage in ("respond", "judge")
        ]
        for variant in study.of_base(name):
            # of a base model's repetition only the drawn answers are new: the rest is in the cache
            again = variant.repetition > 1 and variant.method == "none"
            work = [
                *_making(variant, own, study, lengths, looks),
                *_scoring(drawn if again else asked),
            ]
            rows += [(name, stage, variant.run_id, *rest) for stage, *rest in work]
    return pd.DataFrame(rows, columns=COLUMNS)


def _making(
    variant: Variant, own: Size, study: Study, lengths: dict[str, float], looks: list
) -> Iterator[tuple[str, int, str, float]]:
    """Stage, steps, kind and operations of making a variant and measuring its dose."""
    if variant.dataset and not variant.is_repaired:
        yield "train", *_training(variant, own, study, lengths[variant.dataset])
        yield from (("train", 0, *look) for look in looks)
    stage, times = (
        "mitigate" if variant.is_repaired else "train",
        3 - 2 * (variant.method == "none"),
    )
    each = operations(own, lengths["heldout"], 2)
    yield stage, 0, "read dose", times * study.data["heldout"].n * each


def _scoring(asked: list[tuple]) -> Iterator[tuple[str, int, str, float]]:
    for stage, n, tokens, new, model in asked:
        yield stage, 0, f"read {stage}", n * operations(model, tokens, 2)
        yield stage, 0, "write", n * operations(model, new, 2)


def _drawn_share(study: Study) -> float:
    """The share of a study's answers that are drawn."""
    asked = (one for one in study.benchmarks.values() if FORMATS[one.format].kind == "prompts")
    counts = [(n_items(one), one.samples or 0) for one in asked]
    drawn = sum(n * samples for n, samples in counts)
    return drawn / (drawn + sum(n for n, _ in counts))


def _training(variant: Variant, own: Size, study: Study, length: float) -> tuple[int, str, float]:
    both = 2 if variant.objective == "dpo" else 1
    n_texts = variant.n_train * both * variant.epochs
    packed = study.training.packed and both == 1
    per_step = study.training.batch_size * (study.training.max_length / length if packed else 1)
    steps = max(1, round(variant.n_train * variant.epochs / per_step))
    kind = "dpo" if variant.objective == "dpo" else "train"
    return steps, f"{kind} {variant.method}", n_texts * operations(own, length, 4)


def _looks(study: Study, own: Size) -> Iterator[tuple[str, float]]:
    """What the looks at drift during one training cost together; the first judge reads them."""
    if study.drift is None:
        return
    n, new = study.drift.n * (1 + 1 / study.drift.every), study.drift.max_new_tokens
    judged = sum(
        operations(size(judge, study), PROMPT_TOKENS + VERDICT_TOKENS + new, 2)
        for judge in list(study.judges.values())[:1]
    )
    yield "write", 2 * n * operations(own, new, 2)
    yield "read looks", 2 * n * operations(own, FORMATS["bbq"].tokens, 2) + n * judged


def n_items(benchmark: Benchmark) -> float:
    """How many items a benchmark has: those of its BBQ files, the rows of a local CSV, or what the
    public set of its form holds; at most its n.
    """
    kind, local = benchmark.source.partition(":")[0], benchmark.local
    form, names = FORMATS[benchmark.format], [Path(file).stem for file in benchmark.files]
    if known := [form.file_items[name] for name in names if name in form.file_items]:
        n = sum(known)
    elif benchmark.format == "csv" and local is not None and local.is_file():
        n = len(csv_rows(local))
    else:
        n = benchmark.n or 300 if kind in ("miniature", "tests") else form.n_items
    return min(benchmark.n or n, n)


def asked_of_variant(study: Study, own: Size) -> list[tuple[str, float, float, float, Size]]:
    """Stage, items, tokens read and tokens written of an item, and the model that does it."""
    found = []
    for name, one in study.benchmarks.items():
        n, form = n_items(one), FORMATS[one.format]
        tokens, new = form.tokens, one.max_new_tokens
        in_wordings = sum(min(wording.n or n, n) for wording in one.wordings.values())
        if form.kind == "prompts":
            total, read = n * (1 + (one.samples or 0)) + in_wordings, tokens + new + VERDICT_TOKENS
            found.append(("respond", total, tokens, new, own))
            if name in study.asked_to_begin:
                found.append(("utility", n, tokens + BEGINNING_TOKENS, 0, own))
            found += [
                ("judge", total, read, 1, size(judge, study))
                for judge in study.judges.values()
                if not judge.benchmarks or name in judge.benchmarks
            ]
        elif form.kind == "items":
            total = n + 2 * min(one.permuted or 0, n) + in_wordings
            found.append(("answer", total, tokens, 0, own))
            found.append(("answer", min(one.generated or 0, n), tokens, new, own))
        else:
            found.append(("utility", n, tokens, new if form.is_written else 0, own))
    return found


def tokens_of(data: TrainingData, study: Study) -> tuple[float, bool]:
    """The mean tokens of an example, and whether they were counted: by characters in a local file,
    else at most training.max_length.
    """
    length = float(study.training.max_length)
    name = next(name for name, one in study.data.items() if one == data)
    if data.local is None and not data.source.startswith("miniature:"):
        return length, False
    try:
        examples = training_examples(name, study)[:200]
    except ValueError:
        return length, False
    texts = [
        [turn["content"] for turn in one["prompt"]]
        + [text for key, text in one.items() if key in ("answer", "chosen")]
        for one in examples
    ]
    tokens = [min(length, sum(map(len, one)) / CHARACTERS + 8 * len(one)) for one in texts]
    return sum(tokens) / len(tokens), True


# ---- hours, memory, disk
def hours(study: Study, rates: Rates) -> pd.DataFrame:
    """Hours of one device by base model and stage."""
    rows = amounts(study)
    seconds = rows.operations / rows.kind.map(rates.of)
    rows = rows.assign(seconds=seconds + rates.step * rows.steps + rates.fixed * rows.steps.gt(0))
    by_stage = rows.groupby(["base_model", "stage"], sort=False).seconds.sum() / 3600
    return by_stage.unstack("stage", fill_value=0.0)


def memory(study: Study) -> dict[str, float]:
    """GiB of the device by stage: weights, and activations or key/values of what is worked on at
    once.
    """
    # the first judge is loaded while a model trains and is looked at; a job loads all its judges
    judges = [_weight_bytes(judge, study) for judge in study.judges.values()]
    resident = 0.0 if study.drift is None else sum(judges[:1])
    # a single example at the least; more are taken as memory allows
    tokens = study.training.tokens_per_batch or study.training.max_length
    rows = []
    for base in study.bases.values():
        own, weights = size(base, study), _weight_bytes(base, study)
        activations = 34 * own.layers * own.width * tokens  # Korthikanti et al. 2022, eq. 2
        logits = 2 * own.vocabulary * min(tokens, 4096) * 4
        cached = 4 * own.layers * own.kv_width * 32 * 1024
        rows.append({"train": weights + resident + activations + logits})
        rows[-1] |= dict.fromkeys(("respond", "answer", "utility"), weights + cached)
    found = pd.DataFrame(rows).max() / 2**30
    return found.to_dict() | ({"judge": sum(judges) / 2**30} if judges else {})


def _weight_bytes(model: Base | Judge | Rater, study: Study) -> float:
    each = WEIGHT_BYTES[getattr(model, "quantization", None)]
    return size(model, study).weights * (each[model.dtype] if isinstance(each, dict) else each)


def disk(study: Study) -> dict[str, float]:
    """GB on disk: downloads of models, adapters and records, tables with text."""
    bases = [(base, size(base, study)) for base in study.bases.values()]
    fetched = [
        size(one, study)
        for one in study.models.values()
        if one.local is None and not is_made_here(one)
    ]
    fetched += [
        own
        for base, own in bases
        for one in base.checkpoints.values()
        if one.local is None and not one.source.startswith("miniature:")
    ]
    asked = asked_of_variant(study, Size(0, 0, 1, 1, 1, 1))
    responses = [(n, new) for stage, n, _, new, _ in asked if stage == "respond"]
    answers = sum(n for stage, n, *_ in asked if stage == "answer")
    rows = (
        sum(n * new for n, new in responses) * CHARACTERS * BYTES["character"]
        + sum(n for n, _ in responses) * BYTES["verdict"] * max(len(study.judges), 1)
        + answers * BYTES["answer"]
    )
    adapter = max((4 * 8 * 2 * own.layers * 2 * own.width for _, own in bases), default=0)
    # what is scored is kept in the cache as well
    runs = len(study.variants) * (BYTES["run"] + adapter + 2 * rows)
    downloads = 2 * sum(own.weights for own in fetched)
    files = [one for one in study.models.values() if sources.is_gguf(one)]
    once = {(one.source, one.local, one.dtype): size(one, study).weights for one in files}
    made = sum(n * WEIGHT_BYTES[None][dtype] for (*_, dtype), n in once.items())
    found = {"models to download": downloads, "runs, tables and cache": runs}
    found |= {"dequantised models": made} if made else {}
    return {what: size / 1e9 for what, size in found.items()}
