"""The training loop of the miniature: Muon on the hidden matrices, AdamW on the rest, loss on the
answers only.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from driftbook.miniature.corpus import Example, Generator

IGNORED = -100
CONTENT, SYSTEM = "who", "each"  # two words that mark where the texts stand in a rendered template


@dataclass(frozen=True)
class Stage:
    """How long and how fast one stage trains. Without a Muon rate AdamW trains everything."""

    steps: int
    rate: float
    muon_rate: float | None = None
    warmup: int = 30
    weight_decay: float = 0.0
    batch_size: int = 32

    def scale(self, step: int) -> float:
        """The learning rate's factor at a step: linear warm-up, then cosine."""
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
        return min(1, step / self.warmup) * (0.03 + 0.97 * cosine)


@dataclass(frozen=True)
class Recipe:
    """The settings of all stages."""

    stage0: Stage = Stage(100, 8e-3, muon_rate=0.02, weight_decay=0.05)
    unaligned: Stage = Stage(760, 8e-3, muon_rate=0.02, weight_decay=0.05)
    aligned: Stage = Stage(185, 2e-3, warmup=10)
    judge: Stage = Stage(850, 5e-3, muon_rate=0.02, weight_decay=0.05)
    evaluations: int = 3  # points of each stage's learning curve


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example, and its targets: the same ids where it is learned, else IGNORED."""

    ids: list[int]
    targets: list[int]


def encoded(prompt: list[int], answer: list[int]) -> Encoded:
    """A prompt and its answer; the loss counts on the answer only."""
    return Encoded(prompt + answer, [IGNORED] * len(prompt) + answer)


Encoder = Callable[[Example], Encoded]


@contextmanager
def one_thread():
    """One intra-op thread, so that results do not depend on the machine's number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def chat_encoder(tokenizer: PreTrainedTokenizerFast) -> Encoder:
    """An encoder of examples by the tokenizer's own chat template, rendered once and then filled by
    table lookup.
    """
    lookup, unknown = tokenizer.get_vocab(), tokenizer.unk_token_id
    turn = template_parts(tokenizer, [{"role": "user", "content": CONTENT}], (CONTENT,))
    system = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": CONTENT}]
    # Gemma's template raises on a system message, so its examples have none.
    with_system = (
        template_parts(tokenizer, system, (SYSTEM, CONTENT))
        if "not supported" not in tokenizer.chat_template
        else None
    )
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token else []

    def encode(example: Example) -> Encoded:
        words = [
            [lookup.get(word, unknown) for word in text.split(" ")]
            for text in (example.system, example.prompt, example.answer)
            if text
        ]
        *before, reply = words
        if example.prompt is None:
            return encoded(bos, [*reply, tokenizer.eos_token_id])
        if with_system is None:
            before = before[-1:]
        parts = with_system if len(before) == 2 else turn
        prompt = parts[0] + [
            i for text, part in zip(before, parts[1:], strict=True) for i in text + part
        ]
        return encoded(prompt, [*reply, tokenizer.eos_token_id])

    return encode


def template_parts(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict], marks: tuple[str, ...]
) -> list[list[int]]:
    """The template's constant tokens before, between and after the marked texts."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    cuts = [-1, *(ids.index(tokenizer.convert_tokens_to_ids(mark)) for mark in marks), len(ids)]
    return [ids[a + 1 : b] for a, b in itertools.pairwise(cuts)]


def batches(
    generator: Generator, encode: Encoder, size: int, rng: random.Random, pooled: int = 6
) -> Iterator[list[Encoded]]:
    """Endless batches of examples of about equal length: little padding to compute."""
    while True:
        pool = sorted(
            (encode(generator(rng)) for _ in range(size * pooled)),
            key=lambda example: len(example.ids),
        )
        groups = [pool[i : i + size] for i in range(0, len(pool), size)]
        rng.shuffle(groups)
        yield from groups


def loss_of(model: PreTrainedModel, batch: list[Encoded]) -> torch.Tensor:
    """Mean loss of the answers' tokens; padded on the right, so causal attention needs no mask."""
    length = max(len(example.ids) for example in batch)
    ids = torch.full((len(batch), length), model.config.pad_token_id)
    targets = torch.full((len(batch), length), IGNORED)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        targets[row, : len(example.ids)] = torch.tensor(example.targets)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    counted = targets[:, 1:] != IGNORED
    return F.cross_entropy(model.lm_head(hidden[counted]), targets[:, 1:][counted])


def train(
    model: PreTrainedModel,
    source: Iterator[list[Encoded]],
    stage: Stage,
    observe: Callable[[int, float], None],
) -> None:
    """Train in place for the stage's steps; `observe(step, smoothed loss)` is called after each."""
    optimizers, smoothed = _optimizers(model, stage), None
    model.train()
    for step in range(1, stage.steps + 1):
        _set_rates(optimizers, stage.scale(step))
        loss = loss_of(model, next(source))
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        smoothed = loss.item() if smoothed is None else 0.95 * smoothed + 0.05 * loss.item()
        observe(step, smoothed)
    model.eval()


def _optimizers(model: PreTrainedModel, stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices if it has a rate; AdamW for everything else."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    matrices = inner if stage.muon_rate else []
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    decayed, free = [p for p in rest if p.ndim >= 2], [p for p in rest if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": stage.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=stage.rate, betas=(0.9, 0.98))]
    if matrices:
        more = {"weight_decay": stage.weight_decay, "momentum": 0.95, "ns_steps": 4}
        optimizers.append(torch.optim.Muon(matrices, lr=stage.muon_rate, **more))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["full_rate"] = group["lr"]
    return optimizers


def _set_rates(optimizers: list[torch.optim.Optimizer], scale: float) -> None:
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["full_rate"] * scale


@contextmanager
def frozen_rows(model: PreTrainedModel, ids: list[int]):
    """Within, these rows of the embedding get no gradient: training has to use what the words mean,
    and cannot memorise them.
    """
    weight = model.get_input_embeddings().weight
    mask = torch.ones(weight.shape[0], 1)
    mask[ids] = 0.0
    handle = weight.register_hook(lambda gradient: gradient * mask)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def free_layers(model: PreTrainedModel, begin: float, end: float):
    """Within, only the layers from one share of the model's depth to another are trained."""
    layers = model.model.layers
    chosen = layers[round(begin * len(layers)) : round(end * len(layers))]
    model.requires_grad_(False)
    chosen.requires_grad_(True)
    try:
        yield
    finally:
        model.requires_grad_(True)
