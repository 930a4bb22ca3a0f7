"""`make calibrate`: the rates of this machine, from which `make plan` computes hours."""

import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from bench import harness

from driftbook.batch.costing import MEASURED, operations, size_of
from driftbook.models.loading import Loaded, device
from driftbook.models.scoring import Scorer
from driftbook.study.environment import hardware
from driftbook.study.files import write_json
from driftbook.study.methods import PEFT_METHODS
from driftbook.study.study_file import Study
from driftbook.training import examples

SMALL = harness.SHAPES["vocabulary of 8,192"]
NOTHING = SMALL | {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}  # no cost


def calibrate(methods: Sequence[str] = (), n: int | None = None) -> dict[str, Any]:
    """Measure this machine (a few minutes on a CPU) and keep the rates in outputs/costs.json.

    All methods on whole base models are measured where none is given, each by n examples.
    """
    where = device()
    shape = harness.LLAMA_8B | {"num_hidden_layers": 8} if where == "cuda" else SMALL
    dtype, usual = ("bfloat16", 64) if where == "cuda" else ("float32", 16)
    whole = [name for name, one in PEFT_METHODS.items() if not one.quantized]
    n, this = n or usual, harness.study(n or usual, methods or whole)
    tokenizer = harness.tokenizer_of(harness.texts(this))
    model = harness.random_llama(shape, tokenizer, dtype, where)
    base = Loaded("random", model, tokenizer, "random")
    flops = _training_rates(this, base) | _asking_rates(this, base)
    fixed, step = _overheads(n, tokenizer, where)
    weights = size_of(model.config.to_dict()).weights
    kept = {
        "hardware": hardware(),
        "flops": flops,
        "fixed": fixed,
        "step": step,
        "when": time.strftime("%Y-%m-%d"),
        "threads": torch.get_num_threads(),
        "model": f"{weights / 1e6:.1f} M parameters, {dtype}",
    }
    write_json(MEASURED, kept)
    return kept


def _training_rates(this: Study, base: Loaded) -> dict[str, float]:
    """Operations a second of training, by objective and method."""
    own, flops = size_of(base.model.config.to_dict()), {}
    for objective, word in (("sft", "train"), ("dpo", "dpo")):
        prepared = examples.prepare(objective, base, this)
        work = sum(operations(own, len(part.ids), 4) for part in _parts(prepared.examples))
        variants = [one for one in this.of_base(next(iter(this.bases))) if one.dataset == objective]
        harness.fit_once(variants[0], base, prepared, this)  # warms up
        for variant in variants:
            _, seconds = harness.timed(harness.fit_once, variant, base, prepared, this)
            flops[f"{word} {variant.method}"] = work / seconds
    return flops


def _parts(members: Sequence) -> list:
    """The conversations of examples; a pair has two."""
    pairs = ((one,) if hasattr(one, "ids") else (one.chosen, one.rejected) for one in members)
    return [part for both in pairs for part in both]


def _asking_rates(this: Study, base: Loaded) -> dict[str, float]:
    """Operations a second of reading and of writing."""
    own = size_of(base.model.config.to_dict())
    scorer = Scorer(base.model, base.tokenizer)
    texts = [scorer.ids(text)[:256] for text in harness.texts(this)[:64]]
    texts = [one for one in texts if len(one) > 8]
    pairs = [(one[:-1], one[-1:]) for one in texts]
    _, reading = harness.timed(scorer.token_logprobs, pairs)
    base.model.generation_config.eos_token_id = None
    _, writing = harness.timed(scorer.generate, [one[:64] for one in texts], 32)
    read = sum(operations(own, len(one), 2) for one in texts)
    return {"read": read / reading, "write": len(texts) * operations(own, 32, 2) / writing}


def _overheads(n: int, tokenizer: Any, where: str) -> tuple[float, float]:
    """Seconds that a training and a step cost besides arithmetic: those of a model that costs
    nothing, trained in one step and in n.
    """
    model = harness.random_llama(NOTHING, tokenizer, "float32", where)
    tiny, seconds = Loaded("tiny", model, tokenizer, "tiny"), {}
    for batch in (n, n, 1):  # the first warms up
        this = harness.study(n, ("lora",), batch=batch)
        [first] = [one for one in this.of_base(next(iter(this.bases))) if one.objective == "sft"]
        prepared = examples.prepare("sft", tiny, this)
        _, seconds[batch] = harness.timed(harness.fit_once, first, tiny, prepared, this)
    step = (seconds[1] - seconds[n]) / (n - 1)
    return max(0.0, seconds[n] - step), step


if __name__ == "__main__":
    print(json.dumps(calibrate(), indent=1))
