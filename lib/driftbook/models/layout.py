"""How rows are laid out for a model: key/values that they share, padding, and who sees whom."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

# per layer [1, heads, tokens, width of a head], twice
KeyValues = list[tuple[torch.Tensor, torch.Tensor]]


class GrowingLayer(DynamicLayer):
    """Key/values of one layer, written into room that is kept ahead: appending to tensors would
    copy all of them at every token.
    """

    AHEAD = 128  # tokens
    room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The key/values [rows, heads, tokens, width] with the new ones behind them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        begin, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if self.room is None or len(self.room[0]) != len(key_states) or self.room[0].shape[2] < end:
            rows, heads, _, width = key_states.shape
            shape, parts = (rows, heads, end + self.AHEAD, width), (self.keys, self.values)
            self.room = tuple(part.new_empty(shape) for part in parts)
            for room, part in zip(self.room, parts, strict=True):
                room[:, :, :begin] = part
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, begin:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values


def expanded(prefix: KeyValues, rows: int, kind: type[DynamicLayer] = DynamicLayer) -> Cache:
    """A cache that begins with the same key/values in every row, without a copy of them."""
    cache = Cache(layer_class_to_replicate=kind)
    for keys, values in prefix:
        layer = kind()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = (part.expand(rows, -1, -1, -1) for part in (keys, values))
        cache.layers.append(layer)
    return cache


def padded(rows: Sequence[Sequence[int]], width: int, side: str = "right") -> np.ndarray:
    """Rows [n, width] with zeros where a row has ended (or not begun): any token serves there,
    since none attends to it.
    """
    result = np.zeros((len(rows), width), np.int64)
    for filled, row in zip(result, rows, strict=True):
        begin = 0 if side == "right" else width - len(row)
        filled[begin : begin + len(row)] = row
    return result


def causal(length: int) -> np.ndarray:
    """Which places [length, length] a place attends to by itself: those up to its own."""
    return np.tri(length, dtype=bool)
