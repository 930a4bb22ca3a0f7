"""The names of probes, and the arithmetic of directions and states: numpy alone."""

from collections.abc import Sequence

import numpy as np

CEILING = "refusal direction, cosine of two halves"
DRIFT = "refusal direction, cosine with the base's"
DROP = "harmful prompts on the base's direction, drop (percent of the base's gap)"
SHIFT = "mean state, 1 - cosine with the base's"
CKA = "states, linear CKA with the base's"
KL = "next token, KL from the base (nats)"
UPDATE = "adapter's change of a module's output, over its input (percent)"
ENERGY = "update in the alignment's main directions (percent of its energy)"
NEURONS = "update in safety-critical neurons (percent of its energy)"
RANKS = "update in safety-critical ranks (percent of its energy)"
ATTENTION = "attention on the soft prompt (percent)"
BEGINS = "answer begins as a refusal (percent)"
RESTORED = "answer begins as a refusal, base's states put in (percent)"
TAKEN = "base's answer begins as a refusal, run's states put in (percent)"
LAST, WHOLE = "last of the prompt", "all of the prompt"
HARMFUL, HARMLESS, OF_BASE = "harmful", "harmless", "the base itself"
CRITICAL = 0.1  # share of a module's neurons, or ranks, that are its most important ones
LEAST_CEILING = 0.5  # cosine of two halves below which there are too few prompts for a direction
DRAWS = 100  # of prompts, halves, labels and directions


# ---- directions (Arditi et al. 2024, arXiv 2406.11717)
def direction(harmful: np.ndarray, harmless: np.ndarray) -> np.ndarray:
    """r_l = norm(mean h_harmful - mean h_harmless) by layer: [layers, width] of states [n, layers,
    width]; zero where the means are equal.
    """
    return unit(harmful.mean(0) - harmless.mean(0))


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length one along the last axis; zero stays zero."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines along the last axis."""
    return (unit(a) * unit(b)).sum(-1)


def halves(harmful: np.ndarray, harmless: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cosines [DRAWS, layers] of the directions of two halves of the prompts."""
    both = (harmful, harmless)
    drawn = [[np.array_split(rng.permutation(len(one)), 2) for one in both] for _ in range(DRAWS)]
    pair = [
        [mean_states(one, [parts[k][half] for parts in drawn]) for k, one in enumerate(both)]
        for half in range(2)
    ]
    return cosines(*(a - b for a, b in pair))


def shuffled(both: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Directions [DRAWS, layers, width] of prompts whose labels are shuffled, n of them harmful."""
    orders = [rng.permutation(len(both)) for _ in range(DRAWS)]
    one, other = zip(*((order[:n], order[n:]) for order in orders), strict=True)
    return unit(mean_states(both, one) - mean_states(both, other))


def mean_states(states: np.ndarray, chosen: Sequence[np.ndarray]) -> np.ndarray:
    """Mean states [draws, layers, width] of the prompts that each draw chose, by their numbers, of
    states [n, layers, width]: one product of matrices for all draws.
    """
    n, *shape = states.shape
    shares = [np.bincount(one, minlength=n) / len(one) for one in chosen]
    flat = states.reshape(n, -1)
    return (np.array(shares) @ flat.astype(float)).reshape(len(chosen), *shape)


def linear_cka(a: np.ndarray, b: np.ndarray, orders: Sequence[np.ndarray]) -> np.ndarray:
    """Linear CKA [orders, layers] of states [n, layers, width] (Kornblith et al. 2019, arXiv
    1905.00414), b's prompts in each of these orders, by the kernels [n, n]:
    |X'Y|^2 / (|X'X| |Y'Y|), columns centred.
    """
    a, b = a - a.mean(0), b - b.mean(0)
    k, m = np.einsum("ilw,jlw->lij", a, a), np.einsum("ilw,jlw->lij", b, b)
    norms = np.sqrt((k * k).sum((1, 2)) * (m * m).sum((1, 2)))
    products = np.array([(k * m[:, one][:, :, one]).sum((1, 2)) for one in orders])
    return np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
