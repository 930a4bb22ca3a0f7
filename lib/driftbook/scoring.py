"""One scoring engine for a base model and for any PEFT adapter on it: log-probabilities, options, and generation.

Prompts are padded on the right when they are scored, and on the left, with the soft prompt next to the text, when answers are generated;
PEFT itself puts the soft prompt before the padding and loses the positions, which moves the logits by several nats.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from driftbook.models import ask, context_length

TOKENS_PER_BATCH = 16_384

Ids = list[int]


class VariantFailure(Exception):
    """A variant's own failure (divergence, out of memory at batch 1): recorded, and the job goes on."""


@dataclass(frozen=True)
class Answer:
    """A generated answer: its text, its length in tokens, and why it ended (stop or length)."""

    text: str
    n_tokens: int
    finish_reason: str


class Scorer:
    """Scores texts by a model: the base itself, or a PeftModel on it. No result depends on batch size, order or padding (to 1e-4)."""

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, tokens_per_batch: int = TOKENS_PER_BATCH):
        self.tokenizer, self.tokens_per_batch = tokenizer, tokens_per_batch
        self.model = model.get_base_model() if isinstance(model, PeftModel) else model
        self.model.eval()
        self.soft_prompt = _soft_prompt(model)  # [virtual tokens, width], or None
        self.n_virtual = 0 if self.soft_prompt is None else len(self.soft_prompt)
        self.context_length = context_length(self.model) - self.n_virtual

    # ---- scoring
    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Log-probabilities [n] of continuations after contexts, in nats; the contexts are texts that already hold their special tokens."""
        return np.array([scores.sum() for scores in self.token_logprobs([(self.ids(a), self.ids(b)) for a, b in pairs])])

    def token_logprobs(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[np.ndarray]:
        """For each (context, continuation) of token ids, the log-probability of each token of the continuation, in nats."""
        results: list[np.ndarray] = [np.empty(0)] * len(pairs)
        for batch, logits in self._continuations(pairs):
            targets = torch.tensor([token for i in batch for token in pairs[i][1]], device=logits.device)
            values = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
            for i, part in zip(batch, values.cpu().split([len(pairs[i][1]) for i in batch]), strict=True):
                results[i] = part.double().numpy()
        return results

    def distributions(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[torch.Tensor]:
        """For each (context, continuation), the log-probabilities [tokens, vocabulary] before each token of the continuation."""
        results: list[torch.Tensor] = [torch.empty(0)] * len(pairs)
        for batch, logits in self._continuations(pairs):
            for i, part in zip(batch, logits.log_softmax(1).split([len(pairs[i][1]) for i in batch]), strict=True):
                results[i] = part
        return results

    def choices(self, contexts: Sequence[Ids], options: Sequence[Sequence[str]], stem: str = "") -> np.ndarray:
        """Log-probabilities [n, k] of k options after each context and the stem, not normalised over the options.

        One forward pass per context where all options are single tokens.
        """
        stem_ids = self.ids(stem) if stem else []
        ids = [[self.ids(option) for option in row] for row in options]
        if all(len(option) == 1 for row in ids for option in row):
            return self.next_tokens([[*context, *stem_ids] for context in contexts], [[option[0] for option in row] for row in ids])
        pairs = [([*context, *stem_ids], option) for context, row in zip(contexts, ids, strict=True) for option in row]
        return np.array([scores.sum() for scores in self.token_logprobs(pairs)]).reshape(len(contexts), -1)

    def letters(self, contexts: Sequence[Ids], letters: Sequence[str] = "ABC") -> np.ndarray:
        """Log-probabilities [n, k] of the letters as the answer's first token: `choices` for single tokens."""
        return self.choices(contexts, [list(letters)] * len(contexts))

    def next_tokens(self, contexts: list[Ids], tokens: list[Ids]) -> np.ndarray:
        """Log-probabilities [n, k] of k single tokens right after each context, from one forward pass each."""
        result = np.empty((len(contexts), len(tokens[0]) if tokens else 0))
        # a continuation of one token is scored where the context ends, whatever that token is
        for batch, logits in self._continuations([(context, row[:1]) for context, row in zip(contexts, tokens, strict=True)]):
            wanted = torch.tensor([tokens[i] for i in batch], device=logits.device)
            result[batch] = logits.log_softmax(1).gather(1, wanted).cpu().double().numpy()
        return result

    @torch.inference_mode()
    def _continuations(self, pairs: Sequence[tuple[Ids, Ids]]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Batches of pair numbers, with the logits [all tokens of their continuations, vocabulary] that predict those tokens."""
        self._check_lengths([len(a) + len(b) for a, b in pairs])
        for batch in self._batches([len(a) + len(b) for a, b in pairs]):
            yield from self._halving(batch, lambda part: self._forward([pairs[i] for i in part]))

    def _forward(self, pairs: list[tuple[Ids, Ids]]) -> torch.Tensor:
        """Logits where a continuation's token is predicted, rows right-padded; causal attention makes a padding mask needless."""
        rows = [[*a, *b][:-1] for a, b in pairs]
        hidden = self._backbone(_padded(rows, self.tokenizer.pad_token_id, "right").to(self.model.device))
        where = [(i, self.n_virtual + len(a) - 1 + t) for i, (a, b) in enumerate(pairs) for t in range(len(b))]
        i, t = torch.tensor(where, device=hidden.device).T
        return self._head(hidden[i, t])

    def _backbone(self, ids: torch.Tensor) -> torch.Tensor:
        """Last hidden states [rows, virtual + length, width]."""
        return self.model.base_model(inputs_embeds=self._embed(ids), use_cache=False).last_hidden_state

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits in fp32 from hidden states, with the family's soft cap where its config has one."""
        logits = self.model.get_output_embeddings()(hidden).float()
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of right-padded ids after the soft prompt."""
        embedded = self.model.get_input_embeddings()(ids)
        if self.soft_prompt is None:
            return embedded
        return torch.cat([self.soft_prompt.to(embedded.dtype).expand(len(ids), -1, -1), embedded], 1)

    # ---- generation
    @torch.inference_mode()
    def generate(self, contexts: Sequence[Ids], max_new_tokens: int) -> list[Answer]:
        """The greedy answer to each context (token ids up to where the answer begins)."""
        lengths = [len(context) + max_new_tokens for context in contexts]
        self._check_lengths(lengths)
        results: list[Answer] = [Answer("", 0, "length")] * len(contexts)
        for batch in self._batches(lengths):
            for part, tokens in self._halving(batch, lambda part: self._greedy([contexts[i] for i in part], max_new_tokens)):
                for i, row in zip(part, tokens.tolist(), strict=True):
                    results[i] = self._answer(row)
        return results

    def _greedy(self, contexts: list[Ids], max_new_tokens: int) -> torch.Tensor:
        ids = _padded(contexts, self.tokenizer.pad_token_id, "left").to(self.model.device)
        lengths = torch.tensor([len(context) for context in contexts], device=ids.device)
        embedded, mask = self._left_padded(ids, lengths)
        return self.model.generate(
            inputs_embeds=embedded, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True,
            pad_token_id=self.tokenizer.pad_token_id, temperature=None, top_p=None, top_k=None,
        )  # fmt: skip

    def _left_padded(self, ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [rows, virtual + length, width] with padding first, then the soft prompt, then the text; and their mask."""
        embedded = self.model.get_input_embeddings()(ids)
        padding = ids.shape[1] - lengths
        if self.soft_prompt is not None:
            width = embedded.shape[2]
            embedded = torch.cat([embedded.new_zeros(len(ids), self.n_virtual, width), embedded], 1)
            for row, start in zip(embedded, padding.tolist(), strict=True):
                row[start : start + self.n_virtual] = self.soft_prompt.to(embedded.dtype)
        positions = torch.arange(embedded.shape[1], device=ids.device)
        return embedded, (positions[None] >= padding[:, None]).long()

    def _answer(self, tokens: list[int]) -> Answer:
        ends = _end_tokens(self.model, self.tokenizer)
        stop = next((i for i, token in enumerate(tokens) if token in ends), None)
        kept = tokens if stop is None else tokens[:stop]
        text = self.tokenizer.decode(kept, skip_special_tokens=True).strip()
        return Answer(text, len(kept), "length" if stop is None else "stop")

    # ---- batches
    def ids(self, text: str) -> Ids:
        """Token ids of a text that already holds its special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _check_lengths(self, lengths: list[int]) -> None:
        too_long = [length for length in lengths if length > self.context_length]
        if too_long:
            raise ValueError(
                f"{len(too_long)} of {len(lengths)} prompts need up to {max(too_long)} tokens and the model reads {self.context_length}; "
                "nothing is cut in silence: shorten them, or choose a model with a longer context"
            )

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Numbers of rows, longest first, so many that their padded rectangle fits the token budget."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        while order:
            size = max(1, self.tokens_per_batch // (lengths[order[0]] + self.n_virtual))
            yield order[:size]
            order = order[size:]

    def _halving(self, batch: list[int], work) -> Iterator[tuple[list[int], torch.Tensor]]:
        """(rows, work(rows)), the rows split in halves as long as the device has no memory for them."""
        try:
            yield batch, work(batch)
            return
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise VariantFailure("out of memory with a single prompt") from None
        torch.cuda.empty_cache()
        middle = len(batch) // 2
        yield from self._halving(batch[:middle], work)
        yield from self._halving(batch[middle:], work)

    def ask(self, prompts: Sequence[str], system_prompt: str | None = None) -> list[Ids]:
        """Token ids of user prompts by the chat template, up to where the answer begins."""
        return [ask(self.tokenizer, prompt, system_prompt) for prompt in prompts]


@torch.inference_mode()
def _soft_prompt(model: PreTrainedModel | PeftModel) -> torch.Tensor | None:
    """The virtual tokens [n, width] of a prompt-based adapter; None for all else."""
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return None
    return model.get_prompt(batch_size=1)[0].detach().clone()


def _padded(rows: list[Ids], pad: int, side: str) -> torch.Tensor:
    width = max(map(len, rows))
    fill = [[pad] * (width - len(row)) for row in rows]
    return torch.tensor([row + extra if side == "right" else extra + row for row, extra in zip(rows, fill, strict=True)])


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    ends = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [] if ends is None else [ends])}
