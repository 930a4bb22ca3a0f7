"""A safety prompt that is optimised for a base model before the task is trained: Directed
Representation Optimization (Zheng et al. 2024, arXiv 2401.18018).

Let x be the state of a prompt's last token in the last layer behind the soft prompt, x_0 that
behind the safety text's own embeddings, V [width, m] the first principal components of such states
and U the rest of an orthonormal basis, l = 1 for a harmful prompt and 0 for a harmless one. Two
logistic probes on V'(x - mean) are fitted before and then held: f_r of whether the model refuses,
f_h of whether the prompt is harmful. The prompt's embeddings minimise, over the anchor prompts,

    L = BCE(f_r(x) - f_r(x_0), l) + .01 BCE(f_h(x) - f_h(x_0), l) + .001 mean((U'(x - x_0))^2),

so that harmful prompts move along the direction of refusal and harmless ones against it, and what
lies outside the space stays (the paper's section 4; the weights, AdamW, its rate, the norm at which
gradients are cut, m = 4 and batches of 50 from code/train.py of chujiezheng/LLM-Safeguard, which
counts compliance and so has both labels the other way round). Not as there: the states are those
without a prompt and behind the one safety text, which is a soft prompt in front of the
conversation; refusals are read from greedy answers by the workbook's detector, not from twenty
drawn ones; the probes have a ridge in place of an early stop.

The directions and probes stay in memory, as does the prompt, which is kept once for a base model.
"""

import json
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from driftbook.benchmarks.data import training_examples
from driftbook.benchmarks.refusals import is_refusal
from driftbook.models import adapters
from driftbook.models.conversations import chat_ids
from driftbook.models.engine import Engine
from driftbook.models.loading import Loaded
from driftbook.models.sampling import VariantFailure
from driftbook.models.scoring import Ids, Scorer
from driftbook.study.anchors import Dro
from driftbook.study.files import digest
from driftbook.study.study_file import Study
from driftbook.study.variants import Variant
from driftbook.training.examples import init_text, longest

HARM_WEIGHT, REST_WEIGHT = 1e-2, 1e-3
BATCH, MOST_NORM, RIDGE = 50, 1.0, 1e-2
_KEPT: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # of a base model its prompts


@dataclass(frozen=True)
class Space:
    """What the loss is made of: V [width, m], and the slopes [m] of the probes of refusal and of
    harm (the states' mean and the probes' constants cancel in the differences).
    """

    components: Tensor
    refusal: Tensor
    harm: Tensor


def dro_loss(states: Tensor, before: Tensor, harmful: Tensor, space: Space) -> Tensor:
    """L of the states [n, width] of anchor prompts, which were `before` behind the safety text;
    `harmful` [n] is 1 or 0.
    """
    moved = states - before
    inside = moved @ space.components
    refusal, harm = (
        binary_cross_entropy_with_logits(inside @ slope, harmful)
        for slope in (space.refusal, space.harm)
    )
    outside = moved - inside @ space.components.T  # of the norm that U'(x - x_0) has
    n_rest = moved.shape[1] - space.components.shape[1]
    rest = outside.square().sum(1).mean() / n_rest
    return refusal + HARM_WEIGHT * harm + REST_WEIGHT * rest


def probe_slope(inside: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The slope [m] of a logistic regression of shares [n] on coordinates [n, m], with a ridge of
    RIDGE on coordinates in units of their root mean square.
    """
    scale = np.sqrt((inside**2).mean())
    unit = np.column_stack([inside / scale, np.ones(len(inside))])

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        z = unit @ w
        slope = unit.T @ (expit(z) - share) / len(z) + RIDGE * np.append(w[:-1], 0.0)
        fit = np.logaddexp(0, z).mean() - (share * z).mean()
        return fit + RIDGE / 2 * (w[:-1] ** 2).sum(), slope

    return minimize(loss, np.zeros(unit.shape[1]), jac=True, method="BFGS").x[:-1] / scale


def space_of(states: Tensor, harmful: np.ndarray, refused: np.ndarray, dimensions: int) -> Space:
    """The space of states [n, width] and its probes; `refused` [n] is 1, 0 or NaN (not known).

    Raises:
        VariantFailure: all or none of the anchor prompts are refused.
    """
    known = ~np.isnan(refused)
    if len(set(refused[known])) < 2:
        what = "all" if refused[known].any() else "none"
        raise VariantFailure(
            f"dro: the base model refuses {what} of the anchor prompts, so that no direction of"
            " refusal can be found; give others, or another base model"
        )
    centred = states.double() - states.double().mean(0)
    components = torch.linalg.svd(centred, full_matrices=False).Vh[:dimensions].T
    inside = (centred @ components).cpu().numpy()
    slopes = probe_slope(inside[known], refused[known]), probe_slope(inside, harmful)
    parts = (components, *(torch.from_numpy(one) for one in slopes))
    return Space(*(part.to(states.device, torch.float32) for part in parts))


def optimised(variant: Variant, base: Loaded, study: Study) -> Tensor | None:
    """The optimised safety prompt [virtual tokens, width] of a base model, as a variant whose init
    is `dro` begins; None for every other. It depends on the study's seed and not on the variant's.

    Raises:
        VariantFailure: too few anchor prompts fit, all or none of them are refused, or the loss did
            not fall.
    """
    if variant.init != "dro":
        return None
    settings = json.loads(variant.settings)
    settings = {"peft": {"num_virtual_tokens": settings["peft"]["num_virtual_tokens"]}} | {
        key: settings[key] for key in ("base", "dro", "init_texts")
    }
    key = digest([settings, init_text(variant, study), study.seed, base.revision])
    kept = _KEPT.setdefault(base.model, {})
    if key not in kept:
        text = replace(variant, method="prompt_tuning", init="safety_text", seed=study.seed)
        text = replace(text, settings=json.dumps(settings))
        kept[key] = _optimise(text, base, study)
    return kept[key].clone()


def _optimise(text: Variant, base: Loaded, study: Study) -> Tensor:
    """The prompt that begins as the variant `text`, optimised; the base is left as it was."""
    asked, harmful = anchors(base, study)
    model = adapters.create(text, base.model, base.tokenizer, init_text(text, study))
    try:
        scorers = Scorer(base.model, base.tokenizer), Scorer(model, base.tokenizer)
        begun, engine = scorers[1].engine.soft_prompt.float(), scorers[1].engine
        if engine.ways.scale is None:
            raise VariantFailure("dro: this base model gives no states apart from its logits")
        with torch.no_grad():
            found = [last_states(engine, asked, soft) for soft in (None, begun)]
        refused = np.concatenate([_refusals(one, asked, study.dro) for one in scorers])
        space = space_of(torch.cat(found), np.tile(harmful, 2), refused, study.dro.dimensions)
        return descend(engine, asked, harmful, begun, space, study.dro, study.seed)
    finally:
        adapters.detach(model)


def anchors(base: Loaded, study: Study) -> tuple[list[Ids], np.ndarray]:
    """The anchor prompts in token ids, up to where the answer begins, and whether each is harmful
    (1 or 0); those that are longer than an example may be are left out.
    """
    limit, asked, harmful = longest(base, study), [], []
    for name, label in ((study.dro.harmful, 1.0), (study.dro.harmless, 0.0)):
        rows = [chat_ids(base.tokenizer, one["prompt"]) for one in training_examples(name, study)]
        rows = [row for row in rows if len(row) <= limit]
        if len(rows) < 2 * study.dro.dimensions:
            raise VariantFailure(
                f"dro: {len(rows)} prompts of data.{name} fit {limit} tokens, too few for a space"
                f" of {study.dro.dimensions} dimensions; raise training.max_length"
            )
        asked, harmful = asked + rows, harmful + [label] * len(rows)
    return asked, np.array(harmful)


def last_states(engine: Engine, asked: Sequence[Ids], soft: Tensor | None) -> Tensor:
    """The last layer's states [n, width] at the last token of each prompt, behind a soft prompt."""
    found = []
    for first in range(0, len(asked), BATCH):
        rows = asked[first : first + BATCH]
        ends = torch.tensor([len(row) - 1 for row in rows])
        found.append(engine.plain(rows, soft)[torch.arange(len(rows)), ends])
    return torch.cat(found).float()


def _refusals(scorer: Scorer, asked: list[Ids], dro: Dro) -> np.ndarray:
    """Whether the greedy answer to each prompt refuses: 1, 0, or NaN where it cannot be told."""
    said = scorer.generate(asked, dro.max_new_tokens)
    found = is_refusal([answer.text for answer in said])
    return np.array([np.nan if one is None else float(one) for one in found])


def descend(
    engine: Engine,
    asked: list[Ids],
    harmful: np.ndarray,
    begun: Tensor,
    space: Space,
    dro: Dro,
    seed: int,
) -> Tensor:
    """The soft prompt that began as `begun`, after the steps of AdamW; batches are drawn by the
    seed.

    Raises:
        VariantFailure: the loss over all anchors did not fall.
    """
    labels = torch.tensor(harmful, dtype=torch.float32, device=begun.device)
    with torch.no_grad():
        before = last_states(engine, asked, begun)
        first = float(dro_loss(before, before, labels, space))
    prompt = begun.clone().requires_grad_(True)
    optimiser = torch.optim.AdamW([prompt], lr=dro.learning_rate)
    drawn, waiting = torch.Generator().manual_seed(seed), []
    for _ in range(dro.steps):
        waiting = waiting or list(torch.randperm(len(asked), generator=drawn).split(BATCH))
        part = waiting.pop(0)
        states = last_states(engine, [asked[i] for i in part], prompt)
        optimiser.zero_grad()
        dro_loss(states, before[part], labels[part], space).backward()
        torch.nn.utils.clip_grad_norm_([prompt], MOST_NORM)
        optimiser.step()
    prompt = prompt.detach()
    with torch.no_grad():
        last = float(dro_loss(last_states(engine, asked, prompt), before, labels, space))
    if not last < first:
        raise VariantFailure(
            f"dro: the loss on the anchor prompts did not fall ({first:.3f}, then {last:.3f}); give"
            " another learning_rate or more steps under dro"
        )
    return prompt
