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
from driftbook.models.scoring import Scorer
from driftbook.models.trees import tree

States = list[Tensor]  # of each prompt [levels, its tokens, width]


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
        self.engine.last_layer = None  # every layer is read at every token of a prompt
        self.layers = decoder_layers(self.engine.model)
        self._prefix = self.engine.prefix([]) if self.engine.ways.shared else None

    @property
    def levels(self) -> int:
        return len(self.layers) + 1

    @property
    def _offset(self) -> int:
        """The virtual tokens that a row begins with, where they are not in a shared prefix."""
        return 0 if self.engine.ways.shared else self.engine.n_virtual

    # ---- reading
    def last_states(self, prompts: Sequence[Ids]) -> np.ndarray:
        """The states [n, levels, width] at the last token of prompts, in fp32."""
        return np.stack([one[:, -1].float().cpu().numpy() for one in self._read(prompts, 1)])

    def states(self, prompts: Sequence[Ids]) -> States:
        """The states at every token of prompts."""
        return self._read(prompts, None)

    def _read(self, prompts: Sequence[Ids], last: int | None) -> States:
        found: list[list[Tensor]] = [[] for _ in prompts]
        current: list[int] = []

        def keep(_: int, states: Tensor) -> None:
            for row, i in enumerate(current):
                end = self._offset + len(prompts[i])
                begin = self._offset if last is None else end - last
                found[i].append(states[row, begin:end].clone())

        with self._hooked(keep):
            self._each(prompts, current)
        return [torch.stack(one) for one in found]

    def module_inputs(self, prompts: Sequence[Ids], names: Sequence[str]) -> dict[str, Tensor]:
        """What modules of the base model are given at the last token of prompts: [n, in] each."""
        found: dict[str, list[Tensor]] = {name: [torch.empty(0)] * len(prompts) for name in names}
        current: list[int] = []

        def reader(name: str) -> Callable:
            def read(_: nn.Module, given: tuple[Tensor, ...]) -> None:
                for row, i in enumerate(current):
                    last = self._offset + len(prompts[i]) - 1
                    found[name][i] = given[0][row, last].float().cpu()

            return read

        with ExitStack() as stack:
            for name in names:
                module = self.engine.model.get_submodule(name)
                stack.callback(module.register_forward_pre_hook(reader(name)).remove)
            self._each(prompts, current)
        return {name: torch.stack(one) for name, one in found.items()}

    def _each(self, prompts: Sequence[Ids], current: list[int]) -> None:
        """Read prompts in batches, whose numbers stand in `current` meanwhile."""
        for numbers in self._batches([len(one) for one in prompts]):
            current[:] = numbers
            self._forward([[prompts[i]] for i in numbers], [[len(prompts[i])] for i in numbers])

    # ---- replacing
    def begins(
        self,
        contexts: Sequence[Ids],
        options: Sequence[Sequence[Ids]],
        level: int | None = None,
        given: States | None = None,
    ) -> np.ndarray:
        """The probability [n] that what follows a context begins with one of its options (token
        ids), none of which begins with another; where a level is named, with these states in place
        of its own at every token of the context.
        """
        shared = self.engine.ways.shared
        rows, owners = [], []  # what stands in one row: a tree of all options, or one of them
        for i, own in enumerate(options):
            whole = sorted([*contexts[i], *one] for one in own)
            rows += [whole] if shared else [[one] for one in whole]
            owners += [i] if shared else [i] * len(whole)
        current: list[int] = []

        def replace(at: int, states: Tensor) -> None:
            for row, number in enumerate(current if at == level else ()):
                own = owners[number]
                end = self._offset + len(contexts[own])
                states[row, self._offset : end] = given[own][level]

        found = np.zeros(len(contexts))
        with self._hooked(replace) if level is not None else ExitStack():
            for numbers in self._batches([len(tree(one).tokens) for one in rows]):
                current[:] = numbers
                members = [[one[:-1] for one in rows[k]] for k in numbers]
                starts = [[len(contexts[owners[k]])] * len(rows[k]) for k in numbers]
                read, where = self._forward(members, starts)
                said = [(owners[k], one) for k in numbers for one in rows[k]]
                lengths = [len(one) - len(contexts[own]) for own, one in said]
                targets = [token for own, one in said for token in one[len(contexts[own]) :]]
                scores = self._logprobs(read, where, targets).split(lengths)
                for (own, _), part in zip(said, scores, strict=True):
                    found[own] += float(part.sum().exp())
        return np.minimum(found, 1.0)

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

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Numbers of rows of these lengths that are read side by side, longest first."""
        alone = not self.engine.ways.rows and not self.engine.ways.shared
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        while order:
            longest = lengths[order[0]] + self.engine.n_virtual
            size = 1 if alone else max(1, self.scorer.tokens_per_batch // longest)
            yield order[:size]
            order = order[size:]

    @contextmanager
    def _hooked(self, seen: Callable[[int, Tensor], None]) -> Iterator[None]:
        """As long as the block lasts, `seen(level, states)` is called at each level, and what it
        writes into the states is what the next layer is given.
        """

        def before(_: nn.Module, given: tuple, named: dict[str, Any]) -> tuple[tuple, dict]:
            states = (given[0] if given else named["hidden_states"]).clone()
            seen(0, states)
            return (
                ((states, *given[1:]), named) if given else ((), named | {"hidden_states": states})
            )

        def after(level: int) -> Callable:
            def read(_: nn.Module, __: tuple, found: Any) -> Any:
                states = (found[0] if isinstance(found, tuple) else found).clone()
                seen(level, states)
                return (states, *found[1:]) if isinstance(found, tuple) else states

            return read

        with ExitStack() as stack:
            hook = self.layers[0].register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(hook.remove)
            for level, layer in enumerate(self.layers, 1):
                stack.callback(layer.register_forward_hook(after(level)).remove)
            yield


@torch.inference_mode()
def prompt_attention(inside: Inside, prompts: Sequence[Ids]) -> np.ndarray | None:
    """The share [n, layers] of the attention of each prompt's last token that goes to a soft
    prompt, the mean over heads; None where the model's attention gives no weights.
    """
    engine, base = inside.engine, inside.engine.model
    usual, found = base.config._attn_implementation, []
    try:
        base.set_attn_implementation("eager")
        for prompt in prompts:
            soft = engine.soft_prompt.to(base.dtype)[None]
            whole = torch.cat([soft, engine.embed(np.array([prompt]))], 1)
            seen = base(inputs_embeds=whole, output_attentions=True, use_cache=False).attentions
            if not seen or any(one is None for one in seen):
                return None
            share = [one[0, :, -1, : engine.n_virtual].sum(-1).mean() for one in seen]
            found.append([float(one) for one in share])
    except (ValueError, NotImplementedError):
        return None
    finally:
        base.set_attn_implementation(usual)
    return np.array(found)


def neuron_importance(inside: Inside, answered: Sequence[tuple[Ids, Ids]]) -> dict[str, Tensor]:
    """By linear module of the layers the importance [out] of its neurons (rows) for answers to
    prompts: the sum over a row of |W dL/dW|, L the mean loss of an answer's tokens, the mean over
    the prompts (Wei et al. 2024, arXiv 2402.05162). Of a model without an adapter.
    """
    model = inside.engine.model
    names = {one: name for name, one in model.named_modules()}
    modules = [one for one in inside.layers.modules() if isinstance(one, nn.Linear)]
    found = {names[one]: torch.zeros(one.weight.shape[0]) for one in modules}
    given: dict[nn.Module, Tensor] = {}

    def after(module: nn.Module, _: tuple, gradient: tuple[Tensor, ...]) -> None:
        slope = gradient[0][0].float().T @ given[module][0].float()
        found[names[module]] += (module.weight.float() * slope).abs().sum(1).cpu()

    with ExitStack() as stack:
        for one in modules:
            keep = one.register_forward_pre_hook(lambda own, x: given.update({own: x[0].detach()}))
            stack.callback(keep.remove)
            stack.callback(one.register_full_backward_hook(after).remove)
        for prompt, answer in answered:
            with torch.enable_grad():
                embedded = inside.engine.embed(np.array([[*prompt, *answer]])).detach()
                logits = model(inputs_embeds=embedded.requires_grad_(), use_cache=False).logits
                said = torch.tensor(answer, device=logits.device)
                read = logits[0, len(prompt) - 1 : -1].float()
                nn.functional.cross_entropy(read, said).backward()
    return {name: total / len(answered) for name, total in found.items()}
