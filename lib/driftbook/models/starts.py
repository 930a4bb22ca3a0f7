"""How a soft prompt begins where PEFT has no such start: from a text's embeddings, from these with
their coordinates permuted, frozen in front of trainable tokens, or from rows that are given.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel, PromptEncoder, PromptEncoderConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from driftbook.models.suffixes import SuffixLayer

ENCODED_WITHIN = 1e-2  # most relative error of what P-Tuning's encoder gives in place of a start
NO_TOKENS = "the text that a soft prompt begins as has no tokens; give init_texts words"


class FrozenFront(nn.Module):
    """Embeddings of virtual tokens of which the first never change: `weight` [n, width] is trained;
    `front` [m, width] is no parameter, so that no optimiser, weight decay or checkpoint knows it.
    PEFT asks for all m + n, and saves them as an ordinary prompt.
    """

    def __init__(self, front: Tensor, weight: Tensor):
        super().__init__()
        self.register_buffer("front", front, persistent=False)
        self.weight = nn.Parameter(weight)

    def forward(self, indices: Tensor) -> Tensor:
        return nn.functional.embedding(indices, torch.cat([self.front, self.weight]))


@contextmanager
def as_one(model: PeftModel) -> Iterator[None]:
    """A block in which a prompt with frozen rows is one embedding of all its rows, as PEFT makes
    it: TRL's DPO copies it by name into an adapter of its own.
    """
    encoder = model.prompt_encoder["default"] if hasattr(model, "prompt_encoder") else None
    frozen = getattr(encoder, "embedding", None)
    if not isinstance(frozen, FrozenFront):
        yield
        return
    rows = torch.cat([frozen.front, frozen.weight.detach()])
    encoder.embedding = nn.Embedding.from_pretrained(rows, freeze=False)
    try:
        yield
    finally:
        encoder.embedding = frozen


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that a soft prompt begins as.

    Raises:
        ValueError: it has none.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise ValueError(NO_TOKENS)
    return ids


@torch.no_grad()
def text_rows(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, n: int | None = None
) -> Tensor:
    """What the layers are given for a text's tokens [n, width], in fp32; repeated or cut to n, all
    of them once where n is not given.
    """
    ids = token_ids(tokenizer, text)
    n = len(ids) if n is None else n
    repeated = torch.tensor((ids * (n // len(ids) + 1))[:n])
    return base.get_input_embeddings()(repeated.to(base.device)).float()


def permuted(rows: Tensor, seed: int) -> Tensor:
    """The rows with their coordinates in another order, the same for all of them: lengths and the
    angles between rows are as before, and no row means anything.
    """
    order = torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(seed))
    return rows[:, order.to(rows.device)]


@torch.no_grad()
def _vocabulary(base: PreTrainedModel, n: int, seed: int) -> Tensor:
    """The embeddings [n, width] of tokens that are drawn by the seed."""
    table = base.get_input_embeddings()
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, table.num_embeddings, (n,), generator=drawn)
    return table(ids.to(base.device)).float()


@torch.no_grad()
def begin(
    model: PeftModel,
    init: str,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    text: str | None = None,
    rows: Tensor | None = None,
) -> None:
    """Let the soft prompt of a new adapter begin as `init` says: as the `rows` [virtual tokens,
    width] that are given, else from the text. Starts that PEFT itself made are left as they are.

    Raises:
        ValueError: the text has no tokens, or P-Tuning's encoder cannot give these rows.
    """
    base = model.get_base_model()
    if isinstance(layer := base.get_input_embeddings(), SuffixLayer):
        if init == "vocabulary":
            layer.rows.copy_(_vocabulary(base, len(layer.rows), seed))
        return
    encoder = model.prompt_encoder["default"]
    n, encoded = encoder.embedding.num_embeddings, hasattr(encoder, "mlp_head")
    if init == "safety_frozen":
        front = text_rows(base, tokenizer, text)
        encoder.embedding = FrozenFront(front, encoder.embedding.weight[len(front) :].clone())
        return
    if rows is None and text is not None:
        rows = text_rows(base, tokenizer, text, n)
        rows = permuted(rows, seed) if init == "safety_permuted" else rows
    if rows is None and init == "vocabulary" and encoded:
        rows = _vocabulary(base, n, seed)
    if rows is not None and encoded:
        fit_encoder(encoder, rows)
    elif rows is not None:
        encoder.embedding.weight.copy_(rows)


def check_encoder(config: PromptEncoderConfig, width: int) -> None:
    """Raise a ValueError where P-Tuning's encoder, with these settings on a base model of this
    width, could not give virtual tokens that all differ (see `fit_encoder`).
    """
    made = copy.copy(config)
    made.token_dim, made.num_transformer_submodules = width, 1
    made.encoder_hidden_size = made.encoder_hidden_size or width
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fit_encoder(PromptEncoder(made), torch.randn(made.num_virtual_tokens, width))


@torch.no_grad()
def fit_encoder(encoder: nn.Module, rows: Tensor) -> float:
    """Change the last layer of P-Tuning's encoder, by no more than it takes (least squares of least
    norm), so that the encoder gives these rows [virtual tokens, width]; and by what relative error
    it does. The embeddings and the layers before it stay as they were drawn.

    With at least as many hidden units as virtual tokens there is such a layer, where the drawn
    tokens differ in what the layers before it make of them.

    Raises:
        ValueError: the relative error (Frobenius norms) is above ENCODED_WITHIN.
    """
    last, seen = encoder.mlp_head[-1], []
    hook = last.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    indices = torch.arange(len(rows), device=rows.device)[None]
    given = encoder(indices)[0].double()
    hook.remove()
    hidden = seen[0][0].double()
    inputs = torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1)
    change = torch.linalg.pinv(inputs, rtol=1e-6) @ (rows.double() - given)
    last.weight += change[:-1].T.to(last.weight.dtype)
    last.bias += change[-1].to(last.bias.dtype)
    error = float((encoder(indices)[0] - rows).norm() / rows.norm())
    if not error <= ENCODED_WITHIN:
        raise ValueError(
            f"the encoder gives its start with a relative error of {error:.2g}, above"
            f" {ENCODED_WITHIN:g}; raise encoder_hidden_size, or lower num_virtual_tokens"
        )
    return error
