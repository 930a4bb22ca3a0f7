"""Token sequences that share beginnings, as trees: a token that several sequences begin with is
computed once.

A tree is one row of a batch. Its tokens stand in depth-first order, and attention is allowed from a
token to those on its own path alone, so that each sequence sees exactly what it would see by itself
(the tree attention of speculative decoding: Miao et al. 2024, SpecInfer).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Tokens = Sequence[int]
LEAST_SHARED = 8  # tokens; sharing fewer is not worth the longer row
LONGEST_TREE = 320  # tokens; attention costs the square of a row's length


@dataclass(frozen=True)
class Tree:
    """Sequences as one row of T distinct tokens.

    positions[t] is the token's distance from the root; the tokens below t are t + 1 ... ends[t] -
    1; paths holds for each sequence the places [its length] of its tokens.
    """

    tokens: np.ndarray
    positions: np.ndarray
    ends: np.ndarray
    paths: list[np.ndarray]


def common_prefix(a: Tokens, b: Tokens) -> int:
    """How many tokens two sequences share at their beginning."""
    limit = min(len(a), len(b))
    if a[:limit] == b[:limit]:
        return limit
    # a[:low] is shared, a[:high] is not: comparing slices is much faster than tokens one by one
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low


def groups(sequences: Sequence[Tokens], skip: int = 0) -> list[tuple[list[int], int]]:
    """Numbers of the sequences that are worth one tree, in the order in which they share most, and
    the tree's size in tokens.

    The first `skip` tokens, which all share, are not counted.
    """
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    found: list[tuple[list[int], int]] = []
    for before, number in zip([None, *order], order, strict=False):
        shared = 0 if before is None else common_prefix(sequences[before], sequences[number]) - skip
        length = len(sequences[number]) - skip
        numbers, size = found[-1] if found else ([], LONGEST_TREE)
        grown = size + length - shared
        if found and shared >= min(LEAST_SHARED, length) and grown <= LONGEST_TREE:
            found[-1] = ([*numbers, number], grown)
        else:
            found.append(([number], length))
    return found


def tree(sequences: Sequence[Tokens], skip: int = 0) -> Tree:
    """The tree of sequences in sorted order, without the `skip` tokens that all share."""
    tokens, positions, ends, paths, path = [], [], [], [], []
    for i, sequence in enumerate(sequences):
        shared = common_prefix(sequences[i - 1], sequence) - skip if i else 0
        for place in path[shared:]:
            ends[place] = len(tokens)
        fresh = sequence[skip + shared :]
        path = path[:shared] + list(range(len(tokens), len(tokens) + len(fresh)))
        positions += range(shared, shared + len(fresh))
        ends += [0] * len(fresh)
        tokens += fresh
        paths.append(path)
    for place in path:
        ends[place] = len(tokens)
    arrays = map(np.array, (tokens, positions, ends))
    return Tree(*arrays, [np.array(one) for one in paths])
