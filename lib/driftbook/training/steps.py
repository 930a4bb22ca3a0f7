"""Optimiser steps that use the machine: TRL's trainers, whose steps are laid out in forward passes
by the memory there is.

What a step is, which examples and which loss, is the study's; how its examples are laid out in
forward passes is the device's, and changes nothing but rounding, and which numbers dropout draws:

- SFT of methods that act on weights: examples one behind the other in a row, none of which sees
another (block-diagonal attention, positions of their own). With a soft prompt that would need a
mask of its own, and PEFT has none: these are padded, examples of like lengths together.
- DPO: a pair is one row in which the prompt stands once, and each answer sees the prompt and itself
(packing.tree), for every method.
- Where a model's own forward allows neither (models.probe), each sequence is a row of its own.
- The head is computed where the loss counts, with its gradient at once, so that no row of logits
outlives its part (as Liger's fused linear
  cross-entropy does: Hsu et al. 2024, arXiv 2410.10989).
- Where a forward pass finds no memory, half as many tokens are put into one; where a single example
finds none, activations are computed twice.
"""

import bisect
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback
from trl import DPOTrainer, SFTTrainer

from driftbook.models import adapters
from driftbook.models.layout import causal, expanded, padded
from driftbook.models.sampling import OutOfMemory, VariantFailure
from driftbook.models.scoring import LOGITS_AT_ONCE, engine_of
from driftbook.models.trees import tree
from driftbook.models.ways import say
from driftbook.study import progress
from driftbook.study.files import read_json, write_json
from driftbook.training.heads import Divergences, Targets
from driftbook.training.objectives import Second, put, taken

TOKENS_PER_PASS = {"cpu": 1_024, "cuda": 16_384}  # at first; halved where there is no memory
PACKS_PER_PASS = 4  # rows of a pass: attention costs the square of a row's length
CHECKPOINT_SECONDS = 600.0
WHOLE = "whole.json"  # written last into a checkpoint: one without it is torn
LOOK_BACK, DIVERGED = 20, 3.0  # steps, and nats above the first of them: the loss has diverged


@dataclass(frozen=True)
class Conversation:
    """One conversation in token ids [T] and the places [n] in it whose tokens the loss counts, none
    of them the first. Where training is constrained also the reference's log-probabilities [n] of
    these tokens, in nats, and how strongly each is held to them [n]; of an alignment example the
    base's last hidden states [n, width] that predict them."""

    ids: list[int]
    counted: np.ndarray
    reference: np.ndarray | None = None
    betas: np.ndarray | None = None
    states: torch.Tensor | None = None


@dataclass(frozen=True)
class Row:
    """One row of a forward pass: tokens [T], positions [T], where the subtree of each ends [T]
    (None: a token sees all before it in its own sequence), and for each of the row's sequences the
    places [n] that predict its counted tokens, and these tokens [n]; the conversations themselves,
    and of a preference the reference's log-probabilities of its two answers."""

    tokens: np.ndarray
    positions: np.ndarray
    ends: np.ndarray | None
    places: list[np.ndarray]
    targets: list[np.ndarray]
    reference: tuple[float, float] | None = None
    conversations: tuple[Conversation, ...] = ()


def plain(sequences: Sequence[Conversation]) -> Row:
    """Sequences one behind the other, each with positions from zero; a single one is itself."""
    starts = np.cumsum([0, *(len(one.ids) for one in sequences)])
    tokens = np.concatenate([one.ids for one in sequences])
    positions = np.concatenate([np.arange(len(one.ids)) for one in sequences])
    pairs = zip(starts, sequences, strict=False)
    places = [start + one.counted - 1 for start, one in pairs]
    return Row(tokens, positions, None, places, _targets(sequences), conversations=tuple(sequences))


def branching(sequences: Sequence[Conversation]) -> Row:
    """Sequences as one tree, in which what they begin with alike stands once."""
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].ids)
    made = tree([sequences[i].ids for i in order])
    path = dict(zip(order, made.paths, strict=True))
    places = [path[i][one.counted - 1] for i, one in enumerate(sequences)]
    ends, targets = made.ends, _targets(sequences)
    return Row(made.tokens, made.positions, ends, places, targets, conversations=tuple(sequences))


def _targets(sequences: Sequence[Conversation]) -> list[np.ndarray]:
    return [np.asarray(one.ids)[one.counted] for one in sequences]


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Numbers of rows, longest first, as many together as fit a budget of tokens when padded."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, budget // lengths[order[0]])
        yield order[:size]
        order = order[size:]


def bins(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Numbers of sequences that fit `width` tokens together: best fit (Johnson 1974)."""
    found: list[list[int]] = []
    room: list[tuple[int, int]] = []  # free tokens, number of the bin; sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(room, (lengths[i], -1))
        free, number = room.pop(at) if at < len(room) else (max(width, lengths[i]), len(found))
        if number == len(found):
            found.append([])
        found[number].append(i)
        bisect.insort(room, (free - lengths[i], number))
    return found


# ---- the forward pass
class Forward:
    """Log-probabilities with gradients, by the forward pass that scores, of any PEFT method; and of
    a base model itself.
    """

    def __init__(self, model: PeftModel | PreTrainedModel, autocast: bool = False):
        self.model, self.engine, self.autocast = model, engine_of(model), autocast
        tuned = isinstance(model, PeftModel)
        self.prompt_based = tuned and model.active_peft_config.is_prompt_learning
        self.n_virtual = self.engine.n_virtual
        self.device = self.engine.model.device
        head, ways = self.engine.model.get_output_embeddings(), self.engine.ways
        plain_head = type(head) is torch.nn.Linear and head.bias is None and ways.scale == 1
        self.linear_head = plain_head and not self.engine.softcap and not head.weight.requires_grad
        # a head that the adapter changes: the base's own logits are made without it
        changed = type(head) is not torch.nn.Linear or head.weight.requires_grad
        self.base_head = model.disable_adapter if tuned and changed else nullcontext

    def logprobs(self, rows: Sequence[Row]) -> list[list[torch.Tensor]]:
        """By row and sequence the log-probability [n] of its counted tokens, in nats."""
        return self._read(rows, [row.targets for row in rows], self._head)

    def states(self, rows: Sequence[Row]) -> list[list[torch.Tensor]]:
        """By row and sequence the last hidden states [n, width] that predict its counted tokens."""
        return self._read(rows, [row.targets for row in rows], lambda hidden, _: hidden)

    def divergences(self, rows: Sequence[Row]) -> list[list[torch.Tensor]]:
        """By row and sequence KL(base || model) [n] where its counted tokens are predicted, over
        the whole vocabulary, in nats; the conversations hold the base's states.
        """
        known = [[one.states for one in row.conversations] for row in rows]
        return self._read(rows, known, self._divergence)

    def _read(self, rows: Sequence[Row], known: list[list], head: Callable) -> list[list]:
        """By row and sequence what a head makes of the hidden states [n, width] that predict its
        counted tokens, and of what is known of them [n, ...].
        """
        longest = max(len(row.tokens) for row in rows) + self.n_virtual
        ways = self.engine.ways
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            if ways.shared and (ways.limit is None or longest <= ways.limit):
                return self._together(rows, known, head)
            say(self.engine.model, f"each text is trained on in a pass of its own: {ways.reason}")
            return [
                [
                    head(self._alone(one), [own])
                    for one, own in zip(row.conversations, parts, strict=True)
                ]
                for row, parts in zip(rows, known, strict=True)
            ]

    def _together(self, rows: Sequence[Row], known: list[list], head: Callable) -> list[list]:
        parts = [one for own in known for one in own]
        hidden, soft = self._hidden(rows)
        width = hidden.shape[1]
        where = [i * width + soft + place for i, row in enumerate(rows) for place in row.places]
        chosen = hidden.flatten(0, 1)[self.engine.tensor(np.concatenate(where))]
        found = iter(head(chosen, parts).split(list(map(len, parts))))
        return [[next(found) for _ in own] for own in known]

    def _alone(self, one: Conversation) -> torch.Tensor:
        """The hidden states [n, width] that predict its counted tokens, in a pass of its own."""
        prompt = self.model.get_prompt(batch_size=1)[0] if self.prompt_based else None
        return self.engine.plain([one.ids], prompt)[0][self.engine.tensor(one.counted - 1)]

    def _hidden(self, rows: Sequence[Row]) -> tuple[torch.Tensor, int]:
        """Last hidden states [rows, soft prompt + longest row, width], and the tokens of the soft
        prompt; rows are padded on the right, where nothing sees the padding.
        """
        width = max(len(row.tokens) for row in rows)
        inputs = padded([row.tokens for row in rows], width)
        positions, allowed = self._layout(rows, width)
        cache, soft = None, 0
        prompt = self.model.get_prompt(batch_size=1) if self.prompt_based else None
        if isinstance(prompt, torch.Tensor):
            soft, n, inputs = prompt.shape[1], len(rows), self.engine.embed(inputs)
            inputs = torch.cat([prompt.to(inputs.dtype).expand(n, -1, -1), inputs], 1)
            positions = np.hstack([np.broadcast_to(np.arange(soft), (n, soft)), soft + positions])
            allowed = None if allowed is None else _behind(allowed, soft)
        elif prompt is not None:
            cache = expanded([(layer.keys, layer.values) for layer in prompt.layers], len(rows))
        return self.engine.run(inputs, positions, allowed, cache), soft

    def _layout(self, rows: Sequence[Row], width: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Positions [rows, width], and which tokens each may see [rows, width, width]: None where
        the scorer makes the mask from the positions, or none is needed.
        """
        positions = padded([row.positions for row in rows], width)
        if rows[0].ends is not None:
            ends = padded([row.ends for row in rows], width)
            below = causal(width) & (np.arange(width)[:, None] < ends[:, None, :])
            return positions, below | np.eye(width, dtype=bool)
        if all(len(row.places) == 1 for row in rows):  # padding goes on counting: no mask is needed
            return np.broadcast_to(np.arange(width), positions.shape), None
        return positions, self.engine.documents(positions)

    def _head(self, hidden: torch.Tensor, said: list[np.ndarray]) -> torch.Tensor:
        targets = self.engine.tensor(np.concatenate(said))
        return self._by_head(Targets, self._generic, hidden, targets)

    def _divergence(self, hidden: torch.Tensor, states: list[torch.Tensor]) -> torch.Tensor:
        base = torch.cat(states).to(hidden.device)
        return self._by_head(Divergences, self._generic_divergence, hidden, base)

    def _by_head(
        self, linear: type, generic: Callable, hidden: torch.Tensor, known: torch.Tensor
    ) -> torch.Tensor:
        """A number of each hidden state, by the head as it is: linear and frozen, or any other."""
        if self.linear_head:
            weight = self.engine.model.get_output_embeddings().weight
            known = known.to(weight.dtype) if known.is_floating_point() else known
            return linear.apply(hidden.to(weight.dtype), weight, known)
        step = max(1, LOGITS_AT_ONCE // self.engine.model.get_input_embeddings().weight.shape[0])
        parts = zip(hidden.split(step), known.split(step), strict=True)
        return torch.cat([checkpoint(generic, *part, use_reentrant=False) for part in parts])

    def _generic(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.engine.head(hidden).log_softmax(1).gather(1, targets[:, None])[:, 0]

    def _generic_divergence(self, hidden: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), self.base_head():
            held = self.engine.head(base).log_softmax(1)
        return (held.exp() * (held - self.engine.head(hidden).log_softmax(1))).sum(1)


def _behind(allowed: np.ndarray, soft: int) -> np.ndarray:
    """The mask [rows, soft + T, soft + T] behind a soft prompt, which sees itself alone."""
    rows, width, _ = allowed.shape
    whole = np.zeros((rows, soft + width, soft + width), bool)
    whole[:, :soft, :soft] = causal(soft)
    whole[:, soft:, :soft], whole[:, soft:, soft:] = True, allowed
    return whole


# ---- the trainers
class _Steps:
    """An optimiser step in as many passes as memory allows, and checkpoints that hold all."""

    def __init__(
        self,
        *args: Any,
        forward: Forward,
        examples: Sequence,
        tokens_per_pass: int | None = None,
        second: Second | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.forward, self.examples, self.second = forward, examples, second
        self.tokens_per_pass = tokens_per_pass or TOKENS_PER_PASS.get(forward.device.type, 16_384)
        self.twice = False  # whether activations are computed twice instead of being kept
        self.remove_callback(PrinterCallback)  # the curve is kept; a line per step is noise
        self.data_collator = lambda members: {
            "step": _Members([i for one in members for i in one["members"]])
        }

    def training_step(
        self, model: PeftModel, inputs: dict, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The step's mean loss; its gradient is in the parameters."""
        model.train()
        chosen = [self.examples[i] for i in inputs["step"].numbers]
        while True:
            with suppress(torch.OutOfMemoryError):  # whose end frees the pass's activations
                return self._accumulated(chosen)
            self._use_less([len(row.tokens) for row in self._rows(chosen)])

    def _accumulated(self, chosen: Sequence) -> torch.Tensor:
        """The task's loss; in the parameters is its gradient, or what a second objective makes of
        it, whose own gradient is accumulated by itself.
        """
        step, rows, second = self.state.global_step, self._rows(chosen), self.second

        def loss(some: list[Row]) -> torch.Tensor:
            return self._loss(self.forward.logprobs(some), some, chosen)

        total = self._passes(rows, loss, step, 1.0 if second is None else 0.5)
        if second is not None:
            own = [value for value in self.model.parameters() if value.requires_grad]
            task, held = taken(own), second.members(step)
            with second.without_dropout(self.model):
                rows = self._together(held)
                value = self._passes(
                    rows, lambda some: second.loss(self.forward, some, held), step + 0.5, 0.5
                )
            put(own, second.joined(task, taken(own), float(value)))
        return total

    def _passes(self, rows: list[Row], loss: Callable, step: float, share: float) -> torch.Tensor:
        """The sum of a loss over rows, whose gradient is added up in the parameters; they are a
        share of a step's work.
        """
        total, n_done = 0.0, 0
        lengths = [len(row.tokens) + self.forward.n_virtual for row in rows]
        for part in batches(lengths, self.tokens_per_pass):
            found = loss([rows[i] for i in part])
            self.accelerator.backward(found)
            total += found.detach()
            n_done += len(part)
            progress.reach("steps", step + share * n_done / len(rows))
        return total

    def _together(self, chosen: Sequence[Conversation]) -> list[Row]:
        """Conversations in rows: one behind the other where the method and the model allow it."""
        if self.forward.prompt_based or not self.forward.engine.ways.packed:
            return [plain([one]) for one in chosen]
        width = max(self.tokens_per_pass // PACKS_PER_PASS, max(len(one.ids) for one in chosen))
        packs = bins([len(one.ids) for one in chosen], width)
        return [plain([chosen[i] for i in members]) for members in packs]

    def _use_less(self, lengths: list[int]) -> None:
        """Half the tokens of a pass, then activations computed twice, then OutOfMemory."""
        self.model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        if self.tokens_per_pass > max(lengths):
            self.tokens_per_pass //= 2
        elif not self.twice and self.forward.engine.virtual_cache is None:
            self._compute_twice()
        else:
            raise OutOfMemory(
                "out of memory while training on a single example; lower training.max_length, or"
                " use a device with more memory"
            )

    def _compute_twice(self) -> None:
        self.twice, base = True, self.forward.engine.model
        base.gradient_checkpointing_enable({"use_reentrant": False})
        # the hook on its embedding, which would stay; without re-entrance no input needs a gradient
        base.disable_input_require_grads()

    def floating_point_ops(self, inputs: dict) -> int:
        return 0

    # ---- checkpoints: PEFT's own would lose P-Tuning's encoder
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        kept = {name: one for name, one in self.model.named_parameters() if one.requires_grad}
        state = {name: value.detach().contiguous().cpu() for name, value in kept.items()}
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file(state, Path(output_dir, "trained.safetensors"))

    def _save_checkpoint(self, model: PeftModel, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        try:
            Trainer._save_checkpoint(self, model, trial)
            new = folder / f"checkpoint-{self.state.global_step}"
            kept = {"tokens_per_pass": self.tokens_per_pass, "twice": self.twice}
            kept |= {"second": self.second.state} if self.second else {}
            write_json(new / WHOLE, kept)
            for old in folder.glob("checkpoint-*"):  # until now the old one was the last whole one
                if old != new:
                    shutil.rmtree(old)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap them
            free = shutil.disk_usage(folder).free
            raise OSError(
                f"no checkpoint can be written to {folder} ({free / 1e9:.2f} GB free;"
                f" {str(error).strip().partition(chr(10))[0]}); make room and run again: it goes on"
                " from the last whole one"
            ) from None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.model.load_state_dict(load_file(folder / "trained.safetensors"), strict=False)
        kept = read_json(folder / WHOLE)
        self.tokens_per_pass = kept["tokens_per_pass"]
        if self.second:
            self.second.state = kept["second"]
        if kept["twice"] and not self.twice:
            self._compute_twice()


@dataclass(frozen=True)
class _Members:
    """The numbers of a step's examples, in a wrapping that accelerate hands on as it is."""

    numbers: list[int]


def sft_loss(found: list[list[torch.Tensor]], n: int) -> torch.Tensor:
    """Minus the sum of the counted tokens' log-probabilities, divided by n."""
    return -sum(part.sum() for row in found for part in row) / n


def dpo_loss(found: list[list[torch.Tensor]], rows: list[Row], beta: float) -> torch.Tensor:
    """The sum over pairs of -log sigmoid(beta x margin) (Rafailov et al. 2023, eq. 7)."""
    sums = torch.stack([torch.stack([one.sum() for one in row]) for row in found])
    gained = sums - torch.tensor([row.reference for row in rows], device=sums.device)
    margin = beta * (gained[:, 0] - gained[:, 1])
    return -torch.nn.functional.logsigmoid(margin).sum()


@torch.no_grad()
def example_loss(example: "Conversation | Pair", model: PeftModel, beta: float) -> float:
    """The loss of a step that holds this one example: of SFT, or of DPO for a pair."""
    forward = Forward(model)
    if isinstance(example, Pair):
        row = pair_row(example)
        return float(dpo_loss(forward.logprobs([row]), [row], beta))
    return float(sft_loss(forward.logprobs([plain([example])]), len(example.counted)))


class Sft(_Steps, SFTTrainer):
    """Examples are `Conversation`s; the loss is the mean over the step's counted tokens."""

    def _rows(self, chosen: Sequence[Conversation]) -> list[Row]:
        return self._together(chosen)

    def _loss(
        self, found: list[list[torch.Tensor]], rows: list[Row], chosen: Sequence[Conversation]
    ) -> torch.Tensor:
        return sft_loss(found, sum(len(one.counted) for one in chosen))


class ConstrainedSft(Sft):
    """Fine-tuning in which the first tokens of an answer are held to the model before it (Qi et al.
    2025, arXiv 2406.05946, eq. 3).

    A token counts -(2 / beta) log sigmoid(beta delta), delta its log-probability minus the
    reference's, whose gradient is that of SFT times 2 (1 - sigmoid(beta delta)): a token that has
    gained much pulls no more. A constant is added by which it equals the token's own loss where
    nothing has changed, and for beta to 0 everywhere.
    """

    def _loss(
        self, found: list[list[torch.Tensor]], rows: list[Row], chosen: Sequence[Conversation]
    ) -> torch.Tensor:
        total = 0.0
        for parts, row in zip(found, rows, strict=True):
            for part, one in zip(parts, row.conversations, strict=True):
                reference = torch.as_tensor(one.reference, dtype=part.dtype, device=part.device)
                beta = torch.as_tensor(one.betas, dtype=part.dtype, device=part.device)
                squashed = torch.nn.functional.logsigmoid(beta * (part - reference))
                total = total - (2 / beta * (squashed + math.log(2)) + reference).sum()
        return total / sum(len(one.counted) for one in chosen)


@dataclass(frozen=True)
class Pair:
    """A preference: its two conversations, and the reference's log-probabilities of the answers."""

    chosen: Conversation
    rejected: Conversation
    reference: tuple[float, float]


def pair_row(pair: Pair) -> Row:
    """A preference as one row, in which the prompt stands once."""
    return replace(branching([pair.chosen, pair.rejected]), reference=pair.reference)


class Dpo(_Steps, DPOTrainer):
    """Examples are `Pair`s; the loss is the mean of `dpo_loss` over the step's pairs."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def _precompute_ref_logps(self, dataset, *args, **kwargs):
        return dataset

    def _rows(self, chosen: Sequence[Pair]) -> list[Row]:
        return list(map(pair_row, chosen))

    def _loss(
        self, found: list[list[torch.Tensor]], rows: list[Row], chosen: Sequence[Pair]
    ) -> torch.Tensor:
        return dpo_loss(found, rows, self.beta) / len(chosen)


class Snapshots(TrainerCallback):
    """Saves the adapter `n` times along its training, evenly and at its end: folder/step-00012/."""

    def __init__(self, folder: Path, n: int):
        self.folder, self.n = folder, n

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: PeftModel | None = None, **kwargs: Any
    ) -> None:
        due = {max(1, round(state.max_steps * i / self.n)) for i in range(1, self.n + 1)}
        if state.global_step in due:
            adapters.save(model, self.folder / f"step-{state.global_step:05d}")


class StopOnDivergence(TrainerCallback):
    """Ends a training whose loss or gradient is not finite, or whose loss stays far up."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        known = [entry for entry in state.log_history if "loss" in entry]  # of one that goes on
        self.losses = [float(entry["loss"]) for entry in known]

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs, step = logs or {}, state.global_step
        for name in ("loss", "grad_norm"):
            if name in logs and not math.isfinite(float(logs[name])):
                raise VariantFailure(f"training diverged: {name} is {logs[name]} at step {step}")
        self.losses += [float(logs["loss"])] if "loss" in logs else []
        first, last = self.losses[:LOOK_BACK], self.losses[-LOOK_BACK:]
        if len(self.losses) >= 2 * LOOK_BACK and min(last) > max(first) + DIVERGED:
            raise VariantFailure(
                f"training diverged: the loss has been above {min(last):.1f} for {LOOK_BACK} steps"
                f" at step {step}; it began at {first[0]:.1f}"
            )


class SaveNowAndThen(TrainerCallback):
    """Asks for a checkpoint where the last one is older than CHECKPOINT_SECONDS."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        due = time.monotonic() - self.last >= CHECKPOINT_SECONDS
        if due and state.global_step < state.max_steps:
            control.should_save, self.last = True, time.monotonic()


def last_whole(folder: Path) -> str | None:
    """The newest whole checkpoint of a folder; torn ones are deleted."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in found:
        if not (path / WHOLE).is_file():
            shutil.rmtree(path)
    whole = [path for path in found if path.exists()]
    return str(whole[-1]) if whole else None
