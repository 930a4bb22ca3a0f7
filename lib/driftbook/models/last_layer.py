"""The last layer of a model, computed only at the tokens that something is read from.

What the last layer says at any other token is used by nothing: later tokens look at its key and
value there, and no further layer follows. So its queries, its attention, what comes of them and its
MLP are computed at the tokens that are read, and zeros stand everywhere else. In a model of four
layers that saves a fifth of the work, in one of thirty a thirtieth. Whether a model allows it is
tried (models.probe).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# modules of a layer that look at each token by itself, and that no key or value comes from
BY_TOKEN = ("q_proj", "o_proj", "mlp")
SDPA = "sdpa"  # the attention whose queries can be left out


class LastLayer:
    """A model's last layer; nothing can be left out where its parts have other names."""

    def __init__(self, model: PreTrainedModel):
        n = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        stacks = [one for one in model.base_model.modules() if isinstance(one, nn.ModuleList)]
        layers = next((one for one in stacks if len(one) == n), [])
        named = list(layers[-1].named_modules()) if layers else []
        ends = [(name.rpartition(".")[2], one) for name, one in named]
        self.by_token = [one for name, one in ends if name in BY_TOKEN]
        self.attention = next((one for _, one in ends if hasattr(one, "q_proj")), None)

    @contextmanager
    def read_at(self, places: np.ndarray, rows: int, tokens: int) -> Iterator[None]:
        """As long as the block lasts, a forward pass of [rows, tokens] gives what is right at
        `places` (row x tokens + token, ascending) alone.
        """
        if not self.by_token:
            yield
            return
        device = next(self.by_token[0].parameters()).device
        flat = torch.from_numpy(places).to(device)

        def narrowed(_, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            states, *rest = given
            return states.flatten(0, 1)[flat][None], *rest

        def widened(_, __, found: Tensor) -> Tensor:
            whole = found.new_zeros(rows * tokens, found.shape[-1])
            whole[flat] = found[0]
            return whole.view(rows, tokens, -1)

        with ExitStack() as stack:
            for module in self.by_token:
                stack.callback(module.register_forward_pre_hook(narrowed).remove)
                stack.callback(module.register_forward_hook(widened).remove)
            stack.enter_context(self._few_queries(places, rows, tokens, device))
            yield

    @contextmanager
    def _few_queries(
        self, places: np.ndarray, rows: int, tokens: int, device: torch.device
    ) -> Iterator[None]:
        """The attention of the last layer for the queries at `places` alone, as many in each row as
        in the row that has most.
        """
        usual = ALL_ATTENTION_FUNCTIONS[SDPA]
        row, token = np.divmod(places, tokens)
        counts = np.bincount(row, minlength=rows)
        nth = np.arange(len(places)) - np.repeat(counts.cumsum() - counts, counts)
        chosen = np.zeros((rows, counts.max()), np.int64)
        chosen[row, nth] = token
        which = torch.from_numpy(chosen).to(device)
        each = torch.arange(rows, device=device)[:, None]

        def attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any
        ) -> tuple[Tensor, Any]:
            if module is not self.attention or not _covers(mask, query, key):
                return usual(module, query, key, value, mask, **given)
            few = query.transpose(1, 2)[each, which].transpose(1, 2)
            seen = mask.expand(rows, -1, -1, -1)[:, 0][each, which][:, None]
            found, _ = usual(module, few, key, value, seen, **given)
            whole = found.new_zeros(rows, tokens, *found.shape[2:])
            whole[each, which] = found
            return whole, None

        with _replaced(attention):
            yield


def _covers(mask: Any, query: Tensor, key: Tensor) -> bool:
    """Whether a mask says who sees whom, alike for all heads."""
    wanted = (1, query.shape[2], key.shape[2])
    return isinstance(mask, Tensor) and mask.ndim == 4 and tuple(mask.shape[1:]) == wanted


@contextmanager
def _replaced(attention: Callable) -> Iterator[None]:
    """Another attention function for a block: transformers asks for it by name at every layer."""
    local = ALL_ATTENTION_FUNCTIONS._local_mapping
    before = local.get(SDPA)
    local[SDPA] = attention
    try:
        yield
    finally:
        local.pop(SDPA)
        if before is not None:
            local[SDPA] = before
