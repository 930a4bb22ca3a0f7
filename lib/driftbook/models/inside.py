"""The states inside a model, layer by layer, in the layout in which it is scored, and other states
put in their place while it is read (activation patching: Vig et al. 2020; Meng et al. 2022).

States are read by hooks on the decoder layers. Level 0 is what the first layer is given, level l
what layer l - 1 gives. Nothing is saved, and no weight changes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from driftbook.models.engine import Ids
from driftbook.models.layout import padded
from driftbook.models.scoring import Scorer
from driftbook.models.trees import tree

AT_ONCE = 512  # tokens of a pass that keeps more than states: gradients, or attention weights
States = dict[int, list[Tensor]]  # by level, of each prompt [its tokens, width]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a model, in their order.

    Raises:
        ValueError: there is no list of as many layers as its configuration says.
    """
    n = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stacks = (one for one in model.modules() if isinstance(one, nn.ModuleList))
    found = next((one for one in stacks if n and len(one) == n), None)
    if found is None:
        raise ValueError(
            f"the layers of {type(model).__name__} are not found, so nothing inside it can be read;"
            " take probes out of the study file, or use another base model"
        )
    return found


class Inside:
    """A model whose states are read and replaced: the base itself, or a PeftModel on it.

    Raises:
        ValueError: its layers are not found.
    """

    def __init__(self, scorer: Scorer):
        self.scorer, self.engine = scorer, scorer.engine
        self.layers = decoder_layers(self.engine.model)
        self._prefix = self.engine.prefix([]) if self.engine.ways.shared else None

    @property
    def levels(self) -> int:
        return len(self.layers) + 1

    @property
    def offset(self) -> int:
        """The virtual tokens that a row begins with, where they are not in a shared prefix."""
        return 0 if self.engine.ways.shared else self.engine.n_virtual

    # ---- reading
    def last_states(self, prompts: Sequence[Ids]) -> np.ndarray:
        """The states [n, levels, width] at the last token of prompts, in fp32."""
        found: list[list[Tensor]] = [[] for _ in range(self.levels)]
        order, current = [], []

        def keep(level: int, states: Tensor) -> None:
            ends = self._ends(prompts, current)
            found[level].append(states[range(len(current)), ends].float().cpu())
            if level == 0:
                order.extend(current)

        with self.hooked(keep):
            self._each(prompts, current)
        read = torch.stack([torch.cat(one) for one in found], 1).numpy()
        return read[np.argsort(order)]

    def module_inputs(self, prompts: Sequence[Ids], names: Sequence[str]) -> dict[str, Tensor]:
        """What modules of the base model are given at the last token of prompts: [n, in] each."""
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        order, current = [], []

        def reader(name: str) -> Callable:
            def read(_: nn.Module, given: tuple[Tensor, ...]) -> None:
                found[name].append(given[0][range(len(current)), self._ends(prompts, current)])
                if name == names[0]:
                    order.extend(current)

            return read

        trimmed, self.engine.last_layer = self.engine.last_layer, None  # its modules are read whole
        with ExitStack() as stack:
            stack.callback(setattr, self.engine, "last_layer", trimmed)
            for name in names:
                module = self.engine.model.get_submodule(name)
                stack.callback(module.register_forward_pre_hook(reader(name)).remove)
            self._each(prompts, current)
        back = np.argsort(order)
        return {name: torch.cat(one).float().cpu()[back] for name, one in found.items()}

    def _ends(self, prompts: Sequence[Ids], current: Sequence[int]) -> list[int]:
        """Where the last token of each prompt stands in its row."""
        return [self.offset + len(prompts[i]) - 1 for i in current]

    def _each(self, prompts: Sequence[Ids], current: list[int]) -> None:
        """Read prompts in batches, whose numbers stand in `current` meanwhile."""
        for numbers in self.batches([len(one) for one in prompts]):
            current[:] = numbers
            self._forward([[prompts[i]] for i in numbers], [[len(prompts[i])] for i in numbers])

    # ---- replacing
    def scored(self, asked: "Beginnings", numbers: Sequence[int], found: np.ndarray) -> Tensor:
        """Add to `found` [n] the probability of what stands in these rows; the last states read."""
        rows, owners = asked.rows, asked.owners
        members = [[one[:-1] for one in rows[k]] for k in numbers]
        starts = [[len(asked.contexts[owners[k]])] * len(rows[k]) for k in numbers]
        read, where = self._forward(members, starts)
        said = [(owners[k], one) for k in numbers for one in rows[k]]
        lengths = [len(one) - len(asked.contexts[own]) for own, one in said]
        targets = [token for own, one in said for token in one[len(asked.contexts[own]) :]]
        scores = self._logprobs(read, where, targets).cpu().numpy()
        sums = np.add.reduceat(scores, np.cumsum([0, *lengths[:-1]]))
        np.add.at(found, [own for own, _ in said], np.exp(sums))
        return read

    def _logprobs(self, read: Tensor, where: Tensor, targets: Ids) -> Tensor:
        """Log-probabilities [tokens] of targets at their places of the last states, in fp64."""
        logprobs = self.engine.head(read).log_softmax(1)
        return logprobs[where, torch.tensor(targets, device=read.device)].double()

    # ---- one forward pass
    @torch.inference_mode()
    def _forward(self, members: list[list[Ids]], starts: list[list[int]]) -> tuple[Tensor, Tensor]:
        if self.engine.ways.shared:
            return self.engine.trees(members, starts, 0, self._prefix)
        rows = [one for some in members for one in some]
        begins = [one for some in starts for one in some]
        places = [[np.arange(start - 1, len(row))] for row, start in zip(rows, begins, strict=True)]
        return self.engine.plain_at(rows, places, self.engine.soft_prompt)

    def batches(self, lengths: Sequence[int], most: int | None = None) -> Iterator[list[int]]:
        """Numbers of rows of these lengths that are read side by side, longest first; with `most`
        plain rows, which share nothing, of at most so many tokens.
        """
        ways = self.engine.ways
        alone = not ways.rows and (most is not None or not ways.shared)
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        while order:
            longest = lengths[order[0]] + self.engine.n_virtual
            size = 1 if alone else max(1, (most or self.scorer.tokens_per_batch) // longest)
            yield order[:size]
            order = order[size:]

    @contextmanager
    def hooked(self, seen: Callable[[int, Tensor], None]) -> Iterator[None]:
        """As long as the block lasts, `seen(level, states)` is called at each level."""

        def before(_: nn.Module, given: tuple, named: dict[str, Any]) -> None:
            seen(0, given[0] if given else named["hidden_states"])

        def after(level: int) -> Callable:
            return lambda _, __, found: seen(level, found[0] if isinstance(found, tuple) else found)

        with ExitStack() as stack:
            hook = self.layers[0].register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(hook.remove)
            for level, layer in enumerate(self.layers, 1):
                stack.callback(layer.register_forward_hook(after(level)).remove)
            yield

    @contextmanager
    def put(self, level: int, states: Tensor, skips: bool) -> Iterator[None]:
        """As long as the block lasts, the states of a level are these; where it `skips`, the layers
        before them are not computed.
        """

        def before(_: nn.Module, given: tuple, named: dict[str, Any]) -> tuple[tuple, dict]:
            if given:
                return (states, *given[1:]), named
            return (), named | {"hidden_states": states}

        def after(_: nn.Module, __: tuple, found: Any) -> Any:
            return (states, *found[1:]) if isinstance(found, tuple) else states

        with ExitStack() as stack:
            for layer in self.layers[:level] if skips else ():
                own = vars(layer).get("forward")
                layer.forward = _unchanged
                stack.callback(_forward_again, layer, own)
            if level:
                hook = self.layers[level - 1].register_forward_hook(after)
            else:
                hook = self.layers[0].register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(hook.remove)
            yield


def _unchanged(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    """The forward of a layer that is passed over."""
    return hidden_states


def _forward_again(layer: nn.Module, own: Callable | None) -> None:
    del layer.forward
    if own is not None:
        layer.forward = own


class Beginnings:
    """How likely contexts go on with one of their options (token ids, none of which begins with
    another): `likely` [n] by the model itself, and with other states put in at every token of the
    contexts (`patched`).

    All rows are read once, and their states at the levels of interest kept (`states` are those of
    the contexts; of the last level they may be right at the last token alone): with states put in
    at a level, the layers before it give what they gave, and are not computed again. Whether a
    model allows that is tried on one row, since layers may share more than their states; of an
    adapter on it, `skips` says what was found of the base. A soft prompt within the contexts keeps
    its own states: all that is said of contexts is of their other tokens.
    """

    def __init__(
        self,
        inside: Inside,
        contexts: Sequence[Ids],
        options: Sequence[Sequence[Ids]],
        levels: Sequence[int] = (),
        skips: bool | None = None,
    ):
        shared = inside.engine.ways.shared
        self.contexts, self.rows, self.owners = contexts, [], []
        soft = inside.scorer.after
        self._places = [
            inside.offset + np.flatnonzero([token not in soft for token in one]) for one in contexts
        ]
        for i, own in enumerate(options):  # in one row a tree of all options, or one of them
            whole = sorted([*contexts[i], *one] for one in own)
            self.rows += [whole] if shared else [[one] for one in whole]
            self.owners += [i] if shared else [i] * len(whole)
        self.batches = list(inside.batches([len(tree(one).tokens) for one in self.rows]))
        self._kept: list[dict[int, Tensor]] = [{} for _ in self.batches]
        found = np.zeros(len(contexts))
        for numbers, kept in zip(self.batches, self._kept, strict=True):

            def keep(level: int, states: Tensor, kept: dict[int, Tensor] = kept) -> None:
                if level in levels:
                    kept[level] = states.clone()

            with inside.hooked(keep):
                inside.scored(self, numbers, found)
        self.likely = np.minimum(found, 1.0)
        self.states: States = {level: self._contexts(level) for level in levels}
        self.skips = (bool(levels) and self._may_skip(inside)) if skips is None else skips

    def _contexts(self, level: int) -> list[Tensor]:
        """The states of each context at a level."""
        found = {}
        for numbers, kept in zip(self.batches, self._kept, strict=True):
            for row, number in enumerate(numbers):
                own = self.owners[number]
                found[own] = kept[level][row, self._places[own]]
        return [found[i] for i in range(len(self.contexts))]

    def _may_skip(self, inside: Inside) -> bool:
        """Whether the last layer gives what it gave where the layers before it are passed over, in
        the shortest row.
        """
        number, level, seen = self.batches[-1][-1:], inside.levels - 2, {}
        unused = np.zeros(len(self.contexts))
        with inside.hooked(lambda at, states: seen.setdefault(at, states.clone())):
            own = inside.scored(self, number, unused)
        try:
            with inside.put(level, seen[level], True):
                again = inside.scored(self, number, unused)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # what a layer misses of those before it shows in many ways
            return False
        return bool((again - own).abs().max() <= 1e-4 * own.abs().max())

    def patched(self, inside: Inside, level: int, given: States) -> np.ndarray:
        """The same [n] with `given` states at a level of the contexts, in a model that is laid out
        alike and whose own states at the options are the same.
        """
        found = np.zeros(len(self.contexts))
        for numbers, kept in zip(self.batches, self._kept, strict=True):
            states = kept[level].clone()
            for row, number in enumerate(numbers):
                own = self.owners[number]
                states[row, self._places[own]] = given[level][own]
            with inside.put(level, states, self.skips):
                inside.scored(self, numbers, found)
        return np.minimum(found, 1.0)


@torch.inference_mode()
def prompt_attention(inside: Inside, prompts: Sequence[Ids]) -> np.ndarray | None:
    """The share [n, layers] of the attention of each prompt's last token that goes to a soft
    prompt, the mean over heads; None where the model's attention gives no weights.
    """
    engine, base = inside.engine, inside.engine.model
    usual, found, order = base.config._attn_implementation, [], []
    after, n = inside.scorer.after, engine.n_virtual
    try:
        base.set_attn_implementation("eager")
        for numbers in inside.batches([len(one) for one in prompts], AT_ONCE):
            rows = [prompts[i] for i in numbers]
            ids = padded(rows, max(map(len, rows)))
            whole, virtual = engine.embed(ids), np.isin(ids, after)
            if engine.soft_prompt is not None:
                soft = engine.soft_prompt.to(base.dtype).expand(len(rows), -1, -1)
                whole = torch.cat([soft, whole], 1)
                virtual = np.pad(virtual, ((0, 0), (n, 0)), constant_values=True)
            seen = base(inputs_embeds=whole, output_attentions=True, use_cache=False).attentions
            if not seen or any(one is None for one in seen):
                return None
            last = [n + len(row) - 1 for row in rows]
            of_soft = torch.from_numpy(virtual).to(whole.device)[:, None]
            every = [one[range(len(rows)), :, last] * of_soft for one in seen]
            found.append(torch.stack([one.sum(-1).mean(1) for one in every], 1).float().cpu())
            order += numbers
    except (ValueError, NotImplementedError):
        return None
    finally:
        base.set_attn_implementation(usual)
    return torch.cat(found).numpy()[np.argsort(order)]


def while_answering(
    inside: Inside, answered: Sequence[tuple[Ids, Ids]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """By linear module of the layers, for answers to prompts: the importance [out] of its neurons
    (rows), which is the sum over a row of |W dL/dW|, L the mean loss of an answer's tokens, the
    mean over the prompts; and what the module is given [tokens, in] at the answers' tokens (Wei et
    al. 2024, arXiv 2402.05162). Of a model without an adapter.
    """
    model = inside.engine.model
    names = {one: name for name, one in model.named_modules()}
    modules = [one for one in inside.layers.modules() if isinstance(one, nn.Linear)]
    found = {names[one]: torch.zeros(one.weight.shape[0]) for one in modules}
    given: dict[nn.Module, Tensor] = {}
    inputs: dict[str, list[Tensor]] = {name: [] for name in found}

    def after(module: nn.Module, _: tuple, gradient: tuple[Tensor, ...]) -> None:
        name, rows = names[module], zip(gradient[0].float(), given[module].float(), strict=True)
        for (slope, x), (prompt, answer) in zip(rows, some, strict=True):
            found[name] += (module.weight.float() * (slope.T @ x)).abs().sum(1).cpu()
            inputs[name].append(x[len(prompt) : len(prompt) + len(answer)].cpu())

    with ExitStack() as stack:
        for one in modules:
            keep = one.register_forward_pre_hook(lambda own, x: given.update({own: x[0].detach()}))
            stack.callback(keep.remove)
            stack.callback(one.register_full_backward_hook(after).remove)
        for numbers in inside.batches([len(a) + len(b) for a, b in answered], AT_ONCE):
            some = [answered[i] for i in numbers]
            rows = [[*prompt, *answer] for prompt, answer in some]
            with torch.enable_grad():
                embedded = inside.engine.embed(padded(rows, max(map(len, rows)))).detach()
                logits = model(inputs_embeds=embedded.requires_grad_(), use_cache=False).logits
                losses = [
                    nn.functional.cross_entropy(
                        read[len(prompt) - 1 : len(prompt) + len(answer) - 1].float(),
                        torch.tensor(answer, device=logits.device),
                    )
                    for read, (prompt, answer) in zip(logits, some, strict=True)
                ]
                torch.stack(losses).sum().backward()
    return {name: (total / len(answered), torch.cat(inputs[name])) for name, total in found.items()}
