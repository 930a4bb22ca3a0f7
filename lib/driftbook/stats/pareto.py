"""The Pareto front of a set of points."""

import numpy as np


def front(points: np.ndarray) -> np.ndarray:
    """Which rows of [..., points, goals] no other row beats: at least as low in every goal and
    lower in one. Equal rows beat neither.
    """
    a, b = points[..., :, None, :], points[..., None, :, :]
    return ~((b <= a).all(-1) & (b < a).any(-1)).any(-1)
