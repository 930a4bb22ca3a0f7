"""What a frozen linear head makes of hidden states, with the gradient at once, so that no row of
logits outlives its part (as Liger's fused linear cross-entropy does: Hsu et al. 2024, arXiv
2410.10989).
"""

from typing import Any

import torch

from driftbook.models.scoring import LOGITS_AT_ONCE


class _FrozenHead(torch.autograd.Function):
    """Numbers [n] that a frozen linear head makes of hidden states [n, width] and of what is known
    of them [n, ...], with the gradient [n, width] of each computed at once.
    """

    rows_of_logits = 1  # that a hidden state needs

    @classmethod
    def piece(
        cls, hidden: torch.Tensor, weight: torch.Tensor, known: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The numbers of some hidden states, and their gradients."""
        raise NotImplementedError

    @classmethod
    def forward(
        cls, ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, known: torch.Tensor
    ) -> torch.Tensor:
        values, slope = hidden.new_empty(len(hidden), dtype=torch.float32), torch.empty_like(hidden)
        step = max(1, LOGITS_AT_ONCE // len(weight) // cls.rows_of_logits)
        for first in range(0, len(hidden), step):
            part = slice(first, first + step)
            values[part], slope[part] = cls.piece(hidden[part], weight, known[part])
        ctx.save_for_backward(slope)
        return values

    @staticmethod
    def backward(ctx: Any, above: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * above[:, None].to(slope.dtype), None, None


class Targets(_FrozenHead):
    """Log-probabilities [n] of targets."""

    @classmethod
    def piece(
        cls, hidden: torch.Tensor, weight: torch.Tensor, known: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = (hidden @ weight.T).float()
        norm = logits.logsumexp(1)
        values = logits.gather(1, known[:, None])[:, 0] - norm
        p = logits.sub_(norm[:, None]).exp_().to(weight.dtype)
        return values, weight[known] - p @ weight


class Divergences(_FrozenHead):
    """KL(base || model) [n] over the whole vocabulary, of the base's hidden states [n, width]."""

    rows_of_logits = 2  # its own, and the base's

    @classmethod
    def piece(
        cls, hidden: torch.Tensor, weight: torch.Tensor, known: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        own, held = ((x @ weight.T).float().log_softmax(1) for x in (hidden, known))
        p = held.exp()
        values = (p * (held - own)).sum(1)
        return values, (own.exp_() - p).to(weight.dtype) @ weight
