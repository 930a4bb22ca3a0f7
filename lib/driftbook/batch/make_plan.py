"""`make plan`: what a study is, what it needs and what it will cost, before any work; from rates
that were measured.

The model of cost is small. A stage of a variant takes `fixed` seconds, `step` seconds an optimiser
step, and its arithmetic divided by the measured rate of that kind of work: 4 operations a weight
and token of training (2 forward, 2 backward to the activations: the base's weights get no
gradient), 2 of reading, 2 of writing, 4 x layers x width x length of attention besides. What cannot
be known beforehand (tokens of a set that is not there) is bounded, and said to be.
"""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd

from driftbook.batch import keys
from driftbook.benchmarks.format import PROMPT_TOKENS
from driftbook.benchmarks.formats import FORMATS
from driftbook.study import access
from driftbook.study.files import OUTPUTS, ROOT, read_json
from driftbook.study.methods import PEFT_METHODS
from driftbook.study.sections import (
    PROMPT_FORMATS,
    Base,
    Benchmark,
    Judge,
    Rater,
    Source,
    TrainingData,
)
from driftbook.study.study_file import Study, find, load
from driftbook.study.variants import Variant

MEASURED = OUTPUTS / "costs.json"  # of this machine, by `make bench` or `calibrate`
PUBLISHED = ROOT / "outputs" / "published" / "peft_results" / "tables"
PEFT_WEIGHTS, PEFT_TOKENS = (
    2.8e9,
    4_198_051,
)  # of Llama-3.2-3B without its embeddings; "train total tokens" in each of PEFT's result files
CHARACTERS = 4.0  # a token, of English text
# On disk: a row of the miniature's runs, the rest of a run without its adapter, and a character of
# English answers (parquet, zstd).
BYTES = {"verdict": 42, "answer": 37, "run": 27_000, "character": 0.41}
WEIGHT_BYTES = {None: {"float32": 4, "bfloat16": 2}, "int8": 1.1, "nf4": 0.56}


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


def size_of(config: dict) -> Size:
    """The size of a decoder (Llama's layers) from its config.json."""
    config = config.get("text_config", config)
    width, layers, heads = (
        config["hidden_size"],
        config["num_hidden_layers"],
        config["num_attention_heads"],
    )
    head = config.get("head_dim") or width // heads
    kv = (config.get("num_key_value_heads") or heads) * head
    body = layers * (
        2 * width * heads * head + 2 * width * kv + 3 * width * config["intermediate_size"]
    )
    tied = config.get("tie_word_embeddings", config.get("model_type", "").startswith("gemma"))
    return Size(
        float(body),
        config["vocab_size"] * width * (1.0 if tied else 2.0),
        layers,
        width,
        kv,
        config["vocab_size"],
    )


BERT = Size(
    8.5e7, 2.4e7, 12, 768, 768, 30_522, known=False
)  # of BERT's base form, as most classifiers are


def size(source: Base | Judge | Rater, study: Study) -> Size:
    """The size of a model: from its configuration where it is here or cached; else from the
    billions in its name, as a Llama of that size.
    """
    from huggingface_hub import try_to_load_from_cache

    from driftbook.study import sources as study_sources

    kind = source.source.partition(":")[0]
    try:
        path = (
            study_sources.locate(source, study)
            if source.local is not None or kind in ("miniature", "random")
            else None
        )
        found = (
            Path(path, "config.json")
            if path
            else try_to_load_from_cache(source.source, "config.json", revision=source.revision)
        )
        return size_of(json.loads(Path(found).read_text()))
    except (ValueError, OSError, TypeError, KeyError):
        return BERT if getattr(source, "format", None) == "classifier" else _guessed(source.source)


def _guessed(name: str) -> Size:
    if name.startswith(("miniature:", "random:")):
        return Size(3e5, 1e5, 2, 96, 48, 500, known=False)
    match = re.search(r"(\d+(?:\.\d+)?)\s*[bB](?![a-z])", name)
    million = re.search(r"(\d+)\s*[mM](?![a-zA-Z])", name)
    billions = (
        float(match[1]) if match else float(million[1]) / 1000 if million else 8.0
    )  # the size of most judges
    scale = (billions / 8) ** (1 / 3)
    return Size(
        7e9 * billions / 8,
        1e9 * billions / 8,
        round(32 * scale),
        round(4096 * scale),
        round(1024 * scale),
        128_000,
        known=False,
    )


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
    known: dict[str, Callable[[], Rates]] = {}
    if MEASURED.is_file():
        known["here"] = _here
    if (PUBLISHED / "runs.parquet").is_file():
        known["L40S"] = _l40s
    return known


def _here() -> Rates:
    kept = read_json(MEASURED)
    return Rates(
        kept["hardware"],
        kept["flops"],
        kept["fixed"],
        kept["step"],
        f"measured on this machine ({kept['when']})",
    )


@cache
def _l40s() -> Rates:
    """From the training seconds of PEFT's own runs of Llama-3.2-3B. They timed training alone:
    reading is taken at the same rate, since it is the same arithmetic; writing is bounded by
    reading the weights once for each token of a batch of 32, at the rate at which training read
    them."""
    runs = pd.read_parquet(PUBLISHED / "runs.parquet").merge(
        pd.read_parquet(PUBLISHED / "variants.parquet"), on="run_id"
    )
    flops = {
        f"train {ours}": (
            4 * PEFT_WEIGHTS * PEFT_TOKENS / runs.seconds[runs.method.eq(theirs)].median()
        )
        for ours, theirs in {**{name: name for name in PEFT_METHODS}, "bitfit": "beft"}.items()
        if runs.method.eq(theirs).any()
    }
    flops |= {
        "dpo lora": flops["train lora"],
        "read": flops["train lora"],
        "write": flops["train lora"] / 4,
    }
    return Rates(
        "NVIDIA L40S",
        flops,
        30.0,
        0.0,
        "PEFT's published runs of a 3B model on one L40S (notebook 22); reading and writing are"
        " inferred from its training",
    )


# ---- amounts
def amounts(study: Study) -> pd.DataFrame:
    """The work by base model and stage: variants, optimiser steps, and operations by kind (train
    METHOD, dpo METHOD, read, write).
    """
    rows, lengths = [], {name: tokens_of(one, study)[0] for name, one in study.data.items()}
    for name, base in study.bases.items():
        own = size(base, study)
        asked = _asked(study, own)
        for variant in study.of_base(name):
            if variant.dataset and not variant.is_repaired:
                rows.append(
                    (
                        name,
                        "train",
                        variant.run_id,
                        *_training(variant, own, study, lengths[variant.dataset]),
                    )
                )
                rows += [(name, "train", variant.run_id, 0, *work) for work in _looks(study, own)]
            rows.append(
                (
                    name,
                    "mitigate" if variant.is_repaired else "train",
                    variant.run_id,
                    0,
                    "read dose",
                    (1 if variant.method == "none" else 3)
                    * study.data["heldout"].n
                    * _operations(own, lengths["heldout"], 2),
                )
            )
            if (
                variant.repetition > 1 and variant.method == "none"
            ):  # only its drawn answers are its own: the rest is in the cache
                asked_now = [
                    (stage, n * _drawn_share(study), *rest)
                    for stage, n, *rest in asked
                    if stage in ("respond", "judge")
                ]
            else:
                asked_now = asked
            for stage, prompts, tokens, new, model in asked_now:
                rows.append(
                    (
                        name,
                        stage,
                        variant.run_id,
                        0,
                        f"read {stage}",
                        prompts * _operations(model, tokens, 2),
                    )
                )
                rows.append(
                    (name, stage, variant.run_id, 0, "write", prompts * _operations(model, new, 2))
                )
    return pd.DataFrame(
        rows, columns=["base_model", "stage", "run_id", "steps", "kind", "operations"]
    )


def _drawn_share(study: Study) -> float:
    """The share of a study's answers that are drawn."""
    counts = [
        (_count(one), one.samples or 0)
        for one in study.benchmarks.values()
        if one.format in PROMPT_FORMATS
    ]
    return sum(n * samples for n, samples in counts) / sum(
        n * (1 + samples) for n, samples in counts
    )


def _training(variant: Variant, own: Size, study: Study, length: float) -> tuple[int, str, float]:
    both = 2 if variant.objective == "dpo" else 1
    n_tokens = variant.n_train * length * both * variant.epochs
    per_step = study.training.batch_size * (
        study.training.max_length / length if study.training.packed and both == 1 else 1
    )
    steps = max(1, round(variant.n_train * variant.epochs / per_step))
    kind = "dpo" if variant.objective == "dpo" else "train"
    return steps, f"{kind} {variant.method}", n_tokens / length * _operations(own, length, 4)


def _looks(study: Study, own: Size) -> list[tuple[str, float]]:
    """What a look at drift while training costs, all looks of a variant together; the answers are
    judged by the first judge.
    """
    if study.drift is None:
        return []
    n, judge = (
        study.drift.n * (1 + 1 / study.drift.every),
        size(next(iter(study.judges.values())), study),
    )
    written = 2 * n * _operations(own, study.drift.max_new_tokens, 2)
    return [
        ("write", written),
        (
            "read looks",
            2 * n * _operations(own, FORMATS["bbq"].tokens, 2)
            + n * _operations(judge, PROMPT_TOKENS + 200 + study.drift.max_new_tokens, 2),
        ),
    ]


def _operations(model: Size, tokens: float, each: int) -> float:
    """Of one text: its tokens through the layers and the head, and attention over its length."""
    return (
        each
        * tokens
        * (
            model.body
            + model.vocabulary * model.width
            + 2 * model.layers * model.width * tokens / 2
        )
    )


def _count(benchmark: Benchmark) -> float:
    """How many items a benchmark has: those of its BBQ files, the rows of a local CSV, or what the
    public set of its form holds; at most its n.
    """
    kind, local = benchmark.source.partition(":")[0], benchmark.local
    form, names = FORMATS[benchmark.format], [Path(file).stem for file in benchmark.files]
    known = [form.file_items[name] for name in names if name in form.file_items]
    if known:
        n = sum(known)
    elif benchmark.format == "csv" and local is not None and local.is_file():
        with local.open(newline="", encoding="utf-8-sig") as file:
            n = sum(1 for _ in csv.DictReader(file))
    else:
        n = benchmark.n or 300 if kind in ("miniature", "tests") else form.n_items
    return min(benchmark.n or n, n)


def _asked(study: Study, own: Size) -> list[tuple[str, float, float, float, Size]]:
    """Per variant: stage, items, tokens read and tokens written of an item, and the model that does
    it.
    """
    found = []
    for name, one in study.benchmarks.items():
        n, form = _count(one), FORMATS[one.format]
        if form.kind == "prompts":
            times = (
                1
                + (one.samples or 0)
                + sum(min(1.0, (wording.n or n) / n) for wording in one.wordings.values())
            )
            found.append(("respond", n * times, form.tokens, one.max_new_tokens, own))
            found += [
                ("judge", n * times, form.tokens + one.max_new_tokens + 200, 1, size(judge, study))
                for judge in study.judges.values()
                if not judge.benchmarks or name in judge.benchmarks
            ]
        elif form.kind == "items":
            more = 2 * min(one.permuted or 0, n) + sum(
                min(wording.n or n, n) for wording in one.wordings.values()
            )
            found.append(("answer", n + more, form.tokens, 0, own))
            found.append(
                ("answer", min(one.generated or 0, n), form.tokens, one.max_new_tokens, own)
            )
        else:
            found.append(
                ("utility", n, form.tokens, one.max_new_tokens if form.is_written else 0, own)
            )
    return found


def tokens_of(data: TrainingData, study: Study) -> tuple[float, bool]:
    """The mean tokens of an example, and whether that was counted: by characters in a local file,
    else at most training.max_length.
    """
    length = float(study.training.max_length)
    name = next(name for name, one in study.data.items() if one == data)
    if data.local is None and not data.source.startswith("miniature:"):
        return length, False
    from driftbook.benchmarks.data import training_examples

    try:
        examples = training_examples(name, study)
    except ValueError:
        return length, False
    texts = [
        [turn["content"] for turn in one["prompt"]]
        + [text for key, text in one.items() if key in ("answer", "chosen")]
        for one in examples[:200]
    ]
    mean = sum(min(length, sum(map(len, one)) / CHARACTERS + 8 * len(one)) for one in texts) / len(
        texts
    )
    return mean, True


# ---- the plan
def hours(study: Study, rates: Rates) -> pd.DataFrame:
    """Hours of one device by base model and stage."""
    rows = amounts(study)
    seconds = rows.operations / rows.kind.map(rates.of)
    rows = rows.assign(seconds=seconds + rates.step * rows.steps + rates.fixed * rows.steps.gt(0))
    return (rows.groupby(["base_model", "stage"], sort=False).seconds.sum() / 3600).unstack(
        "stage", fill_value=0.0
    )


def memory(study: Study) -> dict[str, float]:
    """GiB of the device by stage: weights, and activations or key/values of what is worked on at
    once.
    """
    found: dict[str, float] = {}

    def take(stage: str, value: float) -> None:
        found[stage] = max(found.get(stage, 0.0), value / 2**30)

    for base in study.bases.values():
        own, weights = size(base, study), _weights(base, study)
        resident = (
            0.0 if study.drift is None else _weights(next(iter(study.judges.values())), study)
        )  # it judges while the model trains
        tokens = (
            study.training.tokens_per_batch or study.training.max_length
        )  # a single example at the least; more are taken as memory allows
        take(
            "train",
            weights
            + resident
            + 34 * own.layers * own.width * tokens
            + 2 * own.vocabulary * min(tokens, 4096) * 4,
        )  # Korthikanti et al. 2022, eq. 2
        cached = 4 * own.layers * own.kv_width * 32 * 1024
        for stage in ("respond", "answer", "utility"):
            take(stage, weights + cached)
    take(
        "judge", sum(_weights(judge, study) for judge in study.judges.values())
    )  # all judges of a job are loaded together
    return found


def _weights(model: Base | Judge | Rater, study: Study) -> float:
    each = WEIGHT_BYTES[getattr(model, "quantization", None)]
    return size(model, study).weights * (each[model.dtype] if isinstance(each, dict) else each)


def disk(study: Study) -> dict[str, float]:
    """GB on disk: downloads of models, adapters and records, tables with text."""
    downloads = sum(
        size(one, study).weights * 2
        for one in study.models.values()
        if one.local is None and one.source.partition(":")[0] not in ("miniature", "random")
    )
    downloads += sum(
        size(base, study).weights * 2
        for base in study.bases.values()
        for one in base.checkpoints.values()
        if one.local is None and not one.source.startswith("miniature:")
    )
    n = len(study.variants)
    amounts = _asked(study, Size(0, 0, 1, 1, 1, 1))
    asked, answered = (
        sum(items for stage, items, *_ in amounts if stage == wanted)
        for wanted in ("respond", "answer")
    )
    written = sum(
        items * new * CHARACTERS for stage, items, _, new, _ in amounts if stage == "respond"
    )
    adapter = max(
        (
            4 * 8 * 2 * one.layers * 2 * one.width
            for one in (size(base, study) for base in study.bases.values())
        ),
        default=0,
    )
    rows = (
        written * BYTES["character"]
        + asked * BYTES["verdict"] * len(study.judges)
        + answered * BYTES["answer"]
    )
    runs = n * (BYTES["run"] + adapter + 2 * rows)  # what is scored is kept in the cache as well
    return {"models to download": downloads / 1e9, "runs, tables and cache": runs / 1e9}


def finished(study: Study) -> pd.Series:
    """Variants whose result is there and still holds, by stage."""
    counts = dict.fromkeys(keys.stages(study), 0)
    for stage in counts:
        if not any((study.folder / "runs").glob(f"*/{stage}.done.json")):
            continue  # what a key is made of may have to be fetched first
        for base_model in study.bases:
            try:
                shared = keys.settings(stage, study, base_model)
            except ValueError:  # a model or set that is not there yet: nothing can be finished
                continue
            for variant in study.of_stage(stage, base_model):
                mark = study.folder / "runs" / variant.run_id / f"{stage}.done.json"
                try:
                    counts[stage] += mark.is_file() and read_json(mark)["key"] == keys.key(
                        shared, variant
                    )
                except (ValueError, KeyError):
                    continue
    return pd.Series(counts)


def needed(study: Study) -> list[tuple[str, str, Source]]:
    """Every source that a study reads: name, kind (model or dataset), source."""
    models = [(name, "model", one) for name, one in study.models.items()]
    models += [
        (f"{name}, {part}", "model", one)
        for name, base in study.bases.items()
        for part, one in base.checkpoints.items()
    ]
    sets = {
        **{f"data.{name}": one for name, one in study.data.items() if name in trained_on(study)},
        **{f"benchmarks.{name}": one for name, one in study.benchmarks.items()},
    }
    return models + [(name, "dataset", one) for name, one in sets.items()]


def trained_on(study: Study) -> set[str]:
    """The names under `data` that are read: those that a variant trains on, and the held-out
    answers.
    """
    return (
        {variant.dataset for variant in study.variants if variant.dataset}
        | {one.data for one in study.mitigations.values() if one.data}
        | {"heldout"}
    )


def device_here() -> str | None:
    """The name of this machine's GPU, None without one; asked of the driver, since torch takes
    seconds to import.
    """
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip().partition("\n")[0] or None if said.returncode == 0 else None


def choose(name: str | None) -> Rates:
    """The rates of a machine by name; where none is given those of this one, if measured, else of
    the published GPU.

    Raises:
        ValueError: its rates are not known.
    """
    known = machines()
    if not known:
        raise ValueError(
            "no rates are known; run make calibrate, which measures this machine in a few minutes"
        )
    if name and name not in known:
        raise ValueError(
            f"DEVICE={name!r}: its rates are not known, only those of {', '.join(known)}; run make"
            " calibrate there"
        )
    return known[name or next(iter(known))]()


def pages(study: Study, rates: Rates, price: float | None, dry_run: str = "") -> str:
    """The plan in words and tables."""
    variants, table = (
        pd.DataFrame([variant.row() for variant in study.variants]),
        hours(study, rates),
    )
    count = variants.groupby(["base_model", "method"], sort=False).size().unstack(fill_value=0)
    total, there = float(table.to_numpy().sum()), finished(study)
    sources = access.check_all(needed(study), workers=32)
    guessed = [name for name, one in study.models.items() if not size(one, study).known]
    bounded = [
        name
        for name, one in study.data.items()
        if name in trained_on(study) - {"heldout"} and not tokens_of(one, study)[1]
    ]
    repaired, n_bases = sum(variant.is_repaired for variant in study.variants), len(study.bases)
    n_trained = sum(
        variant.dataset is not None and not variant.is_repaired for variant in study.variants
    )
    untrained = int((variants.objective == "untrained").sum())
    lines = [
        f"{study.name}: {study.note}",
        f"{len(variants)} variants: {n_trained} runs to train"
        + (f", {repaired} repairs of them" if repaired else "")
        + (f", {untrained} adapters as they are initialised" if untrained else "")
        + ", and"
        f" {'the base model itself' if n_bases == 1 else f'the {n_bases} base models themselves'}"
        + (f", {study.base_repetitions} times" if study.base_repetitions > 1 else ""),
        "",
        count.to_string(),
        "",
        f"hours of one device ({rates.name}; {rates.how})",
        table.assign(all=table.sum(axis=1)).map(_short).to_string(),
        "",
        f"in all {_short(total)} hours"
        + (
            f", {_short(price * total)} at {price:g} an hour"
            if price
            else " (PRICE=... of an hour gives money)"
        ),
        *(
            [
                f"at most, since the length of {', '.join(bounded)} is not known before it is"
                f" there: examples are taken as {study.training.max_length} tokens long"
            ]
            if bounded
            else []
        ),
        *(
            [f"this machine has a {gpu}, whose rates are not known: make calibrate measures them"]
            if (gpu := device_here()) and not MEASURED.is_file()
            else []
        ),
        *(
            [
                f"sizes guessed from the names of {', '.join(guessed)}: their configuration is not"
                " here"
            ]
            if guessed
            else []
        ),
        "memory of the device, GiB: "
        + ", ".join(f"{stage} {value:.1f}" for stage, value in memory(study).items()),
        "disk, GB: " + ", ".join(f"{what} {value:.1f}" for what, value in disk(study).items()),
        "",
        "finished: " + ", ".join(f"{stage} {n} of {len(variants)}" for stage, n in there.items()),
        *([f"jobs to run: {dry_run}"] if dry_run else []),
        "",
        *(
            f"{'?? ' if one.state == 'not checked' else 'ok ' if one.ok else 'NO '} {one.name}:"
            f" {one.sentence}"
            for one in sources.itertuples()
        ),
    ]
    lost = int((~sources.ok).sum())
    unsure = int(sources.state.eq("not checked").sum())
    end = (
        f"{lost} of {len(sources)} models and sets cannot be had: see NO above"
        if lost
        else "every model and set can be had"
    )
    return "\n".join(
        [
            *lines,
            "",
            end
            + (
                f"; {unsure} from GitHub are fetched at their commit when used (??)"
                if unsure
                else ""
            ),
        ]
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def dry_run(study_file: Path) -> str:
    """The jobs that Snakemake would run, counted by rule."""
    from driftbook.batch.make_study import environment, snakemake

    command = [part for part in snakemake(study_file, "local", []) if part != "--"]
    said = subprocess.run(
        [*command, "--dry-run", "--quiet", "rules"],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if said.returncode:
        return f"not known ({(said.stderr.strip() or said.stdout.strip()).splitlines()[-1]})"
    counts = dict(
        line.split()
        for line in said.stdout.splitlines()
        if len(line.split()) == 2 and line.split()[1].isdigit()
    )
    return (
        ", ".join(f"{name} {n}" for name, n in counts.items() if name != "all")
        or "none: the study is finished"
    )


def main(name: str, device: str = "", price: str = "") -> int:
    """Print the plan of a study; 2 where its file is wrong."""
    try:
        path = find(name)
        study = load(path)
        amount = _price(price)
        rates = choose(device or None)
        print(pages(study, rates, amount, dry_run(path)))
    except ValueError as error:
        print(f"driftbook: {error}", file=sys.stderr)
        return 2
    return 0


def _price(text: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value < 0:
        raise ValueError(
            f"PRICE={text!r}; give the price of an hour of the device as a number, as PRICE=2.5"
        )
    return value


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
