"""What training costs: our optimiser steps against TRL's trainers as they come, on the same
examples, model and method; and an 8B model on a GPU.
"""

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from bench.harness import (
    LENGTH,
    LLAMA_8B,
    MOST,
    SHAPES,
    fit_once,
    least_seconds,
    random_llama,
    row,
    study,
    texts,
    timed,
    tokenizer_of,
)

from driftbook.study.methods import MITIGATION_KINDS, PEFT_METHODS, STUDIED
from driftbook.study.study_file import Study, load
from driftbook.study.variants import Variant

GOAL = 1.5  # times TRL's tokens a second
QUIET = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
SECOND = ("kl", "safegrad", "pcgrad", "mgda", "drift_budget")
NOISE = 0.05  # nats: TRL's defaults compute in bf16, ours here in fp32
FIGURE = "{}, {} examples of real chat: times TRL's tokens a second"


def speed(
    n: int = 24, methods: Sequence[str] = STUDIED, shapes: dict[str, dict] | None = None
) -> list[dict]:
    """Tokens a second of one epoch, ours and TRL's as it comes, and beside that TRL's in fp32
    without checkpointing, which is the better choice on a CPU. Ours of DPO is with the reference's
    log-probabilities, which all variants of a base share. With a large vocabulary LoRA alone is
    measured."""
    from driftbook.models.loading import Loaded
    from driftbook.training import examples

    logging.getLogger("transformers").setLevel(logging.ERROR)
    this, rows = study(n, methods), []
    for name, shape in (shapes or SHAPES).items():
        tokenizer = tokenizer_of(texts(this), shape["vocab_size"])
        for objective in ("sft", "dpo"):
            base = Loaded("random", random_llama(shape, tokenizer), tokenizer, "random")
            shared, whole = least_seconds(examples.prepare, objective, base, this, repeats=1)
            fits = [i for i, length in enumerate(whole.lengths) if length <= MOST]
            kept, packs = [whole.examples[i] for i in fits], [[i] for i in range(len(fits))]
            prepared = replace(whole, examples=kept, packs=packs)
            shared *= len(fits) / len(whole.examples) if objective == "dpo" else 0
            measured = methods if shape["vocab_size"] < 20_000 else methods[:1]
            for variant in _of_objective(this, objective):
                if variant.method in measured:
                    rows += _compared(variant, base, this, prepared, fits, shared, name)
    return rows


def _of_objective(this: Study, objective: str) -> list[Variant]:
    every = this.of_base(next(iter(this.bases)))
    return [one for one in every if one.objective == objective]


def _compared(
    variant: Variant,
    base: Any,
    this: Study,
    prepared: Any,
    fits: list[int],
    shared: float,
    name: str,
) -> list[dict]:
    """The lines of one variant, ours against TRL's."""
    ours, (_, curve) = least_seconds(fit_once, variant, base, prepared, this, repeats=2)
    ours += shared
    peer, expected = least_seconds(_peer, variant, base, this, fits, repeats=1)
    other = {"bf16": False, "gradient_checkpointing": False}
    plain, _ = least_seconds(_peer, variant, base, this, fits, other, repeats=1)
    objective, tokens = variant.objective.upper(), _tokens(prepared.examples)
    setting = f"{PEFT_METHODS[variant.method].label}, {name}"
    figure = FIGURE.format(objective, len(fits))
    gap, losses = np.inf, curve.loss.to_numpy(float)
    if len(losses) == len(expected):
        gap = np.abs(losses - expected).max()
    in_fp32, rate = f"{figure}, in fp32 without checkpointing", f"{objective}: tokens a CPU second"
    largest = f"{objective}: largest difference of a step's loss to TRL's"
    return [
        row(figure, setting, peer / ours, GOAL, "CPU s", ours, peer),
        row(in_fp32, setting, plain / ours, None, "CPU s", ours, plain),
        row(f"{rate}, ours", setting, tokens / ours, None, "1/s"),
        row(largest, setting, gap, NOISE, "nats", least=False),
    ]


def _tokens(examples: Sequence[Any]) -> int:
    return sum(
        len(part.ids)
        for one in examples
        for part in ((one,) if hasattr(one, "ids") else (one.chosen, one.rejected))
    )


def _peer(
    variant: Variant, base: Any, this: Study, chosen: Sequence[int], other: dict | None = None
) -> np.ndarray:
    """The losses of TRL's trainer with its defaults, but for what says what is trained (data, rate,
    one epoch, seed), and for `other` settings.
    """
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from driftbook.benchmarks.data import training_examples
    from driftbook.models import adapters
    from driftbook.models.base_state import BaseState

    def said(text: str) -> list[dict]:
        return [{"role": "assistant", "content": text}]

    sft, every = variant.objective == "sft", training_examples(variant.objective, this)
    keys = {"completion": "answer"} if sft else {"chosen": "chosen", "rejected": "rejected"}
    rows = [
        {"prompt": one["prompt"], **{name: said(one[key]) for name, key in keys.items()}}
        for one in (every[i] for i in chosen)
    ]
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = (SFTConfig if sft else DPOConfig)(
            output_dir=scratch,
            learning_rate=variant.learning_rate,
            num_train_epochs=1,
            lr_scheduler_type=this.training.scheduler,
            seed=variant.seed,
            data_seed=variant.seed,
            logging_steps=1,
            max_length=LENGTH,
            use_cpu=base.model.device.type == "cpu",
            **(QUIET | (other or {})),
        )
        before = BaseState(base.model)
        trainer = (SFTTrainer if sft else DPOTrainer)(
            model=base.model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=base.tokenizer,
            peft_config=adapters.config(variant),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        before.restore("TRL")
    return np.array(losses, float)


def objectives(n: int = 24, limit: float = 2.2) -> list[dict]:
    """CPU seconds of one epoch with two objectives against SFT alone, by method; LoRA's with every
    kind. The base's states of the alignment examples are made once for all variants, and not
    counted.
    """
    from driftbook.models.loading import Loaded
    from driftbook.training import examples

    this, rows, name = study(n, STUDIED), [], next(iter(SHAPES))
    tokenizer = tokenizer_of(texts(this), SHAPES[name]["vocab_size"])
    base = Loaded("random", random_llama(SHAPES[name], tokenizer), tokenizer, "random")
    alone = examples.prepare("sft", base, this)
    for plain in _of_objective(this, "sft"):
        seconds, _ = least_seconds(fit_once, plain, base, alone, this, repeats=3)
        for kind in SECOND if plain.method == "lora" else ("kl",):
            change = {"kind": kind, "data": "dpo", "value": 1.0, "eta": 0.1}
            settings = {**json.loads(plain.settings), "mitigation": change}
            both = replace(plain, settings=json.dumps(settings))
            prepared = examples.prepare("sft", base, this, None, examples.change(both))
            more, _ = least_seconds(fit_once, both, base, prepared, this, repeats=3)
            figure = f"SFT and {MITIGATION_KINDS[kind].label}: times the CPU seconds of SFT alone"
            setting = f"{PEFT_METHODS[plain.method].label}, {name}"
            rows.append(
                row(figure, setting, more / seconds, limit, "CPU s", more, seconds, least=False)
            )
    return rows


# ---- a large model
def gpu(
    shape: dict | None = None,
    dtype: str = "bfloat16",
    length: int = 2_048,
    n: int = 64,
    methods: Sequence[str] = STUDIED,
) -> list[dict]:
    """Training of a model of random weights on the GPU where there is one: tokens a second by
    method, share of the measured matrix rate, memory.
    """
    import torch
    from bench.harness import _matrix_rate

    from driftbook.models.loading import Loaded, device
    from driftbook.training import examples

    where, this, rows = device(), study(n, methods, length, batch=16), []
    this = this.model_copy(update={"training": this.training.model_copy(update={"packed": True})})
    tokenizer = tokenizer_of(texts(this))
    base = Loaded(
        "random", random_llama(shape or LLAMA_8B, tokenizer, dtype, where), tokenizer, "random"
    )
    rate = _matrix_rate(where, dtype)
    named = base.model.named_parameters()
    n_weights = sum(value.numel() for name, value in named if "embed_tokens" not in name)
    for objective in ("sft", "dpo"):
        prepared = examples.prepare(objective, base, this)
        n_tokens = _tokens(prepared.examples)
        for variant in _of_objective(this, objective):
            if where == "cuda":
                torch.cuda.reset_peak_memory_stats()
            _, seconds = timed(fit_once, variant, base, prepared, this)
            setting = f"{objective.upper()}, {PEFT_METHODS[variant.method].label}"
            # forward 2, and backward 2: the base's weights are frozen and get no gradient
            flops = 4 * n_weights * n_tokens
            measured = (objective, variant.method) == ("sft", "lora") and where == "cuda"
            goal = 0.5 if measured else None
            name = f"{where}, {dtype}: training tokens a second"
            rows.append(row(name, setting, n_tokens / seconds, None, "1/s"))
            name = (
                f"{where}, {dtype}: share of the measured matrix rate ({rate / 1e12:.1f} TFLOP/s)"
            )
            rows.append(row(name, setting, flops / seconds / rate, goal, "share"))
            if where == "cuda":
                peak = torch.cuda.max_memory_allocated() / 2**30
                rows.append(row("peak memory of training", setting, peak, None, "GiB", least=False))
    return rows


def whole_study() -> list[dict]:
    """Hours of this machine for one variant of the original study and for all 264, extrapolated
    from rates measured here.
    """
    from driftbook.batch import calibrating, costing

    paper = load("paper")
    rates = calibrating.machine_rates(paper, again=True)
    table = costing.hours(paper, rates)
    one = next(
        variant for variant in paper.variants if variant.method == "lora" and variant.epochs == 1
    )
    own = costing.hours(
        paper.model_copy(
            update={
                "grid": (
                    paper.grid[0].model_copy(
                        update={
                            "bases": (one.base_model,),
                            "methods": ("lora",),
                            "data": (one.dataset,),
                            "seeds": (42,),
                        }
                    ),
                )
            }
        ),
        rates,
    )
    return [
        row(
            "hours of one variant of 8B: one epoch of 20,785 examples, answers, verdicts, BBQ",
            "LoRA, SFT",
            own.loc[one.base_model].sum(),
            None,
            "h",
            least=False,
        ),
        row(
            "hours of the original study's 264 runs (1,610 by its trainers' logs, training alone)",
            "all stages",
            table.to_numpy().sum(),
            1_610.0,
            "h",
            least=False,
        ),
    ]


def doctor(n: int = 20_000) -> list[dict]:
    """CPU seconds of the data doctor on n examples (real ones, then their words at random) against
    every prompt of the study of real text.
    """
    import random

    from driftbook.benchmarks.data import prompts, training_examples
    from driftbook.doctors.data import examine_data

    real = load("real_data")
    whole = real.model_copy(
        update={
            "benchmarks": {
                name: one.model_copy(update={"n": None}) for name, one in real.benchmarks.items()
            }
        }
    )
    asked = {name: list(prompts(name, whole).prompt) for name in ("safety", "over_refusal")}
    examples, rng = training_examples("sft", real), random.Random(0)
    words = [word for one in examples for word in one["answer"].split()]
    made = [
        {
            "prompt": [{"role": "user", "content": " ".join(rng.choices(words, k=20))}],
            "answer": " ".join(rng.choices(words, k=60)),
        }
        for _ in range(n - len(examples))
    ]
    seconds, _ = least_seconds(examine_data, [*examples, *made], asked, repeats=1)
    setting = f"{n:,} examples, {sum(map(len, asked.values())):,} prompts"
    return [row("data doctor, CPU seconds", setting, seconds, 60.0, "CPU s", least=False)]


def rows() -> list[dict]:
    """Every line of this benchmark."""
    if "DRIFTBOOK_SHARED" not in os.environ:
        print(
            "training is measured on the chat data of studies/real_data.yaml; without a local copy"
            " (DRIFTBOOK_SHARED) they are fetched"
        )
    return [*speed(), *objectives(), *doctor()]
