"""The rates of this machine, measured in less than a minute on a model of random weights of the
real shape, and kept by a fingerprint of machine and shape: `make plan` does it where it was not
done yet, `make calibrate` does it again.

On a CPU seconds are those of one core (jobs have one thread each), so that other work on the
machine adds little; the model has few of the layers, since its rate is the same with all of them.
"""

import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from driftbook.batch import rates, sizes
from driftbook.batch.costing import operations
from driftbook.batch.lengths import Amount
from driftbook.batch.rates import Rates
from driftbook.batch.sizes import Size
from driftbook.study.commands import command
from driftbook.study.environment import gpu_name, processor
from driftbook.study.files import write_json
from driftbook.study.methods import PEFT_METHODS
from driftbook.study.study_file import Study, load
from driftbook.study.variants import Variant

if TYPE_CHECKING:
    from driftbook.models.loading import Loaded

MOST_SECONDS = 25.0  # of training, after which no further method is measured
# numbers: of the layers and of the table of the model that is measured, by device
BODY = {"cpu": 1.5e7, "cuda": 2.0e9}
HEAD = {"cpu": 3.0e7, "cuda": 6.0e8}
N_EXAMPLES = {"cpu": 6, "cuda": 64}
LENGTHS = {"cpu": (64, 192), "cuda": (200, 1_000)}  # tokens of an example
NEW = 12  # tokens that are written
PROMPT = 64  # tokens of a prompt


def machine_rates(study: Study, again: bool = False) -> Rates:
    """The rates of this machine for a study's largest base model, measured where they are not kept
    (or `again`).
    """
    found = None if again else rates.here(study)
    if found is None:
        print("measuring this machine, once: less than a minute", file=sys.stderr, flush=True)
        write_json(rates.measured_path(study), measurement(study, rates.largest(study)))
        found = rates.here(study)
    return found


def measurement(study: Study, shape: Size) -> dict[str, Any]:
    """The fields of `Rates` with the day and the model of the measurement."""
    import torch

    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        torch.set_num_threads(1)
    base, own = _model(shape, "cpu" if on_cpu else "cuda")
    fixed, step = _overheads(study, on_cpu)
    steps = -(-_n_examples(base, own) // study.training.batch_size)
    besides = fixed + step * steps
    flops = _reading_rates(base, own) | _training_rates(study, base, own, besides)
    name = gpu_name() if not on_cpu else f"one core of {processor()}"
    layers = f"{own.layers} layers of width {own.width}, {own.vocabulary:,} tokens"
    more = rates.OVERHEADS if on_cpu else {}
    found = Rates(str(name), flops, fixed, step, "", **more, on_cpu=on_cpu)
    kept = {key: value for key, value in asdict(found).items() if key != "how"}
    return kept | {"when": time.strftime("%Y-%m-%d"), "model": layers}


# ---- the model
def _model(shape: Size, where: str) -> tuple["Loaded", Size]:
    """A Llama of random weights with few layers of this shape, and its size."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from driftbook.models.loading import Loaded

    head = next(
        n for n in (128, 64, 32, 16, 8, 4, 2, 1) if not (shape.width % n or shape.kv_width % n)
    )
    each = shape.body / shape.layers
    inner = (each - 2 * shape.width * (shape.width + shape.kv_width)) / (3 * shape.width)
    config = LlamaConfig(
        vocab_size=max(64, min(shape.vocabulary, int(HEAD[where] / shape.width))),
        hidden_size=shape.width,
        intermediate_size=max(8, round(inner)),
        num_hidden_layers=max(1, min(shape.layers, round(BODY[where] / each))),
        num_attention_heads=shape.width // head,
        num_key_value_heads=shape.kv_width // head,
        head_dim=head,
        max_position_embeddings=4_096,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it tells of the tokenizer's ids
    torch.manual_seed(0)
    kind, usual = torch.float32 if where == "cpu" else torch.bfloat16, torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        with torch.device(where):
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(usual)
    model.generation_config.eos_token_id = None
    return Loaded("random", model, _tokenizer(), "random"), sizes.size_of(config.to_dict())


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(("<pad>", "<s>", "</s>", "<unk>"))}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>")


def timed(work: Callable, *given: Any) -> float:
    """Seconds of work(*given): on a GPU to the end of what it started, else of the processor."""
    import torch

    cuda = torch.cuda.is_available()
    clock = time.perf_counter if cuda else time.process_time
    started = clock()
    work(*given)
    if cuda:
        torch.cuda.synchronize()
    return clock() - started


# ---- what is measured
def _rows(n: int, where: str, vocabulary: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    sizes_ = rng.integers(*LENGTHS[where], n)
    return [rng.integers(4, vocabulary, size).tolist() for size in sizes_]


def _n_examples(base: "Loaded", own: Size) -> int:
    """How many examples: fewer where a single layer is larger than the whole should be."""
    where = base.model.device.type
    return min(N_EXAMPLES[where], max(2, round(N_EXAMPLES[where] * BODY[where] / own.body)))


def _reading_rates(base: "Loaded", own: Size) -> dict[str, float]:
    """Operations a second of reading and of writing, and weights a second that come from memory:
    from answers to one prompt and to many.
    """
    from driftbook.models.scoring import Scorer

    where = base.model.device.type
    scorer, n = Scorer(base.model, base.tokenizer), _n_examples(base, own)
    rows = _rows(2 * n, where, own.vocabulary)
    pairs = [(row[:-1], row[-1:]) for row in rows]
    scorer.token_logprobs(pairs[:2])
    reading = min(timed(scorer.token_logprobs, pairs) for _ in range(2))
    tokens = float(sum(map(len, rows)))
    read = operations(own, Amount(tokens, len(rows), tokens / len(rows)), 2) / reading
    many = 2 * n
    prompts = [(row * PROMPT)[:PROMPT] for row in _rows(many, where, own.vocabulary)]
    asked = Amount(PROMPT, 1, PROMPT)
    before = operations(own, asked, 2) / read
    one = timed(scorer.generate, prompts[:1], NEW) - before
    all_ = timed(scorer.generate, prompts, NEW) - many * before
    each = max((all_ - one) / (many - 1), 0.02 * one) / NEW
    said = operations(own, Amount(1, 1, PROMPT + NEW), 2)
    passing = max(one / NEW - each, 0.02 * one / NEW)
    weights = own.body + own.vocabulary * own.width
    return {"read": read, "write": said / each, "stream": weights / passing}


def _training_rates(study: Study, base: "Loaded", own: Size, besides: float) -> dict[str, float]:
    """Operations a second of training, by objective and method: the study's own methods, as long as
    there is time; `besides` are the seconds of a training that are not arithmetic.
    """
    where, flops, spent = base.model.device.type, {}, 0.0
    rows = _rows(_n_examples(base, own), where, own.vocabulary)
    for variant in [*_variants(study), *_usual(study)]:
        word = "dpo" if variant.objective == "dpo" else "train"
        kind, late = f"{word} {variant.method}", spent > MOST_SECONDS
        if kind in flops or (late and f"{word} lora" in flops):
            continue
        made, amount = _examples(rows, variant.objective == "dpo")
        try:
            if not flops:
                _fit(variant, base, made[:2], study)  # warms up
            seconds = timed(_fit, variant, base, made, study)
            spent += seconds
        except ValueError:  # it names modules that this model lacks: LoRA's rate holds for it
            continue
        flops[kind] = operations(own, amount, 4) / max(seconds - besides, 0.1 * seconds)
    return flops


def _variants(study: Study) -> list[Variant]:
    """One training of each method and objective, LoRA first."""
    found = {
        (one.method, one.objective): replace(one, epochs=1, init=None, seed=0)
        for one in study.variants
        if one.dataset and not one.mitigation and not PEFT_METHODS[one.method].quantized
    }
    return sorted(found.values(), key=lambda one: (one.method != "lora", one.method))


def _usual(study: Study) -> list[Variant]:
    """LoRA of the attention, by both objectives: what is taken where a method is not measured."""
    base = next(one for one in study.variants if one.method == "none")
    settings = '{"peft": {"r": 8, "target_modules": ["q_proj", "v_proj"]}}'
    shared = {"method": "lora", "settings": settings, "learning_rate": 1e-4, "epochs": 1, "seed": 0}
    return [
        replace(base, objective=one, dataset=one, n_train=1, **shared) for one in ("sft", "dpo")
    ]


def _examples(rows: Sequence[list[int]], dpo: bool) -> tuple[list, Amount]:
    """Conversations, or pairs that share their first half, and their amount."""
    from driftbook.training.steps import Conversation, Pair

    halves = [len(row) // 2 for row in rows]
    made = [
        Conversation(row, np.arange(half, len(row))) for row, half in zip(rows, halves, strict=True)
    ]
    tokens, counted = float(sum(map(len, rows))), float(sum(len(one.counted) for one in made))
    if dpo:
        others = [
            Conversation(row[:half] + row[half:][::-1], np.arange(half, len(row)))
            for row, half in zip(rows, halves, strict=True)
        ]
        made = [Pair(*both, (-100.0, -100.0)) for both in zip(made, others, strict=True)]
        tokens, counted = tokens + counted, 2 * counted
    return made, Amount(tokens, counted, tokens / len(rows))


def _fit(variant: Variant, base: "Loaded", made: list, study: Study) -> None:
    """Train a variant on examples in one epoch, as a study does."""
    from driftbook.models import adapters
    from driftbook.training import fit
    from driftbook.training.examples import Prepared

    prepared = Prepared(made, [[i] for i in range(len(made))], "random", None)
    plain = study.model_copy(update={"init_texts": None, "mitigations": {}})
    model = adapters.create(variant, base.model, base.tokenizer)
    try:
        with TemporaryDirectory() as scratch:
            fit.fit(variant, model, base, prepared, plain, Path(scratch, "adapter"))
    finally:
        adapters.detach(model)


def _overheads(study: Study, on_cpu: bool) -> tuple[float, float]:
    """Seconds that a training and a step cost besides arithmetic: those of a model that costs
    nothing, trained in one step and in several.
    """
    where, [usual, _] = "cpu" if on_cpu else "cuda", _usual(study)
    base, _ = _model(Size(4 * 32 * 32 + 3 * 32 * 32, 32 * 64, 1, 32, 32, 64), where)
    rows = [row[:16] for row in _rows(8, where, 64)]
    made, _ = _examples(rows, False)
    seconds = {}
    for batch in (8, 8, 1):  # the first warms up
        training = study.training.model_copy(update={"batch_size": batch, "packed": False})
        seconds[batch] = timed(
            _fit, usual, base, made, study.model_copy(update={"training": training})
        )
    step = max(0.0, seconds[1] - seconds[8]) / 7
    return max(0.0, seconds[8] - step), step


@command(wrong=2)
def main(name: str) -> None:
    """Measure this machine for a study, again."""
    found = machine_rates(load(name), again=True)
    shown = ", ".join(f"{kind} {rate / 1e9:.1f}" for kind, rate in found.flops.items())
    print(f"{found.name}: {found.how}; thousand million operations a second: {shown}")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
