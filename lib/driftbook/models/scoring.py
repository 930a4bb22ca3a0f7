"""One scoring engine for a base model and for any PEFT adapter on it: log-probabilities, options,
and generation.

Every row is laid out by explicit positions and an explicit mask: a prefix that all prompts share (a
soft prompt, the key/values of prefix tuning, a judge's taxonomy) is computed once and its
key/values serve every row; sequences that share more stand in one row as a tree. PEFT itself puts
the soft prompt before the padding and loses the positions, which moves the logits by several nats.
"""

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from peft import PeftModel
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from driftbook.models.layout import GrowingLayer, KeyValues, causal, expanded, padded
from driftbook.models.loading import ask, context_length, conversation_ids
from driftbook.models.sampling import Sampling, VariantFailure, next_tokens, uniforms
from driftbook.models.trees import LEAST_SHARED, common_prefix, groups, tree

# tokens of one forward pass: on a CPU more only leave its cache
TOKENS_PER_BATCH = {"cpu": 2_048, "cuda": 16_384}
# key/values of answers that are generated side by side on a CPU; on a GPU half of its free memory
CACHED_TOKENS = 32_768
TAIL = 16  # tokens of a context that are tokenised again together with what follows it
LOGITS_AT_ONCE = 2**27  # numbers: half a gigabyte in fp32

Ids = list[int]


@dataclass(frozen=True)
class Answer:
    """A generated answer: its text, its length in tokens, and why it ended (stop or length)."""

    text: str
    n_tokens: int
    finish_reason: str


class Scorer:
    """Scores texts by a model: the base itself, or a PeftModel on it. No result depends on batch
    size, order or padding (to 1e-4).
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        tokens_per_batch: int | None = None,
    ):
        self.tokenizer = tokenizer
        self.model = model.get_base_model() if isinstance(model, PeftModel) else model
        self.model.eval()
        if "position_ids" not in inspect.signature(self.model.base_model.forward).parameters:
            raise ValueError(
                f"{type(self.model).__name__} takes no position_ids, so its rows cannot be padded"
                " or shared exactly; use a model with rotary positions"
            )
        self.soft_prompt, self.virtual_cache = _virtual(model)
        self.n_virtual = 0 if self.soft_prompt is None else len(self.soft_prompt)
        if self.virtual_cache is not None:
            self.n_virtual = self.virtual_cache[0][0].shape[2]
        usual = TOKENS_PER_BATCH.get(self.model.device.type, 16_384)
        self.tokens_per_batch = tokens_per_batch or usual
        self.cached_tokens = tokens_per_batch or _cached_tokens(self.model)
        self.context_length = context_length(self.model) - self.n_virtual
        _check_head(self.model, self.head)
        config = self.model.config.get_text_config()
        self.layer_types = tuple(dict.fromkeys(getattr(config, "layer_types", None) or ()))
        self.window = getattr(config, "sliding_window", None)

    # ---- scoring
    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Log-probabilities [n] of continuations after contexts, in nats; the contexts are texts
        that already hold their special tokens.

        Both are tokenised together, as the model would read and write them; a space between them is
        the caller's.
        """
        split = [self.joined(self.ids(context), [continuation]) for context, continuation in pairs]
        found = self.token_logprobs([(context, one) for context, [one] in split])
        return np.array([scores.sum() for scores in found])

    @torch.inference_mode()
    def token_logprobs(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[np.ndarray]:
        """For each (context, continuation) of token ids, the log-probability of each token of the
        continuation, in nats.
        """
        results: list[np.ndarray] = [np.empty(0)] * len(pairs)

        def read(batch: list[int], hidden: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
            targets = [token for i in batch for token in pairs[i][1]]
            targets = torch.tensor(targets, device=hidden.device)
            return self._logprobs(hidden, where, targets).double().cpu()

        for batch, values in self._states(pairs, read):
            for i, part in zip(batch, values.split([len(pairs[i][1]) for i in batch]), strict=True):
                results[i] = part.numpy()
        return results

    @torch.inference_mode()
    def distributions(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[torch.Tensor]:
        """For each (context, continuation), the log-probabilities [tokens, vocabulary] before each
        token of the continuation.
        """
        results: list[torch.Tensor] = [torch.empty(0)] * len(pairs)

        def read(_, hidden: torch.Tensor, where: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.head(hidden).log_softmax(1), where

        for batch, (logprobs, where) in self._states(pairs, read):
            for i, part in zip(batch, where.split([len(pairs[i][1]) for i in batch]), strict=True):
                results[i] = logprobs[part]
        return results

    def choices(
        self,
        contexts: Sequence[Ids],
        options: Sequence[Sequence[str]],
        stem: str | Sequence[str] = "",
    ) -> np.ndarray:
        """Log-probabilities [n, k] of k options after each context and the stem (one for all, or
        one each), not normalised over the options.

        The context is computed once: one forward pass where all options are single tokens, else the
        options branch off it. An option's tokens are those of context, stem and option read as one
        text, so that a tokenizer which marks the beginnings of words meets no false one.

        Raises:
            ValueError: an option is empty or without a token, or the contexts have different
                numbers of options.
        """
        sizes = {len(row) for row in options}
        if len(sizes) > 1 or any(not option for row in options for option in row):
            raise ValueError(
                "every context needs the same number of options, and none may be empty"
            )
        if not contexts:
            return np.empty((0, *sizes)) if sizes else np.empty((0, 0))
        stems = [stem] * len(contexts) if isinstance(stem, str) else stem
        joined = [self.joined(*one) for one in zip(contexts, options, stems, strict=True)]
        pairs = [(context, option) for context, row in joined for option in row]
        if not all(option for _, option in pairs):
            raise ValueError(
                "the tokenizer has no token for an option, which would be certain whatever the"
                " model thinks; give it a text"
            )
        found = np.array([scores.sum() for scores in self.token_logprobs(pairs)])
        return found.reshape(len(contexts), -1)

    def letters(self, contexts: Sequence[Ids], letters: Sequence[str] = "ABC") -> np.ndarray:
        """Log-probabilities [n, k] of the letters as the answer's first token: `choices` for single
        tokens.
        """
        return self.choices(contexts, [list(letters)] * len(contexts))

    def joined(self, context: Ids, texts: Sequence[str], stem: str = "") -> tuple[Ids, list[Ids]]:
        """The context with the stem behind it, and the token ids of each text after that, tokenised
        together with what precedes them.

        A tokenizer may merge the end of one with the beginning of the other (then these tokens
        stand in the texts), and one that marks the beginnings of words would mark a text by itself,
        where the model writes it without the mark.
        """
        back, begun, rest = _joined(self.tokenizer, tuple(context[-TAIL:]), tuple(texts), stem)
        return [*context[: len(context) - back], *begun], [list(one) for one in rest]

    def _states(
        self, pairs: Sequence[tuple[Ids, Ids]], read: Callable
    ) -> Iterator[tuple[list[int], object]]:
        """Batches of pair numbers, with what `read` makes of them, of hidden states [distinct
        places, width] and, for all tokens of their continuations, the place [tokens] whose state
        predicts it."""
        self._check_lengths([len(a) for a, _ in pairs], [len(a) + len(b) for a, b in pairs])
        rows = [[*a, *b][:-1] for a, b in pairs]
        if not rows:
            return
        shared = self._shared(rows, min(len(a) for a, _ in pairs) - 1)
        prefix = self._prefix(rows[0][:shared])
        for batch in self._batches(groups(rows, shared), self.tokens_per_batch):

            def work(part: list[list[int]]) -> object:
                members = [[rows[i] for i in one] for one in part]
                starts = [[len(pairs[i][0]) for i in one] for one in part]
                found = self._forward(members, starts, shared, prefix)
                return read([i for one in part for i in one], *found)

            for part, found in self._halving(batch, work):
                yield [i for one in part for i in one], found

    def _forward(
        self,
        members: list[list[Ids]],
        starts: list[list[int]],
        shared: int,
        prefix: KeyValues | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Trees, one a row, padded on the right: hidden states where a token of a continuation is
        predicted; see `_states`.
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
        cache = None if prefix is None else expanded(prefix, len(trees))
        hidden = self.run(self.embed(tokens), positions, allowed, cache)
        wanted = [
            row * width + path[start - 1 - shared :]
            for row, (one, begins) in enumerate(zip(trees, starts, strict=True))
            for path, start in zip(one.paths, begins, strict=True)
        ]
        places, where = np.unique(np.concatenate(wanted), return_inverse=True)
        return hidden.flatten(0, 1)[self.tensor(places)], self.tensor(where)

    def run(
        self,
        embedded: torch.Tensor,
        distances: np.ndarray,
        allowed: np.ndarray | None,
        cache: Cache | None,
    ) -> torch.Tensor:
        """Last hidden states [rows, new, width] of the newest tokens.

        Keys are what the cache shares between the rows, then `distances` [rows, keys] behind it; a
        new token attends to what is shared and to those keys that `allowed` [rows, new, keys]
        names; to all before itself where it is None.
        """
        new = embedded.shape[1]
        shared = 0 if cache is None else cache.get_seq_length() + new - distances.shape[1]
        first = np.broadcast_to(np.arange(shared), (len(distances), shared))
        seen = self.tensor(np.hstack([first, shared + distances]))
        positions, mask = seen[:, -new:], None
        if allowed is not None or not self._fits_window(positions):
            allowed = causal(new)[None] if allowed is None else allowed
            open_ = np.concatenate([np.ones((*allowed.shape[:2], shared), bool), allowed], 2)
            mask = self._mask(torch.from_numpy(open_).to(embedded.device), positions, seen)
        found = self.model.base_model(
            inputs_embeds=embedded,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return found.last_hidden_state

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

    def _logprobs(
        self, hidden: torch.Tensor, where: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Log-probabilities [tokens] of target tokens at places of `hidden`, a part of the
        vocabulary's logits at a time.
        """
        values = torch.empty(len(targets), device=hidden.device)
        step = max(1, LOGITS_AT_ONCE // self.model.get_output_embeddings().weight.shape[0])
        for first in range(0, len(hidden), step):
            logits = self.head(hidden[first : first + step])
            mine = (where >= first) & (where < first + step)
            rows = where[mine] - first
            own = self._exact(logits, hidden[first + rows], rows, targets[mine])
            values[mine] = own - logits.logsumexp(1)[rows]
        return values

    def _exact(
        self, logits: torch.Tensor, hidden: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """The logits of target tokens; where the head computes in half precision once more in fp32,
        since rounding ties letters that are .1 nats apart.
        """
        head = self.model.get_output_embeddings()
        if head.weight.dtype == torch.float32 or type(head) is not torch.nn.Linear:
            return logits[rows, targets]
        exact = (hidden.float() * head.weight[targets].float()).sum(1)
        return self._capped(exact if head.bias is None else exact + head.bias[targets].float())

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits in fp32 from hidden states, with the family's soft cap where it has one."""
        return self._capped(self.model.get_output_embeddings()(hidden).float())

    def _capped(self, logits: torch.Tensor) -> torch.Tensor:
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def embed(self, ids: np.ndarray) -> torch.Tensor:
        return self.model.get_input_embeddings()(self.tensor(ids))

    def tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(self.model.device)

    # ---- what all rows share
    def _shared(self, rows: Sequence[Ids], most: int) -> int:
        """How many first tokens of all rows are computed once; none where that would not pay."""
        shared = min(most, common_prefix(min(rows), max(rows)))
        return shared if shared >= LEAST_SHARED and len(rows) > 1 else 0

    @torch.inference_mode()
    def _prefix(self, ids: Ids) -> KeyValues | None:
        """Key/values of the virtual tokens and of ids after them; None where there are neither."""
        if self.virtual_cache is None and self.soft_prompt is None and not ids:
            return None
        embedded = self.embed(np.array([ids])) if ids else None
        if self.soft_prompt is not None:
            soft = self.soft_prompt.to(self.model.dtype)[None]
            embedded = soft if embedded is None else torch.cat([soft, embedded], 1)
        if embedded is None:
            return self.virtual_cache
        cache = expanded(self.virtual_cache or [], 1)
        length = embedded.shape[1]
        self.run(embedded, np.arange(length)[None], causal(length)[None], cache)
        return [(layer.keys, layer.values) for layer in cache.layers]

    # ---- generation
    @torch.inference_mode()
    def generate(
        self, contexts: Sequence[Ids], max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[Answer]:
        """The answer to each context (token ids up to where it begins): greedy, or drawn."""
        lengths = [len(context) + max_new_tokens for context in contexts]
        self._check_lengths(list(map(len, contexts)), lengths)
        results: list[Answer] = [Answer("", 0, "length")] * len(contexts)
        if not contexts:
            return results
        shared = self._shared(contexts, min(map(len, contexts)) - 1)
        prefix = self._prefix(contexts[0][:shared])

        def work(part: list[list[int]]) -> list[Ids]:
            asked = [contexts[i] for (i,) in part]
            return self._continued(asked, shared, prefix, max_new_tokens, sampling)

        rows = [([i], length) for i, length in enumerate(lengths)]
        for batch in self._batches(rows, self.cached_tokens):
            for part, tokens in self._halving(batch, work):
                for (i,), row in zip(part, tokens, strict=True):
                    results[i] = self._answer(row)
        return results

    def _continued(
        self,
        contexts: list[Ids],
        shared: int,
        prefix: KeyValues | None,
        max_new_tokens: int,
        sampling: Sampling | None,
    ) -> list[Ids]:
        """The tokens generated after each context, up to its end token."""
        rest = [context[shared:] for context in contexts]
        width = max(map(len, rest))
        padding = np.array([width - len(row) for row in rest])
        cache = expanded(prefix or [], len(rest), GrowingLayer)
        draws = None if sampling is None else uniforms(contexts, sampling, max_new_tokens)
        ends = _end_tokens(self.model, self.tokenizer)
        found: list[Ids] = [[] for _ in contexts]
        alive, tokens = np.arange(len(contexts)), padded(rest, width, "left")
        for step in range(max_new_tokens):
            logits = self._step(tokens, padding, width + step, cache)
            chosen = next_tokens(logits, sampling, None if draws is None else draws[alive, step])
            for row, token in zip(alive, chosen, strict=True):
                found[row].append(int(token))
            stays = np.flatnonzero(~np.isin(chosen, ends))
            if not len(stays):
                break
            if len(stays) < len(alive):
                alive, chosen, padding = alive[stays], chosen[stays], padding[stays]
                cache.batch_select_indices(self.tensor(stays))
            tokens = chosen[:, None]
        return found

    def _step(
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
        return self.head(self.run(self.embed(tokens), distances, allowed, cache)[:, -1])

    def _answer(self, tokens: Ids) -> Answer:
        stopped = bool(tokens) and tokens[-1] in _end_tokens(self.model, self.tokenizer)
        kept = tokens[:-1] if stopped else tokens
        text = self.tokenizer.decode(kept, skip_special_tokens=True).strip()
        return Answer(text, len(kept), "stop" if stopped else "length")

    # ---- batches
    def ids(self, text: str) -> Ids:
        """Token ids of a text that already holds its special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _check_lengths(self, contexts: list[int], lengths: list[int]) -> None:
        if not all(contexts):
            raise ValueError(
                f"{contexts.count(0)} of {len(contexts)} contexts are empty; there is nothing to"
                " continue"
            )
        too_long = [length for length in lengths if length > self.context_length]
        if too_long:
            raise ValueError(
                f"{len(too_long)} of {len(lengths)} prompts need up to {max(too_long)} tokens and"
                f" the model reads {self.context_length}; nothing is cut in silence: shorten them,"
                " or choose a model with a longer context"
            )

    def _batches(self, rows: list[tuple[list[int], int]], budget: int) -> Iterator[list[list[int]]]:
        """Rows (the numbers in each), longest first, so many that their padded rectangle fits a
        budget of tokens.
        """
        rows = sorted(rows, key=lambda row: -row[1])
        while rows:
            size = max(1, budget // (rows[0][1] + self.n_virtual))
            yield [numbers for numbers, _ in rows[:size]]
            rows = rows[size:]

    def _halving(
        self, batch: list[list[int]], work: Callable
    ) -> Iterator[tuple[list[list[int]], object]]:
        """(rows, work(rows)), the rows split in halves, and a last one's tree in its sequences, as
        long as the device has no memory for them.
        """
        try:
            yield batch, work(batch)
            return
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                batch = [[number] for number in batch[0]]
            if len(batch) == 1:
                raise VariantFailure("out of memory with a single prompt") from None
        torch.cuda.empty_cache()
        middle = len(batch) // 2
        yield from self._halving(batch[:middle], work)
        yield from self._halving(batch[middle:], work)

    def ask(self, prompts: Sequence[str], system_prompt: str | None = None) -> list[Ids]:
        """Token ids of user prompts by the chat template, up to where the answer begins."""
        return [ask(self.tokenizer, prompt, system_prompt) for prompt in prompts]

    def answered(
        self, prompts: Sequence[str], answers: Sequence[str], system_prompt: str | None = None
    ) -> list[tuple[Ids, Ids]]:
        """Token ids of user prompts by the chat template, and of an answer to each."""
        system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        return [
            conversation_ids(self.tokenizer, [*system, {"role": "user", "content": prompt}], answer)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]


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


@lru_cache(maxsize=4_096)  # where only letters are asked for, all contexts end alike
def _joined(
    tokenizer: PreTrainedTokenizerBase, tail: tuple[int, ...], texts: tuple[str, ...], stem: str
) -> tuple[int, Ids, list[Ids]]:
    """How many tokens of the tail are replaced, by which, and the token ids of each text after
    that: see `Scorer.joined`.
    """

    def ids(text: str) -> Ids:
        return tokenizer.encode(text, add_special_tokens=False)

    shown = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode(list(tail), **shown)
    # a tokenizer of whole words drops spaces, and with them the end of the template's last line
    glue = "" if ids(" ") else " "
    alone, begun = ids(before), ids(before + glue + stem)
    whole = [ids(before + glue + stem + glue + text) for text in texts]
    shared = min(common_prefix(begun, one) for one in whole)
    kept = min(common_prefix(alone, begun), shared)
    back = len(alone) - kept
    # tokens of the context that are read anew; at least the last one must be what it was
    anew = max(back, 1)
    if list(tail[-anew:]) != alone[-anew:]:
        raise ValueError(
            f"the tokenizer reads the end of a context, {before[-20:]!r}, otherwise than it was"
            " written; use another template"
        )
    return back, begun[kept:shared], [one[shared:] for one in whole]


_CHECKED: weakref.WeakSet = weakref.WeakSet()  # models whose head is known


@torch.inference_mode()
def _check_head(model: PreTrainedModel, head: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Raise a ValueError where a model does more to its logits than `head` knows of (some families
    scale them); tried once a model.
    """
    if model in _CHECKED:
        return
    ids = torch.arange(2, device=model.device)[None]
    own = type(model).forward(model, input_ids=ids, use_cache=False).logits.float()
    found = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    atol = 0.02 if model.dtype == torch.float32 else 0.2
    if torch.isfinite(own).all() and not torch.allclose(found, own, rtol=0.02, atol=atol):
        raise ValueError(
            f"{type(model).__name__} scales its logits in a way that is not known here, so its"
            " probabilities would be wrong; use another model"
        )
    _CHECKED.add(model)


def _cached_tokens(model: PreTrainedModel) -> int:
    """How many tokens' key/values may be kept at once."""
    if model.device.type != "cuda":
        return CACHED_TOKENS
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    free, _ = torch.cuda.mem_get_info(model.device)
    return int(free / 2 / (2 * config.num_hidden_layers * heads * width * model.dtype.itemsize))


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ends = model.generation_config.eos_token_id
    more = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return [tokenizer.eos_token_id, *more]
