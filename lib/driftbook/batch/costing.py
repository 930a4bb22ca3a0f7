"""What a study costs: operations by stage, and from measured rates hours; memory and disk.

The model of cost is small. A stage of a variant takes some seconds of its own, a training `fixed`
seconds and `step` seconds an optimiser step, and arithmetic takes its operations divided by the
measured rate of that kind of work: 4 operations a weight and token of training (2 forward, 2
backward to the activations: the base's weights get no gradient), 2 of reading, 2 of writing, for
which all weights come from memory once a pass besides; the head at the places that are scored
alone, and 4 x layers x width x length of attention. Tokens are counted where the texts are here
(lengths.py); else we take an upper bound.
"""

from collections.abc import Iterator

import pandas as pd

from driftbook.batch.lengths import (
    CACHED_TOKENS,
    CHARACTERS,
    PASS_TOKENS,
    STEP_TOKENS,
    Amount,
    Lengths,
    n_items,
)
from driftbook.batch.rates import Rates
from driftbook.batch.sizes import WEIGHT_BYTES, Size, is_made_here, size, weight_bytes
from driftbook.benchmarks.format import PROMPT_TOKENS
from driftbook.benchmarks.formats import FORMATS
from driftbook.benchmarks.utility import REFUSALS
from driftbook.study import sources
from driftbook.study.grid import twin_variant
from driftbook.study.sections import Judge
from driftbook.study.study_file import Study
from driftbook.study.variants import Variant

VERDICT_TOKENS = 60  # of a judge's own prompt, behind what all its prompts begin with
BEGINNING_TOKENS = 3 * len(REFUSALS)  # of the beginnings of a refusal, behind one prompt
PATCHES = 2  # of a run's states by the base's, and of the base's by the run's
PROBE_TOKENS = 1_500  # that models.probe reads, counted with SmolLM2
OPTION_TOKENS = 12  # of BBQ's three options where they are scored as texts
# of a CPU's process: torch, transformers, peft and trl, imported
PROCESS_BYTES = 0.9e9
DISTRIBUTIONS_AT_ONCE = 2**27  # numbers: see training/dose.py
# On disk: a row of the miniature's runs, the rest of a run without its adapter, and a character of
# English answers (parquet, zstd).
BYTES = {"verdict": 42, "answer": 37, "run": 27_000, "character": 0.41}
COLUMNS = ["base_model", "stage", "run_id", "what", "n", "steps", "kind", "operations"]


# ---- amounts
def operations(model: Size, amount: Amount, each: int) -> float:
    """Of texts: their tokens through the layers, attention over a row's length, and the head."""
    attention = 2 * model.layers * model.width * amount.length / 2
    head = amount.places * model.vocabulary * model.width
    return each * (amount.tokens * (model.body + attention) + head)


def amounts(study: Study) -> pd.DataFrame:
    """The work by base model, stage and variant: what is counted while it is done and how many of
    it (see study/progress.py), optimiser steps, and operations by kind (train METHOD, dpo METHOD,
    read, write; of the kind `stream` weights that come from memory, of `piece` pieces of work).
    """
    rows = []
    for name, base in study.bases.items():
        own, lengths = size(base, study), Lengths(study, name)
        asked, looks = list(_asked(study, own, lengths)), list(_looks(study, own))
        drawn = [
            (stage, what, n * share, steps, kind, work * share)
            for share in [_drawn_share(study)]
            for stage, what, n, steps, kind, work in asked
            if stage in ("respond", "judge")
        ]
        kind, _, twin = base.source.partition(":")
        if kind == "twin" and base.local is None:
            made = twin_variant(study, twin)
            _, *work = _training(made, own, study, lengths)
            rows.append((name, "prepare", f"twin {twin}", *work))
        asked += list(_looking(study, own, lengths))
        tried: set[tuple[str, str]] = set()
        for variant in study.of_base(name):
            # of a base model's repetition only the drawn answers are new: the rest is in the cache
            again = variant.repetition > 1 and variant.method == "none"
            made = _making(variant, own, study, lengths, looks)
            work = [*made, *_multiplied(drawn if again else asked, variant)]
            stages = list(dict.fromkeys(one[0] for one in work))
            work += [(stage, "", 0, 0, "piece", 1) for stage in stages]
            work += _trying(variant, own, stages, tried)
            rows += [(name, stage, variant.run_id, *rest) for stage, *rest in work]
    return pd.DataFrame(rows, columns=COLUMNS)


Charge = tuple[str, str, float, int, str, float]  # of a variant: stage, and COLUMNS from `what` on


def _trying(
    variant: Variant, own: Size, stages: list[str], tried: set[tuple[str, str]]
) -> Iterator[Charge]:
    """What it takes to try how a model may be laid out (models.probe): once a job for the base and
    for each method that acts on weights.
    """
    for stage in stages:
        kind = (stage, variant.method)
        if stage != "judge" and variant.method_class != "prompt" and kind not in tried:
            tried.add(kind)
            amount = Amount(PROBE_TOKENS, PROBE_TOKENS / 10, 100)
            yield stage, "", 0, 0, "read probe", operations(own, amount, 2)


def _multiplied(asked: list[Charge], variant: Variant) -> Iterator[Charge]:
    """What a variant is asked, which a product reads and writes by each of its parts."""
    for stage, *counted, work in asked:
        yield stage, *counted, work * (1 if stage == "judge" else max(1, len(variant.parts)))


def _making(
    variant: Variant, own: Size, study: Study, lengths: Lengths, looks: list
) -> Iterator[Charge]:
    """Making a variant and measuring its dose."""
    stage = variant.made_in
    if variant.dataset and stage != "mitigate":
        for _, *work in (_training(variant, own, study, lengths), *looks):
            yield stage, *work
    # by the base and the variant, and where it does not start at the base as it was initialised
    own_start = stage == "retune" or (
        stage == "train" and variant.method not in ("lora", "rslora", "ia3")
    )
    times = 1 if variant.method == "none" else 2 + own_start
    times += max(0, len(variant.parts) - 1)
    work = times * operations(own, lengths.held_out(), 2)
    yield stage, "read", times * study.data["heldout"].n, 0, "read dose", work


def _training(variant: Variant, own: Size, study: Study, lengths: Lengths) -> Charge:
    dpo, method = variant.objective == "dpo", study.methods.get(variant.method, {})
    soft = int(method.get("num_virtual_tokens", 0))
    amount, _ = lengths.trained(variant.dataset, dpo, variant.n_train, bool(soft) or dpo)
    amount = Amount(amount.tokens + soft * variant.n_train, amount.places, amount.length)
    per_step = study.training.batch_size
    if study.training.packed and not dpo:
        per_step *= study.training.max_length * variant.n_train / max(amount.tokens, 1)
    steps = max(1, round(variant.n_train * variant.epochs / per_step))
    kind = f"{'dpo' if dpo else 'train'} {variant.method}"
    return "train", "steps", steps, steps, kind, variant.epochs * operations(own, amount, 4)


def _looks(study: Study, own: Size) -> Iterator[Charge]:
    """What the looks at drift during one training cost together; the first judge reads them."""
    if study.drift is None:
        return
    n, new = study.drift.n * (1 + 1 / study.drift.every), study.drift.max_new_tokens
    said = Amount(2 * n * new, 2 * n * new, PROMPT_TOKENS + new)
    yield "train", "written", 2 * n, 0, "write", operations(own, said, 2)
    length = FORMATS["bbq"].tokens
    seen = operations(own, Amount(2 * n * length, 2 * n, length), 2)
    for judge in list(study.judges.values())[:1]:
        seen += _judging(study, judge, n, PROMPT_TOKENS, new)
    yield "train", "read", 3 * n, 0, "read looks", seen


def _judging(study: Study, judge: Judge, n: float, asked: float, new: float) -> float:
    """Operations of n verdicts; a classifier reads the answer alone, and has a small head."""
    if judge.format == "classifier":
        return operations(size(judge, study), Amount(n * new, 0, new), 2)
    length = asked + new + VERDICT_TOKENS
    return operations(size(judge, study), Amount(n * length, n, length), 2)


def _asked(study: Study, own: Size, lengths: Lengths) -> Iterator[Charge]:
    """What every variant of a base model is asked, and its answers judged."""
    for name, one in study.benchmarks.items():
        form = FORMATS[one.format]
        if form.kind == "prompts":
            yield from _responding(study, name, own, lengths)
            if name in study.asked_to_begin:
                n = lengths.n_items(name)
                work = operations(own, lengths.read(name, n, BEGINNING_TOKENS), 2)
                yield "utility", "read", n, 0, "read", work
        elif form.kind == "items":
            yield from _answering(study, name, own, lengths)
        else:
            scored = lengths.read(name, behind=lengths.answer_tokens(name))
            yield "utility", "read", lengths.n_items(name), 0, "read", operations(own, scored, 2)
            if form.is_written:
                said = lengths.written(name, one.max_new_tokens)
                yield from _writing("utility", lengths.n_items(name), own, said)


def _looking(study: Study, own: Size, lengths: Lengths) -> Iterator[Charge]:
    """What the probes of a variant read: prompts once for their states, and with the beginnings of
    a refusal behind them once a layer and way for each patch.
    """
    if (one := study.probes) is None:
        return
    read, patched = 2 * (one.n + one.reported), PATCHES * one.reported * (own.layers + 1)
    work = operations(own, lengths.read("safety", read + 2 * one.reported), 2)
    work += operations(own, lengths.read("safety", patched, BEGINNING_TOKENS), 2)
    yield "probe", "read", read + patched, 0, "read", work


def _writing(stage: str, n: float, own: Size, said: Amount) -> Iterator[Charge]:
    """n prompts read, and an answer written to each."""
    prompt = Amount(said.tokens, 0, said.length)
    yield stage, "written", n, 0, "read", operations(own, prompt, 2)
    new = Amount(said.new, said.new, said.length)
    yield stage, "written", 0, 0, "write", operations(own, new, 2)
    yield stage, "written", 0, 0, "stream", said.passes * (own.body + own.vocabulary * own.width)


def _responding(study: Study, name: str, own: Size, lengths: Lengths) -> Iterator[Charge]:
    one, n = study.benchmarks[name], lengths.n_items(name)
    in_wordings = sum(min(wording.n or n, n) for wording in one.wordings.values())
    total = n * (1 + (one.samples or 0)) + in_wordings
    said = lengths.written(name, one.max_new_tokens).times(total / n)
    yield from _writing("respond", total, own, said)
    for judge_name, judge in study.judges.items():
        if not judge.benchmarks or name in judge.benchmarks:
            asked = said.length - one.max_new_tokens
            work = _judging(study, judge, total, asked, one.max_new_tokens)
            yield "judge", "read", total, 0, f"read {judge_name}", work


def _answering(study: Study, name: str, own: Size, lengths: Lengths) -> Iterator[Charge]:
    one, n, base = study.benchmarks[name], lengths.n_items(name), lengths.base
    behind = OPTION_TOKENS if base.answer_mode == "options" else 0
    permuted = min(one.permuted or 0, n)
    times = [n, permuted, permuted, *(min(way.n or n, n) for way in one.wordings.values())]
    for asked in filter(None, times):
        work = operations(own, lengths.read(name, asked, behind), 2)
        yield "answer", "read", 3 * asked, 0, "read", work
    if one.generated:
        asked = min(one.generated, n)
        said = lengths.written(name, one.max_new_tokens).times(asked / n)
        yield from _writing("answer", asked, own, said)


def _drawn_share(study: Study) -> float:
    """The share of a study's answers that are drawn."""
    asked = (one for one in study.benchmarks.values() if FORMATS[one.format].kind == "prompts")
    counts = [(n_items(one), one.samples or 0) for one in asked]
    drawn = sum(n * samples for n, samples in counts)
    return drawn / max(drawn + sum(n for n, _ in counts), 1)


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


# ---- hours, memory, disk
def seconds(study: Study, rates: Rates) -> pd.DataFrame:
    """`amounts`, with the seconds that each takes."""
    rows = amounts(study)
    trains = rows.kind.str.startswith(("train ", "dpo "))
    work = rows.operations / rows.kind.map(rates.of)
    return rows.assign(seconds=work + rates.step * rows.steps + rates.fixed * trains)


def hours(study: Study, rates: Rates) -> pd.DataFrame:
    """Hours of one device (of one core, where there is no GPU) by base model and stage."""
    by_stage = seconds(study, rates).groupby(["base_model", "stage"], sort=False).seconds.sum()
    table = by_stage.unstack("stage", fill_value=0.0)
    return (table + rates.job) / 3600


def memory(study: Study, on_cpu: bool = False) -> dict[str, float]:
    """GiB by stage, of the base model that needs most."""
    found = memory_by_base(study, on_cpu).max()
    return {stage: gib for stage, gib in found.items() if stage != "judge" or study.judges}


def memory_by_base(study: Study, on_cpu: bool = False) -> pd.DataFrame:
    """GiB by base model and stage: weights, and activations or key/values of what is worked on at
    once; of a process on a CPU also the packages, and the distributions of which a dose is the
    difference. A job of the stage judge loads all judges, whatever the base model.
    """
    # the first judge is loaded while a model trains and is looked at
    judges = [weight_bytes(judge, study) for judge in study.judges.values()]
    resident = 0.0 if study.drift is None else sum(judges[:1])
    process = PROCESS_BYTES if on_cpu else 0.0
    # a single example at the least; more are taken as memory allows
    usual = STEP_TOKENS if on_cpu else study.training.max_length
    tokens = max(study.training.tokens_per_batch or usual, study.training.max_length)
    rows = []
    for name, base in study.bases.items():
        own, weights = size(base, study), weight_bytes(base, study) + process
        each = 2 if on_cpu else 1  # fp32 against half precision
        # Korthikanti et al. 2022, eq. 2
        activations = 34 * each * own.layers * own.width * tokens
        logits = 2 * own.vocabulary * min(tokens, 4096) * 4
        training = activations + logits
        lengths = Lengths(study, name)
        if on_cpu:
            training = max(training, _dose_bytes(own, lengths))
        rows.append({"train": weights + resident + training})
        reading = ("respond", "answer", "utility", *(("probe",) if study.probes else ()))
        asked = dict.fromkeys(reading, 32.0 * 1024)
        if on_cpu:
            asked = {stage: _cached(study, lengths, stage) for stage in asked}
        kv = 4 * own.layers * own.kv_width * each
        rows[-1] |= {stage: weights + kv * n for stage, n in asked.items()}
    judged = sum(judges) + process
    return pd.DataFrame(rows, index=list(study.bases)).assign(judge=judged) / 2**30


def _dose_bytes(own: Size, lengths: Lengths) -> float:
    """Three distributions over the vocabulary of the held-out answers' tokens, as many as fit, and
    two copies while they are made and compared.
    """
    n = min(lengths.held_out().places, DISTRIBUTIONS_AT_ONCE / own.vocabulary)
    return 5 * 4 * n * own.vocabulary


def _cached(study: Study, lengths: Lengths, stage: str) -> float:
    """Tokens whose key/values a stage keeps at once, and again while they grow."""
    form = {name: FORMATS[one.format] for name, one in study.benchmarks.items()}
    written = [
        lengths.written(name, study.benchmarks[name].max_new_tokens)
        for name, one in form.items()
        if (one.kind == "prompts" and stage == "respond")
        or (one.kind == "utility" and one.is_written and stage == "utility")
    ]
    most = max((min(CACHED_TOKENS, one.tokens + one.new) for one in written), default=0.0)
    return 2 * max(most, float(PASS_TOKENS))


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
        if one.local is None and not is_made_here(one)
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
