"""`make calibrate`: the rates of this machine, from which `make plan` computes hours."""

import json
from typing import Any

from driftbook.batch.costing import MEASURED, operations, size_of
from driftbook.study.files import write_json
from driftbook.study.methods import PEFT_METHODS


# ---- measuring
def calibrate() -> dict[str, Any]:
    """Measure this machine (a few minutes on a CPU) and keep the rates in outputs/costs.json."""
    import time

    import torch
    from bench import harness

    from driftbook.models.loading import Loaded, device
    from driftbook.models.scoring import Scorer
    from driftbook.study.environment import hardware
    from driftbook.training import examples

    where = device()
    shape = (
        harness.LLAMA_8B | {"num_hidden_layers": 8}
        if where == "cuda"
        else harness.SHAPES["vocabulary of 8,192"]
    )
    dtype, n = ("bfloat16", 64) if where == "cuda" else ("float32", 16)
    methods = [name for name, one in PEFT_METHODS.items() if not one.quantized]
    this = harness.study(n, methods)
    tokenizer = harness.tokenizer_of(harness.texts(this))
    base = Loaded(
        "random", harness.random_llama(shape, tokenizer, dtype, where), tokenizer, "random"
    )
    own, flops = size_of(base.model.config.to_dict()), {}
    for objective in ("sft", "dpo"):
        prepared = examples.prepare(objective, base, this)
        for number, variant in enumerate(
            one for one in this.of_base(next(iter(this.bases))) if one.objective == objective
        ):
            if not number:
                harness.fit_once(variant, base, prepared, this)  # warms up
            _, seconds = harness.timed(harness.fit_once, variant, base, prepared, this)
            lengths = [
                len(part.ids)
                for one in prepared.examples
                for part in ((one,) if hasattr(one, "ids") else (one.chosen, one.rejected))
            ]
            flops[f"{'train' if objective == 'sft' else 'dpo'} {variant.method}"] = (
                sum(operations(own, length, 4) for length in lengths) / seconds
            )
    scorer = Scorer(base.model, tokenizer)
    contexts = [scorer.ids(text)[:256] for text in harness.texts(this)[:64]]
    contexts = [one for one in contexts if len(one) > 8]
    _, seconds = harness.timed(scorer.token_logprobs, [(one[:-1], one[-1:]) for one in contexts])
    flops["read"] = sum(operations(own, len(one), 2) for one in contexts) / seconds
    base.model.generation_config.eos_token_id = None
    _, seconds = harness.timed(scorer.generate, [one[:64] for one in contexts], 32)
    flops["write"] = len(contexts) * operations(own, 32, 2) / seconds
    tiny = Loaded(
        "tiny",
        harness.random_llama(
            {
                **harness.SHAPES["vocabulary of 8,192"],
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
            },
            tokenizer,
            "float32",
            where,
        ),
        tokenizer,
        "tiny",
    )
    seconds = {}
    for batch in (
        n,
        n,
        1,
        # a model that costs nothing, in one step and in n: what is left is what a training and what
        # a
        # step costs; the first warms up
    ):
        other = harness.study(n, ("lora",), batch=batch)
        [first] = [one for one in other.of_base(next(iter(other.bases))) if one.objective == "sft"]
        _, seconds[batch] = harness.timed(
            harness.fit_once, first, tiny, examples.prepare("sft", tiny, other), other
        )
    step = (seconds[1] - seconds[n]) / (n - 1)
    kept = {
        "hardware": hardware(),
        "flops": flops,
        "fixed": max(0.0, seconds[n] - step),
        "step": step,
        "when": time.strftime("%Y-%m-%d"),
        "threads": torch.get_num_threads(),
        "model": f"{own.weights / 1e6:.1f} M parameters, {dtype}",
    }
    write_json(MEASURED, kept)
    return kept


if __name__ == "__main__":
    print(json.dumps(calibrate(), indent=1))
