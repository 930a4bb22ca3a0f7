"""What a frozen linear head makes of hidden states, with the gradient at once, so that no row of
logits outlives its part (as Liger's fused linear cross-entropy does: Hsu et al. 2024, arXiv
2410.10989).
"""

from typing import Any

import torch

from driftbook.models.scoring import LOGITS_AT_ONCE


class _FrozenHead(torch.autograd.Function):
    """Numbers [n] that a frozen linear head makes of hidden states [n, width], with the gradient
    [n, width] of each computed at once and saved by `forward`.
    """

    @staticmethod
    def backward(ctx: Any, above: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * above[:, None].to(slope.dtype), None, None


class Targets(_FrozenHead):
    """Log-probabilities [n] of targets."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        values, slope = hidden.new_empty(len(hidden), dtype=torch.float32), torch.empty_like(hidden)
        step = max(1, LOGITS_AT_ONCE // len(weight))
        for first in range(0, len(hidden), step):
            part = slice(first, first + step)
            logits = (hidden[part] @ weight.T).float()
            norm = logits.logsumexp(1)
            values[part] = logits.gather(1, targets[part, None])[:, 0] - norm
            p = logits.sub_(norm[:, None]).exp_().to(weight.dtype)
            slope[part] = weight[targets[part]] - p @ weight
        ctx.save_for_backward(slope)
        return values


class Divergences(_FrozenHead):
    """KL(base || model) [n] over the whole vocabulary, of the base's hidden states [n, width]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, base: torch.Tensor
    ) -> torch.Tensor:
        values, slope = hidden.new_empty(len(hidden), dtype=torch.float32), torch.empty_like(hidden)
        step = max(1, LOGITS_AT_ONCE // len(weight) // 2)
        for first in range(0, len(hidden), step):
            part = slice(first, first + step)
            own, held = ((x[part] @ weight.T).float().log_softmax(1) for x in (hidden, base))
            p = held.exp()
            values[part] = (p * (held - own)).sum(1)
            slope[part] = (own.exp_() - p).to(weight.dtype) @ weight
        ctx.save_for_backward(slope)
        return values
