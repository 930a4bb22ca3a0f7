"""Safety-critical ranks of a weight, and how much of an update random subspaces hold."""

import torch
from scipy.special import betaincinv
from torch import Tensor

from driftbook.stats.confidence import LOWER, UPPER
from driftbook.stats.directions import CRITICAL
from driftbook.training.updates import Update


def critical_ranks(weight: Tensor, safety: Tensor, utility: Tensor) -> Tensor:
    """Orthonormal columns [out, k]: the ranks of a weight [out, in] that are critical for safety
    and not for utility, by what its module is given [tokens, in] at the tokens of answers to
    harmful and to harmless prompts.

    ActSVD (Wei et al. 2024, arXiv 2402.05162): with W X = U S V', X the inputs of one
    set, the set's ranks are the first columns of U, here the CRITICAL share of them, and P = U U'.
    What is critical for safety alone is (I - P_utility) P_safety. An update lies in it as far as
    in the column space of this product, whose singular values are the sines of the angles between
    both sets' ranks; columns nearer than 45 degrees to utility's ranks, which would be more
    utility's than safety's, are left out.
    """
    n = min(len(safety), len(utility), *weight.shape)
    k = max(1, round(CRITICAL * n))
    one, other = (_top_ranks(weight, x, k) for x in (safety, utility))
    columns, sines, _ = torch.linalg.svd(one - other @ (other.T @ one), full_matrices=False)
    return columns[:, sines**2 >= 0.5].float()


def _top_ranks(weight: Tensor, x: Tensor, k: int) -> Tensor:
    """The first k left singular vectors of W X, x = X' [tokens, in], without those of a zero."""
    u, s, _ = torch.linalg.svd(weight.double() @ x.double().T, full_matrices=False)
    return u[:, :k][:, s[:k] > 1e-9 * s[0]]


def random_energy(update: Update, k: int) -> tuple[float, float, float]:
    """The percentage of an update's energy in a random subspace of k of its d output dimensions:
    the mean, k / d, and a range by the Beta distribution of the same mean and variance.

    The share is sum w_i b_i, with w_i = s_i^2 / sum s^2 of its singular values, and b_i, which is
    Beta(k/2, (d - k)/2), the squared length of the subspace's part of the i-th direction. The b_i
    of all d directions sum to k, so that two of them have the covariance -var(b) / (d - 1). The
    distribution is exact for an update of one rank.
    """
    d, w = update.shape[0], update.concentration()
    mean, spread = k / d, 2 * k * (d - k) / (d**2 * (d + 2))
    variance = spread * (w - (1 - w) / max(d - 1, 1))
    low = high = mean
    if variance > 1e-12:
        size = mean * (1 - mean) / variance - 1
        low, high = betaincinv(mean * size, (1 - mean) * size, [LOWER, UPPER])
    return 100 * mean, 100 * float(low), 100 * float(high)
