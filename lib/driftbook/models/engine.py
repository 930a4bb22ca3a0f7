"""Hidden states of a model, with or without an adapter on it, in every layout that was tried and
found to be the model's own.

Every row is laid out by explicit positions and an explicit mask: a prefix that all prompts share (a
soft prompt, the key/values of prefix tuning, a judge's taxonomy) is computed once and its
key/values serve every row; sequences that share more stand in one row as a tree. PEFT itself puts
the soft prompt before the padding and loses the positions, which moves the logits by several nats.
Where the probe (models.probe) finds that a model does not allow it, each sequence has a row of its
own.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from peft import PeftModel
from transformers import Cache, PreTrainedModel

from driftbook.models.last_layer import LastLayer
from driftbook.models.layout import GrowingLayer, KeyValues, causal, expanded, padded
from driftbook.models.trees import tree
from driftbook.models.ways import Ways, adapter_kind

Ids = list[int]


class Engine:
    """A model's forward pass behind its virtual tokens, if it has any.

    Where `ways.scale` is None the "hidden states" of all methods are the logits themselves.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, ways: Ways):
        self.model = model.get_base_model() if isinstance(model, PeftModel) else model
        self.ways, self.kind, self.parts = ways, adapter_kind(model), (self,)
        self.soft_prompt, self.virtual_cache = _virtual(model)
        self.n_virtual = 0 if self.soft_prompt is None else len(self.soft_prompt)
        if self.virtual_cache is not None:
            self.n_virtual = self.virtual_cache[0][0].shape[2]
        config = self.model.config.get_text_config()
        self.layer_types = tuple(dict.fromkeys(getattr(config, "layer_types", None) or ()))
        self.window = getattr(config, "sliding_window", None)
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.is_whole = ways.scale is None
        self.last_layer = LastLayer(self.model) if ways.trimmed else None

    # ---- from tokens to logits
    def tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(self.model.device)

    def embed(self, ids: np.ndarray) -> torch.Tensor:
        return self.model.get_input_embeddings()(self.tensor(ids))

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits in fp32 from hidden states."""
        if self.is_whole:
            return hidden.float()
        return self._capped(self.model.get_output_embeddings()(hidden).float())

    def logits_of(
        self, logits: torch.Tensor, hidden: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """The logits of target tokens; where the head computes in half precision once more in fp32,
        since rounding ties letters that are .1 nats apart.
        """
        if not self.rounds:
            return logits[rows, targets]
        head = self.model.get_output_embeddings()
        exact = (hidden[rows].float() * head.weight[targets].float()).sum(1)
        return self._capped(exact if head.bias is None else exact + head.bias[targets].float())

    @property
    def rounds(self) -> bool:
        """Whether the head computes in half precision, as a plain product."""
        head = self.model.get_output_embeddings()
        half = not self.is_whole and head.weight.dtype != torch.float32
        return half and type(head) is torch.nn.Linear

    def _capped(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits if self.ways.scale == 1 else logits * self.ways.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _states(self, **inputs) -> tuple[torch.Tensor, Cache | None]:
        """Last hidden states [rows, tokens, width] (or logits), and the key/values."""
        if self.is_whole:
            found = self.model(**inputs)
            return found.logits, getattr(found, "past_key_values", None)
        found = self.model.base_model(**inputs)
        return found.last_hidden_state, getattr(found, "past_key_values", None)

    # ---- rows that share
    def run(
        self,
        inputs: np.ndarray | torch.Tensor,
        distances: np.ndarray,
        allowed: np.ndarray | None,
        cache: Cache | None,
    ) -> torch.Tensor:
        """Last hidden states [rows, new, width] of the newest tokens, given by their ids
        [rows, new] or as embeddings [rows, new, width].

        Keys are what the cache shares between the rows, then `distances` [rows, keys] behind it; a
        new token attends to what is shared and to those keys that `allowed` [rows, new, keys]
        names; to all before itself where it is None.
        """
        new = inputs.shape[1]
        shared = 0 if cache is None else cache.get_seq_length() + new - distances.shape[1]
        first = np.broadcast_to(np.arange(shared), (len(distances), shared))
        seen = self.tensor(np.hstack([first, shared + distances]))
        positions, mask = seen[:, -new:], None
        if allowed is not None or not self._fits_window(positions):
            allowed = causal(new)[None] if allowed is None else allowed
            open_ = np.concatenate([np.ones((*allowed.shape[:2], shared), bool), allowed], 2)
            mask = self._mask(torch.from_numpy(open_).to(positions.device), positions, seen)
        asked = self._named(inputs)
        return self._states(
            **asked,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
        )[0]

    def _named(self, inputs: np.ndarray | torch.Tensor) -> dict[str, torch.Tensor]:
        if isinstance(inputs, torch.Tensor):
            return {"inputs_embeds": inputs}
        return {"input_ids": self.tensor(inputs)}

    def documents(self, positions: np.ndarray) -> np.ndarray | None:
        """Who sees whom [rows, tokens, tokens] in rows of several texts, each with positions from
        zero; None where they fit a window: transformers then finds the texts by their positions.
        """
        if self.window is None or positions.max() < self.window:
            return None
        document = np.cumsum(positions == 0, 1)
        return causal(positions.shape[1]) & (document[:, :, None] == document[:, None, :])

    def _fits_window(self, positions: torch.Tensor) -> bool:
        return self.window is None or int(positions.max()) < self.window

    def _mask(
        self, allowed: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """What is added to the attention scores, [rows, 1, queries, keys]; by kind of layer where a
        model mixes full and sliding ones.
        """
        if self.window is None:
            return self._additive(allowed)
        sliding = self._additive(allowed & (positions[:, :, None] - seen[:, None, :] < self.window))
        full = self._additive(allowed)
        match self.layer_types:
            case ("full_attention",):
                return full
            case () | ("sliding_attention",):
                return sliding
            case _:
                return {"full_attention": full, "sliding_attention": sliding}

    def _additive(self, allowed: torch.Tensor) -> torch.Tensor:
        dtype = self.model.dtype
        added = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return added.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]

    @torch.inference_mode()
    def prefix(self, ids: Ids) -> KeyValues | None:
        """Key/values of the virtual tokens and of ids after them; None where there are neither."""
        if self.virtual_cache is None and self.soft_prompt is None and not ids:
            return None
        inputs = np.array([ids]) if ids else None
        if self.soft_prompt is not None:
            soft = self.soft_prompt.to(self.model.dtype)[None]
            inputs = soft if inputs is None else torch.cat([soft, self.embed(inputs)], 1)
        if inputs is None:
            return self.virtual_cache
        cache = expanded(self.virtual_cache or [], 1)
        length = inputs.shape[1]
        self.run(inputs, np.arange(length)[None], causal(length)[None], cache)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def trees(
        self,
        members: list[list[Ids]],
        starts: list[list[int]],
        shared: int,
        prefix: KeyValues | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Trees of sequences, one a row, padded on the right, behind a prefix that holds their
        first `shared` tokens.

        Hidden states [distinct places, width] before each token of a sequence from its start on,
        and for all these tokens the place [tokens] of theirs.
        """
        trees = [tree(sequences, shared) for sequences in members]
        width = max(len(one.tokens) for one in trees)
        tokens, positions, ends = (
            padded([getattr(one, name) for one in trees], width)
            for name in ("tokens", "positions", "ends")
        )
        allowed = None
        if prefix is not None or any(len(one.paths) > 1 for one in trees):
            below = np.arange(width)[:, None] < ends[:, None, :]
            allowed = causal(width) & below | np.eye(width, dtype=bool)
        wanted = [
            row * width + path[start - 1 - shared :]
            for row, (one, begins) in enumerate(zip(trees, starts, strict=True))
            for path, start in zip(one.paths, begins, strict=True)
        ]
        places, where = np.unique(np.concatenate(wanted), return_inverse=True)
        cache = None if prefix is None else expanded(prefix, len(trees))
        with self._read_at(places, *tokens.shape):
            hidden = self.run(tokens, positions, allowed, cache)
        return hidden.flatten(0, 1)[self.tensor(places)], self.tensor(where)

    def _read_at(self, places: np.ndarray, rows: int, tokens: int) -> AbstractContextManager:
        """A block in which the last layer is computed at these places of [rows, tokens] alone."""
        if self.last_layer is None:
            return nullcontext()
        return self.last_layer.read_at(places, rows, tokens)

    def cache(self, prefix: KeyValues | None, rows: int) -> Cache:
        """The cache of answers that are generated side by side behind a prefix."""
        return expanded(prefix or [], rows, GrowingLayer)

    def step(
        self, tokens: np.ndarray, padding: np.ndarray, total: int, cache: Cache
    ) -> torch.Tensor:
        """Logits [rows, vocabulary] after the newest tokens [rows, new] of rows that begin with
        padding and are `total` long by now.
        """
        places = np.arange(total)
        new = places[total - tokens.shape[1] :, None]
        # padding sees itself: attention to nothing is NaN
        allowed = (places <= new) & (places >= padding[:, None, None]) | (places == new)
        distances = np.maximum(places - padding[:, None], 0)
        return self.head(self.run(tokens, distances, allowed, cache)[:, -1])

    # ---- the plain way: a sequence a row, nothing shared
    def plain(self, rows: Sequence[Ids], soft: torch.Tensor | None = None) -> torch.Tensor:
        """Last hidden states [rows, longest row, width] of sequences, padded on the right where
        they are several, behind a soft prompt [n, width].
        """
        ids = padded(rows, max(map(len, rows)))
        if soft is None:
            return self._states(input_ids=self.tensor(ids), use_cache=False)[0]
        before = soft.to(self.model.dtype).expand(len(rows), -1, -1)
        whole = torch.cat([before, self.embed(ids)], 1)
        return self._states(inputs_embeds=whole, use_cache=False)[0][:, len(soft) :]

    def plain_at(
        self,
        rows: Sequence[Ids],
        wanted: Sequence[Sequence[np.ndarray]],
        soft: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [distinct places, width] at the tokens of each row that each of its readers
        wants, and for all these tokens the place [tokens] of theirs.
        """
        width, virtual = max(map(len, rows)), 0 if soft is None else len(soft)
        flat = [row * width + one for row, some in enumerate(wanted) for one in some]
        places, where = np.unique(np.concatenate(flat), return_inverse=True)
        row, token = np.divmod(places, width)
        whole = virtual + width
        with self._read_at(row * whole + virtual + token, len(rows), whole):
            hidden = self.plain(rows, soft)
        return hidden[self.tensor(row), self.tensor(token)], self.tensor(where)

    def following(
        self, sequence: Ids, new: int, cache: Cache | None
    ) -> tuple[torch.Tensor, Cache | None]:
        """Logits [1, vocabulary] after a sequence, of which the last `new` tokens are not in the
        cache yet, and the cache with them; the whole sequence each time where a cache is not the
        model's own.
        """
        if not self.ways.cached:
            return self.head(self.plain([sequence], self.soft_prompt)[:, -1]), None
        ids = self.tensor(np.array([sequence[len(sequence) - new :]]))
        asked = {"input_ids": ids}
        if self.soft_prompt is not None and cache is None:
            soft = self.soft_prompt.to(self.model.dtype)[None]
            asked = {"inputs_embeds": torch.cat([soft, self.model.get_input_embeddings()(ids)], 1)}
        hidden, cache = self._states(**asked, past_key_values=cache, use_cache=True)
        return self.head(hidden[:, -1]), cache


@torch.inference_mode()
def _virtual(model: PreTrainedModel | PeftModel) -> tuple[torch.Tensor | None, KeyValues | None]:
    """The virtual tokens [n, width] of a prompt-based adapter, or the key/values of prefix tuning;
    None for all else.
    """
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return None, None
    prompt = model.get_prompt(batch_size=1)
    if isinstance(prompt, torch.Tensor):
        return prompt[0].detach().clone(), None
    return None, [(layer.keys, layer.values) for layer in prompt.layers]
