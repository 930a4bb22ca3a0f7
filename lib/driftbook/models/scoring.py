"""Scoring by a base model and by any adapter on it: log-probabilities, options and generation.

What is faster than the model's own forward, one sequence at a time, is tried when a model is first
asked (models.probe); where it is not the model's own, each sequence has a row of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from driftbook.models.base_state import refuse_spoiled
from driftbook.models.conversations import (
    answer_text,
    ask,
    chat_ids,
    conversation_ids,
    inert,
    soft_ids,
    without,
)
from driftbook.models.engine import Engine, Ids
from driftbook.models.layout import KeyValues, padded
from driftbook.models.loading import check_ids, context_length
from driftbook.models.probe import found_ways, longer_ways
from driftbook.models.products import Product, ProductEngine
from driftbook.models.sampling import OutOfMemory, Sampling, next_tokens, uniforms
from driftbook.models.templates import Message, end_tokens, lead
from driftbook.models.trees import LEAST_SHARED, common_prefix, groups
from driftbook.models.ways import say
from driftbook.study import progress

# tokens of one forward pass: on a CPU more only leave its cache
TOKENS_PER_BATCH = {"cpu": 2_048, "cuda": 16_384}
# key/values of answers that are generated side by side on a CPU; on a GPU half of its free memory
CACHED_TOKENS = 32_768
TAIL = 16  # tokens of a context that are tokenised again together with what follows it
LOGITS_AT_ONCE = 2**27  # numbers: half a gigabyte in fp32


@dataclass(frozen=True)
class Answer:
    """A generated answer: its text, its length in tokens, why it ended (stop, length, or thought:
    within a thought, so that there is no answer), and whether a thought before it was taken off.
    """

    text: str
    n_tokens: int
    finish_reason: str
    had_thought: bool = False


class Scorer:
    """Scores texts by a model: the base itself, a PeftModel on it, or a product of several. No
    result depends on batch size, order or padding (to 1e-4).
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | Product,
        tokenizer: PreTrainedTokenizerBase,
        tokens_per_batch: int | None = None,
    ):
        self.tokenizer, self.engine = tokenizer, engine_of(model)
        self.model = self.engine.model
        self.after = soft_ids(self.model)  # each text of a user, in all that is asked
        for part in self.engine.parts:
            part.model.eval()
        usual = TOKENS_PER_BATCH.get(self.model.device.type, 16_384)
        if self.engine.ways.scale is None:  # then a batch has logits in place of hidden states
            usual = min(usual, LOGITS_AT_ONCE // self.model.get_input_embeddings().weight.shape[0])
        self.tokens_per_batch = tokens_per_batch or usual
        cached = _cached_tokens(self.model) // len(self.engine.parts)
        self.cached_tokens = tokens_per_batch or cached
        self.context_length = context_length(self.model) - self.engine.n_virtual

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
            return self.engine.head(hidden).log_softmax(1), where

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
        tail = context[-TAIL:]
        soft = [place for place, one in enumerate(tail) if one in self.after]
        tail = tuple(tail[soft[-1] + 1 :] if soft else tail)  # a soft prompt has no text
        back, begun, rest = _joined(self.tokenizer, tail, tuple(texts), stem)
        return [*context[: len(context) - back], *begun], [list(one) for one in rest]

    def _states(
        self, pairs: Sequence[tuple[Ids, Ids]], read: Callable
    ) -> Iterator[tuple[list[int], object]]:
        """Batches of pair numbers, with what `read` makes of them, of hidden states [distinct
        places, width] and, for all tokens of their continuations, the place [tokens] whose state
        predicts it."""
        lengths = [len(a) + len(b) for a, b in pairs]
        self._check_lengths([len(a) for a, _ in pairs], lengths)
        rows = [[*a, *b][:-1] for a, b in pairs]
        check_ids(self.model, self.tokenizer, [max(row) for row in rows])
        starts = [len(a) for a, _ in pairs]
        together = [i for i, length in enumerate(lengths) if self._shares(length)]
        if alone := sorted(set(range(len(pairs))) - set(together)):
            yield from self._plain_states(rows, starts, alone, read)
        if not together:
            return
        shared = self._common([rows[i] for i in together], min(starts[i] for i in together) - 1)
        prefix = self.engine.prefix(rows[together[0]][:shared])
        trees = [
            ([together[i] for i in numbers], length)
            for numbers, length in groups([rows[i] for i in together], shared)
        ]
        for batch in self._batches(trees, self.tokens_per_batch):

            def work(part: list[list[int]]) -> object:
                members = [[rows[i] for i in one] for one in part]
                begins = [[starts[i] for i in one] for one in part]
                found = self.engine.trees(members, begins, shared, prefix)
                return read([i for one in part for i in one], *found)

            for part, found in self._halving(batch, work):
                numbers = [i for one in part for i in one]
                yield numbers, found
                progress.advance("read", len(numbers))

    def _plain_states(
        self, rows: list[Ids], starts: list[int], numbers: list[int], read: Callable
    ) -> Iterator[tuple[list[int], object]]:
        """`_states` where no beginning is shared: each distinct sequence in a row of its own, and
        in a forward pass of its own where the model's rows are not independent.
        """
        budget = self.tokens_per_batch if self.engine.ways.rows else 0
        same: dict[tuple[int, ...], list[int]] = {}  # as of options that are single tokens
        for i in numbers:
            same.setdefault(tuple(rows[i]), []).append(i)
        self._say_plain([rows[some[0]] for some in same.values()])
        for batch in self._batches([(some, len(row)) for row, some in same.items()], budget):

            def work(part: list[list[int]]) -> object:
                chosen = [rows[some[0]] for some in part]
                places = [[np.arange(starts[i] - 1, len(rows[i])) for i in some] for some in part]
                found = self.engine.plain_at(chosen, places, self.engine.soft_prompt)
                return read([i for some in part for i in some], *found)

            for part, found in self._halving(batch, work):
                numbers = [i for some in part for i in some]
                yield numbers, found
                progress.advance("read", len(numbers))

    def _shares(self, length: int) -> bool:
        """Whether a sequence may share what it begins with; a window is tried when it is needed."""
        engine = self.engine
        if not engine.ways.shared:
            return False
        if engine.ways.limit is not None and length > engine.ways.limit:
            for part in engine.parts:
                part.ways = longer_ways(part.model, part.kind, part.ways)
        return engine.ways.limit is None or length <= engine.ways.limit

    def _say_plain(self, rows: list[Ids]) -> None:
        ways, name = self.engine.ways, type(self.model).__name__
        computed = sum(map(len, rows))
        once = sum(size for _, size in groups(rows))
        side = "" if ways.rows else ", and a forward pass"
        why = ways.reason or f"no layout was tried beyond {ways.limit} tokens"
        say(
            self.model,
            f"each sequence has a row{side} of its own with {name}: what is faster does not give"
            f" its own probabilities ({why}); {computed / max(once, 1):.1f} times the tokens of"
            " rows that share what they begin with",
        )

    def _logprobs(
        self, hidden: torch.Tensor, where: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Log-probabilities [tokens] of target tokens at places of `hidden`, a part of the
        vocabulary's logits at a time.
        """
        values = torch.empty(len(targets), device=hidden.device)
        step = max(1, LOGITS_AT_ONCE // self.model.get_input_embeddings().weight.shape[0])
        for first in range(0, len(hidden), step):
            part = hidden[first : first + step]
            logits = self.engine.head(part)
            mine = (where >= first) & (where < first + step)
            rows = where[mine] - first
            own = self.engine.logits_of(logits, part, rows, targets[mine])
            values[mine] = own - logits.logsumexp(1)[rows]
        return values

    def _common(self, rows: Sequence[Ids], most: int) -> int:
        """How many first tokens of all rows are computed once; none where that would not pay."""
        shared = min(most, common_prefix(min(rows), max(rows)))
        return shared if shared >= LEAST_SHARED and len(rows) > 1 else 0

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
        check_ids(self.model, self.tokenizer, [max(context) for context in contexts])
        together = [i for i, length in enumerate(lengths) if self._shares(length)]
        for i in sorted(set(range(len(contexts))) - set(together)):
            results[i] = self._answer(self._alone(contexts[i], max_new_tokens, sampling))
            progress.advance("written", 1)
        if not together:
            return results
        asked = [contexts[i] for i in together]
        shared = self._common(asked, min(map(len, asked)) - 1)
        prefix = self.engine.prefix(asked[0][:shared])

        def work(part: list[list[int]]) -> list[Ids]:
            chosen = [contexts[i] for (i,) in part]
            return self._continued(chosen, shared, prefix, max_new_tokens, sampling)

        rows = [([i], lengths[i]) for i in together]
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
        cache = self.engine.cache(prefix, len(rest))
        draws = self._draws(contexts, sampling, max_new_tokens)
        ends = end_tokens(self.model, self.tokenizer)
        found: list[Ids] = [[] for _ in contexts]
        alive, tokens = np.arange(len(contexts)), padded(rest, width, "left")
        each, said = len(contexts) / (width + max_new_tokens), 0.0  # of a token of all rows
        for step in range(max_new_tokens):
            logits = self.engine.step(tokens, padding, width + step, cache)
            progress.advance("written", now := each * tokens.shape[1])
            said += now
            chosen = next_tokens(logits, sampling, None if draws is None else draws[alive, step])
            for row, token in zip(alive, chosen, strict=True):
                found[row].append(int(token))
            stays = np.flatnonzero(~np.isin(chosen, ends))
            if not len(stays):
                break
            if len(stays) < len(alive):
                alive, chosen, padding = alive[stays], chosen[stays], padding[stays]
                cache.batch_select_indices(self.engine.tensor(stays))
            tokens = chosen[:, None]
        progress.advance("written", len(contexts) - said)
        return found

    def _alone(self, context: Ids, max_new_tokens: int, sampling: Sampling | None) -> Ids:
        """The same of one context by itself, by the model's own cache or without one."""
        ways, name = self.engine.ways, type(self.model).__name__
        how = "" if ways.cached else ", and computes its whole text again for each token"
        say(
            self.model,
            f"one answer at a time{how} with {name}: what is faster does not give its own"
            f" probabilities ({ways.reason or f'more than {ways.limit} tokens'})",
        )
        draws = self._draws([context], sampling, max_new_tokens)
        ends, sequence, cache = end_tokens(self.model, self.tokenizer), list(context), None
        for step in range(max_new_tokens):
            new = 1 if step else len(context)
            try:
                logits, cache = self.engine.following(sequence, new, cache)
            except torch.OutOfMemoryError:
                raise OutOfMemory("out of memory with a single prompt") from None
            chosen = next_tokens(logits, sampling, None if draws is None else draws[:, step])
            sequence.append(int(chosen[0]))
            if chosen[0] in ends:
                break
        return sequence[len(context) :]

    def _draws(
        self, contexts: list[Ids], sampling: Sampling | None, steps: int
    ) -> np.ndarray | None:
        """Random numbers of each context, the same for all models that are asked it."""
        if sampling is None:
            return None
        return uniforms([without(one, self.after) for one in contexts], sampling, steps)

    def _answer(self, tokens: Ids) -> Answer:
        stopped = bool(tokens) and tokens[-1] in end_tokens(self.model, self.tokenizer)
        kept = tokens[:-1] if stopped else tokens
        text, thought = answer_text(self.tokenizer, kept)
        reason = "thought" if thought == "open" else "stop" if stopped else "length"
        return Answer(text, len(kept), reason, thought != "none")

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
            size = max(1, budget // (rows[0][1] + self.engine.n_virtual))
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
                raise OutOfMemory("out of memory with a single prompt") from None
        torch.cuda.empty_cache()
        middle = len(batch) // 2
        yield from self._halving(batch[:middle], work)
        yield from self._halving(batch[middle:], work)

    def ask(self, prompts: Sequence[str], system_prompt: str | None = None) -> list[Ids]:
        """Token ids of user prompts by the chat template, up to where the answer begins."""
        return [ask(self.tokenizer, prompt, system_prompt, self.after) for prompt in prompts]

    def ask_turns(
        self, conversations: Sequence[Sequence[Message]], system_prompt: str | None = None
    ) -> list[Ids]:
        """Token ids of conversations that end with a user's turn, up to where the answer begins."""
        system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        asked = ([*system, *turns] for turns in conversations)
        return [chat_ids(self.tokenizer, turns, True, self.after) for turns in asked]

    def ask_raw(self, prompts: Sequence[str]) -> list[Ids]:
        """Token ids of texts without any template, after what the tokenizer puts before a text."""
        return [self.tokenizer.encode(inert(self.tokenizer, prompt)) for prompt in prompts]

    @property
    def lead(self) -> str:
        """The white space that the chat template puts between a prompt and its answer."""
        return lead(self.tokenizer)

    def answered(
        self, prompts: Sequence[str], answers: Sequence[str], system_prompt: str | None = None
    ) -> list[tuple[Ids, Ids]]:
        """Token ids of user prompts by the chat template, and of an answer to each."""
        system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        return [
            conversation_ids(
                self.tokenizer, [*system, {"role": "user", "content": prompt}], answer, self.after
            )
            for prompt, answer in zip(prompts, answers, strict=True)
        ]


def engine_of(model: PreTrainedModel | PeftModel | Product) -> Engine | ProductEngine:
    """The engine of a model in the ways that were found to be its own; of a product, in those of
    each part.

    Raises:
        ValueError: the model's own forward cannot be reproduced with this adapter.
    """
    if isinstance(model, Product):
        return ProductEngine([engine_of(one) for one in model.parts], model.weights)
    refuse_spoiled(model.get_base_model() if isinstance(model, PeftModel) else model)
    ways = found_ways(model)
    engine = Engine(model, ways)
    name = type(engine.model).__name__
    if engine.virtual_cache is not None and not ways.shared:
        raise ValueError(
            f"key/values of prefix tuning cannot be put before what {name} reads ({ways.reason});"
            " use another method or another base model"
        )
    if (engine.soft_prompt is not None or soft_ids(engine.model)) and not ways.embeddings:
        raise ValueError(
            f"a soft prompt cannot be put into what {name} reads: it computes more from token ids"
            " than their embeddings; use another method or another base model"
        )
    return engine


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


def _cached_tokens(model: PreTrainedModel) -> int:
    """How many tokens' key/values may be kept at once."""
    if model.device.type != "cuda":
        return CACHED_TOKENS
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    free, _ = torch.cuda.mem_get_info(model.device)
    return int(free / 2 / (2 * config.num_hidden_layers * heads * width * model.dtype.itemsize))
