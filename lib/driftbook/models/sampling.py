"""How the next token of an answer is chosen: the most probable one, or a draw that does not depend
on the batch.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


class VariantFailure(Exception):
    """A variant's own failure (divergence, out of memory at batch 1): recorded, and the job goes
    on.
    """


class OutOfMemory(VariantFailure):
    """A failure for want of memory, which a larger device may mend: tried again where there is
    one.
    """


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: from the most probable tokens that together have `top_p`, at a
    temperature. Each prompt and sample number has its own stream of random numbers, so that an
    answer does not depend on the batch it is drawn in."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    sample: int = 0

    @property
    def name(self) -> str:
        """What the tables call this decoding."""
        return f"temperature {self.temperature:g}, top_p {self.top_p:g}"

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature={self.temperature}, top_p={self.top_p}; expected a temperature above"
                " 0 and 0 < top_p <= 1"
            )


def uniforms(contexts: Sequence[list[int]], sampling: Sampling, steps: int) -> np.ndarray:
    """Random numbers [contexts, steps] in [0, 1), each row from a stream of its own context, seed
    and sample number.
    """
    own = [zlib.crc32(np.array(context).tobytes()) for context in contexts]
    seeds = [[sampling.seed, sampling.sample, one] for one in own]
    return np.stack([np.random.default_rng(seed).random(steps) for seed in seeds])


def next_tokens(
    logits: torch.Tensor, sampling: Sampling | None, draws: np.ndarray | None
) -> np.ndarray:
    """The next token [rows]: the most probable one, or that at which the cumulative probability
    passes the row's draw in [0, 1).

    top_p keeps the fewest tokens that together reach it (nucleus sampling, Holtzman et al.
    2020).
    """
    best, greedy = logits.max(1)
    if not torch.isfinite(best).all():
        raise VariantFailure("the model's probabilities are not numbers")
    if sampling is None:
        return greedy.cpu().numpy()
    p = (logits.double() / sampling.temperature).softmax(1)
    if sampling.top_p < 1:
        falling, order = p.sort(dim=1, descending=True, stable=True)
        beyond = falling.cumsum(1) - falling >= sampling.top_p
        p = p.masked_fill(beyond.gather(1, order.argsort(1)), 0)
    # in the vocabulary's order: in that of probability, two tokens that are nearly as probable
    # could change places from batch to batch
    total = p.cumsum(1)
    drawn = torch.from_numpy(draws).to(total)[:, None] * total[:, -1:]
    place = torch.searchsorted(total, drawn, right=True)
    return place.clamp(max=p.shape[1] - 1)[:, 0].cpu().numpy()
