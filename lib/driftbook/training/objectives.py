"""Training with a second objective beside the task's: what alignment examples ask of the model.

Each step has two gradients, of the task's loss, g, and of the alignment examples' loss, a, and a
rule that makes one of them. Of `kl`, `safegrad` and `drift_budget` the second loss is KL(base ||
model) over the whole vocabulary where the examples' answers are predicted; of `pcgrad` and `mgda`
it is minus the answers' mean log-probability: KL is at its least, with no gradient, where training
begins, and the shortest of all mixtures, which MGDA takes, would be none.

The second loss is that of the model without dropout, so that the task's steps draw what they would
draw alone: a run is paired with the plain run of its seed. Which examples a step sees follows from
the seed and the number of the step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

ROUNDING = 1e-5  # of the task's gradient: a shorter one, as of KL at the base itself, is rounding's
BY_LIKELIHOOD = ("pcgrad", "mgda")  # kinds whose second loss is that of fine-tuning


# ---- one gradient of two [n], each a function of the task's, the alignment examples' and a value
def weighted(g: torch.Tensor, a: torch.Tensor, weight: float) -> torch.Tensor:
    """The gradient of the task's loss and so much of the other."""
    return g + weight * a


def without_conflict(g: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """g without its part along a, where the two point apart."""
    return g - (g @ a) / (a @ a) * a if g @ a < 0 else g


def safegrad(g: torch.Tensor, a: torch.Tensor, rho: float) -> torch.Tensor:
    """The task's gradient without what undoes alignment, and rho times the other (SafeGrad, arXiv
    2508.07172).
    """
    return without_conflict(g, a) + rho * a


def pcgrad(g: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """The sum of both, each without what conflicts with the other (Yu et al. 2020, arXiv
    2001.06782). Of two gradients the order in which the paper draws them does not matter.
    """
    return without_conflict(g, a) + without_conflict(a, g)


def mgda(g: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """The shortest vector between the two, along which neither loss rises (MGDA in its closed form
    for two: Sener & Koltun 2018, arXiv 1810.04650, eq. 4).
    """
    apart = g - a
    size = apart @ apart
    share = ((a @ -apart) / size).clamp(0.0, 1.0) if size > 0 else 0.5
    return share * g + (1 - share) * a


# ---- gradients as vectors
def taken(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """The gradients of parameters as one vector [n], and taken from them."""
    parts = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    for one in parameters:
        one.grad = None
    return torch.cat([part.flatten() for part in parts])


def put(parameters: Sequence[torch.Tensor], gradient: torch.Tensor) -> None:
    """The parts of a vector [n] as the parameters' gradients."""
    sizes = [one.numel() for one in parameters]
    for one, part in zip(parameters, gradient.split(sizes), strict=True):
        one.grad = part.view_as(one).clone()


# ---- the second objective of a training
@dataclass(frozen=True)
class Change:
    """How a mitigation changes a training: its kind, and what a study file says of it that this
    kind has.
    """

    kind: str
    data: str | None = None
    value: float | None = None
    betas: tuple[float, ...] = ()
    eta: float | None = None


class Second:
    """The second objective of one training: `n` of its examples (`Conversation`s) are seen at each
    step. `state` is what a checkpoint holds of it.
    """

    def __init__(self, change: Change, examples: Sequence[Any], n: int, seed: int):
        self.change, self.examples, self.n, self.seed = change, examples, n, seed
        self.state = {"multiplier": 0.0, "steps": 0, "conflicts": 0, "cosines": 0.0, "losses": 0.0}

    def members(self, step: int) -> list[Any]:
        """The examples of a step: all of them in an order drawn by the seed, and again in another
        order.
        """
        places = [divmod(step * self.n + i, len(self.examples)) for i in range(self.n)]
        rounds = dict.fromkeys(one for one, _ in places)
        order = {
            one: np.random.default_rng([self.seed, one]).permutation(len(self.examples))
            for one in rounds
        }
        return [self.examples[order[one][place]] for one, place in places]

    def loss(self, forward: Any, rows: Sequence[Any], members: Sequence[Any]) -> torch.Tensor:
        """The part of some rows in the mean over the counted tokens of a step's examples."""
        by_likelihood = self.change.kind in BY_LIKELIHOOD
        found = forward.logprobs(rows) if by_likelihood else forward.divergences(rows)
        total = sum(part.sum() for row in found for part in row)
        return (-total if by_likelihood else total) / sum(len(one.counted) for one in members)

    def joined(self, task: torch.Tensor, other: torch.Tensor, loss: float) -> torch.Tensor:
        """The gradient [n] of a step, of the task's, the alignment examples' and their loss."""
        if other.norm() < ROUNDING * task.norm():
            other = torch.zeros_like(other)  # it has no direction in which to point apart
        self._note(task, other, loss)
        kind, value = self.change.kind, self.change.value
        if kind == "pcgrad":
            return pcgrad(task, other)
        if kind == "mgda":
            return mgda(task, other)
        if kind == "safegrad":
            return safegrad(task, other, value)
        if kind == "drift_budget":
            grown = self.state["multiplier"] + self.change.eta * (loss - value)
            value = self.state["multiplier"] = max(0.0, grown)
        return weighted(task, other, value)

    def _note(self, task: torch.Tensor, other: torch.Tensor, loss: float) -> None:
        together, size = float(task @ other), float(task.norm() * other.norm())
        self.state["steps"] += 1
        self.state["conflicts"] += together < 0
        self.state["cosines"] += together / size if size > 0 else 0.0
        self.state["losses"] += loss

    def record(self) -> dict[str, Any]:
        """What was done, in the mean over the steps: the share in which the two gradients pointed
        apart, their cosine (0 where one is zero) and the second loss, in nats per token; and of a
        budget the multiplier that was reached.
        """
        state, steps = self.state, max(1, self.state["steps"])
        found = {"alignment_examples_per_step": self.n}
        found["share_of_steps_in_conflict"] = round(state["conflicts"] / steps, 6)
        found["mean_cosine"] = round(state["cosines"] / steps, 6)
        found["mean_alignment_loss"] = round(state["losses"] / steps, 6)
        if self.change.kind == "drift_budget":
            found["multiplier"] = round(state["multiplier"], 6)
        return found

    @staticmethod
    @contextmanager
    def without_dropout(model: torch.nn.Module) -> Iterator[None]:
        """A block in which no module of a model drops anything."""
        on = [one for one in model.modules() if isinstance(one, torch.nn.Dropout) and one.training]
        for one in on:
            one.eval()
        try:
            yield
        finally:
            for one in on:
                one.train()
