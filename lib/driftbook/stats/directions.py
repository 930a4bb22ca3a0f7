"""The names of probes, and the arithmetic of directions and states: numpy alone."""

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
ATTENTION = "attention on the soft prompt (percent)"
BEGINS = "answer begins as a refusal (percent)"
RESTORED = "answer begins as a refusal, base's states put in (percent)"
TAKEN = "base's answer begins as a refusal, run's states put in (percent)"
LAST, WHOLE = "last of the prompt", "all of the prompt"
HARMFUL, HARMLESS, OF_BASE = "harmful", "harmless", "the base itself"
CRITICAL = 0.1  # share of a module's neurons that are its most important ones
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
    found = []
    for _ in range(DRAWS):
        parts = [rng.permutation(len(one)) for one in (harmful, harmless)]
        a, b = zip(*(np.array_split(part, 2) for part in parts), strict=True)
        pair = (direction(harmful[one], harmless[other]) for one, other in (a, b))
        found.append(cosines(*pair))
    return np.array(found)


def shuffled(both: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Directions [DRAWS, layers, width] of prompts whose labels are shuffled, n of them harmful."""
    orders = (rng.permutation(len(both)) for _ in range(DRAWS))
    return np.stack([direction(both[order[:n]], both[order[n:]]) for order in orders])


def linear_cka(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Linear CKA by layer of states [n, layers, width] (Kornblith et al. 2019, arXiv 1905.00414),
    by the kernels [n, n]: |X'Y|^2 / (|X'X| |Y'Y|), columns centred.
    """
    a, b = a - a.mean(0), b - b.mean(0)
    k, m = np.einsum("ilw,jlw->lij", a, a), np.einsum("ilw,jlw->lij", b, b)
    norms = np.sqrt((k * k).sum((1, 2)) * (m * m).sum((1, 2)))
    return np.divide((k * m).sum((1, 2)), norms, out=np.zeros(len(k)), where=norms > 0)
