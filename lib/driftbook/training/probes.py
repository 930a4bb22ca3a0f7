"""What is looked for inside a run, layer by layer; rows of the table `probes`.

Directions come from prompts of two sets of the study's data (harmful, harmless); what is reported
is of a benchmark's prompts, which are none of these. A run is compared with its base model. The
base model itself is compared with the checkpoint before its alignment, where it has a pair, so that
the same numbers say where its alignment sits. Layer l is what layer l gives at the last token of a
prompt. States, directions and patched models are never saved.

The nulls: of a direction, the same from shuffled labels; of a projection, random directions of
equal norm; of a drift of states, two halves of the base's own prompts; of CKA, prompts in another
order; of states put in place, a step of equal length in a random direction; of an update, a random
matrix of its norm; of its energy in some neurons, as many random neurons of the module; of its
energy in some ranks, random subspaces of as many; of attention, the soft prompt's share of the
tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from driftbook.benchmarks import data
from driftbook.benchmarks.utility import REFUSALS
from driftbook.models.conversations import without
from driftbook.models.engine import Ids
from driftbook.models.inside import Beginnings, Inside, prompt_attention, while_answering
from driftbook.models.loading import Loaded, load
from driftbook.models.scoring import Scorer
from driftbook.stats.confidence import LOWER, UPPER
from driftbook.stats.directions import (
    ATTENTION,
    BEGINS,
    CEILING,
    CKA,
    CRITICAL,
    DRAWS,
    DRIFT,
    DROP,
    ENERGY,
    HARMFUL,
    HARMLESS,
    KL,
    LAST,
    LEAST_CEILING,
    NEURONS,
    OF_BASE,
    RANKS,
    RESTORED,
    SHIFT,
    TAKEN,
    UPDATE,
    WHOLE,
    cosines,
    direction,
    halves,
    linear_cka,
    mean_states,
    shuffled,
    unit,
)
from driftbook.stats.terms import ALL
from driftbook.study.methods import LAYER_PARTS, layers_of
from driftbook.study.study_file import Study
from driftbook.study.tables import PROBES
from driftbook.study.variants import Variant
from driftbook.training import mitigations, safe_lora, updates
from driftbook.training.checkpoints import Checkpoint, open_checkpoint
from driftbook.training.critical import critical_ranks, random_energy

TOO_FEW = (
    "too few prompts for a direction: its halves have a cosine of {:.2f}, below {}; raise probes.n"
)


def _top(importance: torch.Tensor) -> np.ndarray:
    """Which neurons are the CRITICAL share of most importance."""
    k = max(1, round(CRITICAL * len(importance)))
    return np.isin(np.arange(len(importance)), importance.topk(k).indices.numpy())


# ---- rows
def row(probe: str, value: object, part: str = ALL, layer: int | None = None, **more) -> dict:
    """A row of `probes` without its run: a number, or (number, low, high)."""
    triple = value if isinstance(value, tuple) else (value, None, None)
    usual = dict.fromkeys(("null", "null_low", "null_high", "n", "note"))
    named = {"probe": probe, "part": part, "layer": layer, "position": LAST}
    return named | dict(zip(("value", "ci_low", "ci_high"), triple, strict=True)) | usual | more


def mean_of(values: np.ndarray) -> tuple[float, float, float]:
    """The mean over prompts, with its normal interval."""
    values = np.asarray(values, float)
    spread = 1.96 * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), float(values.mean() - spread), float(values.mean() + spread)


def null_of(draws: np.ndarray) -> dict[str, float]:
    """A null's mean and range."""
    low, high = _ends(draws)
    return {"null": float(np.mean(draws)), "null_low": float(low), "null_high": float(high)}


def between(draws: np.ndarray, value: float) -> tuple[float, float, float]:
    """A value with the interval of its draws over prompts."""
    return (float(value), *map(float, _ends(draws)))


def _ends(draws: np.ndarray) -> np.ndarray:
    """np.quantile of a few draws at LOWER and UPPER, in a tenth of its time."""
    places = np.array([LOWER, UPPER]) * (len(draws) - 1)
    return np.interp(places, np.arange(len(draws)), np.sort(draws))


# ---- the base model, read once
@dataclass(frozen=True)
class Seen:
    """What was read of a model: states [n, levels, width] of the prompts of directions, harmful
    and harmless, and of those reported on.
    """

    of: dict[str, np.ndarray]
    reported: dict[str, np.ndarray]


@dataclass(frozen=True)
class Asked:
    """Token ids: by kind the prompts of directions and those reported on, and of harmful ones the
    contexts and the refusals that may follow each.
    """

    prompts: dict[str, list[Ids]]
    reports: dict[str, list[Ids]]
    contexts: list[Ids]
    options: list[list[Ids]]


class Reference:
    """A study's prompts for a base model, and what the base says to them, read before any adapter
    is put on it: what was seen (`seen`), how likely its answers begin as refusals, with the states
    of the prompts that are patched (`begun`), the refusal directions [layers, width], their cosines
    from two halves of the prompts (`ceilings` [DRAWS, layers]), and the base's own answers.

    Raises:
        ValueError: the layers of the model are not found, or a prompt of the directions is also
            reported on.
    """

    def __init__(self, base: Loaded, study: Study, base_model: str):
        self.base, self.study, self.name, self.asked = base, study, base_model, study.probes
        self.inside = Inside(Scorer(base.model, base.tokenizer))
        self._vectors: dict[str, torch.Tensor | None] = {}
        self._orders: dict[int, np.ndarray] = {}
        self.system = study.bases[base_model].system_prompt
        texts = {
            kind: _prompts(name, study, study.probes.n)
            for kind, name in zip((HARMFUL, HARMLESS), study.probes.data, strict=True)
        }
        reports = _reported(study)
        shared = set(texts[HARMFUL] + texts[HARMLESS]) & set(reports[HARMFUL] + reports[HARMLESS])
        if shared:
            raise ValueError(
                f"{len(shared)} prompts of probes.harmful and probes.harmless are also asked by the"
                " benchmarks safety and over_refusal, on which probes report; leave them out"
            )
        self._texts = texts, reports
        self.own = self._asked(self.inside.scorer)
        self.prompts, self.reports = self.own.prompts, self.own.reports
        self.seen = self.look(self.inside)
        self.begun = self.begin(self.inside, range(self.inside.levels))
        self.directions = direction(self.seen.of[HARMFUL], self.seen.of[HARMLESS])[1:]
        self.ceilings = halves(self.seen.of[HARMFUL], self.seen.of[HARMLESS], self.rng())[:, 1:]
        self.answers = self._answers()
        self.critical, self.ranks = self._critical()

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.study.seed)

    def orders(self, n: int) -> np.ndarray:
        """Random orders [DRAWS, n], the same for every module of n neurons and every run."""
        if n not in self._orders:
            rng = self.rng()
            self._orders[n] = np.array([rng.permutation(n) for _ in range(DRAWS)])
        return self._orders[n]

    def _asked(self, scorer: Scorer) -> Asked:
        prompts, reports = (
            {kind: scorer.ask(some, self.system) for kind, some in texts.items()}
            for texts in self._texts
        )
        joined = [scorer.joined(one, REFUSALS, scorer.lead) for one in reports[HARMFUL]]
        return Asked(prompts, reports, *map(list, zip(*joined, strict=True)))

    def asked_of(self, inside: Inside) -> Asked:
        """What a model is asked: the same as the base, with its soft prompt behind the texts where
        it has one there.

        Raises:
            ValueError: the tokenizer reads the texts otherwise with it.
        """
        if not (after := inside.scorer.after):
            return self.own
        found = self._asked(inside.scorer)
        if [without(one, after) for one in found.contexts] != self.own.contexts:
            raise ValueError(
                f"the tokenizer of {self.name} reads the end of a prompt otherwise with a soft"
                " prompt behind it, so that no states can be put in place; take probes out of the"
                " study file, or use another base model"
            )
        return found

    def _answers(self) -> dict[str, tuple[list, list]]:
        """By kind of report the base's own answers (context, tokens), and its distributions."""
        found = {}
        for kind, asked in self.reports.items():
            said = self.inside.scorer.generate(asked, self.asked.answer_tokens)
            encode = self.inside.scorer.ids
            pairs = [(one, encode(answer.text)) for one, answer in zip(asked, said, strict=True)]
            pairs = [(one, answer) for one, answer in pairs if answer]
            found[kind] = pairs, self.inside.scorer.distributions(pairs)
        return found

    def _critical(self) -> tuple[dict[str, np.ndarray], dict[str, torch.Tensor]]:
        """By linear module its safety-critical neurons, as truth [out], and ranks [out, k]: of the
        most important ones for the base's answers to harmful prompts those that are not for answers
        to harmless ones. Empty where weights are quantized, or embeddings cannot be given for
        tokens.
        """
        if self.study.bases[self.name].quantization or not self.inside.engine.ways.embeddings:
            return {}, {}
        pairs = {kind: answered for kind, (answered, _) in self.answers.items()}
        if not all(pairs.values()):
            return {}, {}
        safety, utility = (while_answering(self.inside, pairs[one]) for one in (HARMFUL, HARMLESS))
        neurons, ranks = {}, {}
        for name, (own, x) in safety.items():
            other, y = utility[name]
            neurons[name] = _top(own) & ~_top(other)
            weight = self.inside.engine.model.get_submodule(name).weight.detach().cpu()
            ranks[name] = critical_ranks(weight, x, y)
        return neurons, ranks

    @cached_property
    def before(self) -> tuple[Loaded, dict[str, Checkpoint]] | None:
        """The model before its alignment and the two checkpoints of its first pair; None where it
        has none.
        """
        source = self.study.bases[self.name]
        if not source.pairs or source.quantization:
            return None
        name, pair = next(iter(source.pairs.items()))
        here = {"source", "path", "revision", "files", "sha256"}
        own = source.model_dump(exclude={*here, "pairs"}) | pair.unaligned.model_dump(include=here)
        unaligned = load(type(source)(**own), f"{self.name} before alignment", self.study)
        both = mitigations.pair(self.study, self.name, name)
        return unaligned, {
            what: open_checkpoint(both[what], what) for what in ("aligned", "unaligned")
        }

    def main_directions(self, module: str) -> torch.Tensor | None:
        """The first left singular vectors [out, k] of what alignment changed in a module; None
        where it changed nothing.
        """
        if module not in self._vectors:
            pair = self.before[1]
            v = pair["aligned"].matrix(module).float() - pair["unaligned"].matrix(module).float()
            k = min(safe_lora.K, max(1, min(v.shape) // 8))
            self._vectors[module] = safe_lora.left_vectors(v, k) if v.any() else None
        return self._vectors[module]

    def look(self, inside: Inside) -> Seen:
        """What is read of a model."""
        asked = self.asked_of(inside)
        flat = [*asked.prompts.items(), *asked.reports.items()]
        found = inside.last_states([one for _, some in flat for one in some])
        ends = np.cumsum([len(some) for _, some in flat])[:-1]
        parts = [(kind, part) for (kind, _), part in zip(flat, np.split(found, ends), strict=True)]
        return Seen(dict(parts[:2]), dict(parts[2:]))

    def begin(self, inside: Inside, levels: Sequence[int], skips: bool | None = None) -> Beginnings:
        """How likely a model's answers to harmful prompts begin as refusals."""
        asked = self.asked_of(inside)
        return Beginnings(inside, asked.contexts, asked.options, levels, skips)


def _prompts(name: str, study: Study, n: int) -> list[str]:
    """The first n prompts of a set of the study's data."""
    found = data.training_examples(name, study)
    return [one["prompt"][-1]["content"] for one in found][:n]


def _reported(study: Study) -> dict[str, list[str]]:
    """The prompts reported on: harmful ones of safety, benign ones of over_refusal."""
    kinds = {HARMFUL: ("safety", "harmful"), HARMLESS: ("over_refusal", "benign look-alike")}
    found, most = {}, study.probes.reported
    for kind, (name, wanted) in kinds.items():
        asked = data.worded(data.prompts(name, study), data.wordings(name, study)["default"], study)
        own = asked.loc[asked.kind.eq(wanted), "prompt"]
        found[kind] = own.iloc[
            np.linspace(0, len(own) - 1, min(most, len(own))).astype(int)
        ].tolist()
    return found


# ---- a run
def probed(
    reference: Reference, model: PreTrainedModel | PeftModel, variant: Variant, adapter: Path
) -> pd.DataFrame:
    """The table `probes` of a run: of `model`, the base model with the adapter of this folder on
    it. Of the base model itself: how its direction holds, and, where it has a pair, the checkpoint
    before its alignment in place of a run.
    """
    rng, rows, every = reference.rng(), [], range(reference.inside.levels)
    if variant.method == "none":
        rows += list(_ceiling(reference))
        if reference.before is not None:
            loaded, _ = reference.before
            other = Inside(Scorer(loaded.model, loaded.tokenizer))
            rows += list(_compared(reference, other, nullcontext(reference.inside), every, rng))
        else:
            rows.append(_begins(reference.begun.likely, OF_BASE))
    else:
        ends = [0, *ends_of_parts(reference.inside.levels - 1)]
        inside = Inside(Scorer(model, reference.base.tokenizer))
        rows += list(_compared(reference, inside, _without(model, reference), ends, rng))
        rows += list(_of_adapter(reference, inside, variant, adapter))
    return PROBES.check(pd.DataFrame(rows).assign(run_id=variant.run_id)[list(PROBES.columns)])


def ends_of_parts(n: int) -> list[int]:
    """The level behind each third of n layers; of fewer than three behind each layer."""
    if n < len(LAYER_PARTS):
        return list(range(1, n + 1))
    return [layers_of(part, n).stop for part in LAYER_PARTS]


@contextmanager
def _without(model: PeftModel, reference: Reference) -> Iterator[Inside]:
    """The base model below an adapter, as long as the block lasts: as PEFT's disable_adapter, which
    looks at every module first; a soft prompt is not in the base at all.
    """
    inside = not model.active_peft_config.is_prompt_learning
    try:
        if inside:
            model.base_model.disable_adapter_layers()
        yield Inside(Scorer(model.get_base_model(), reference.base.tokenizer))
    finally:
        if inside:
            model.base_model.enable_adapter_layers()


def _compared(
    reference: Reference,
    inside: Inside,
    base: AbstractContextManager[Inside],
    levels: Sequence[int],
    rng: np.random.Generator,
) -> Iterator[dict]:
    """Every probe of a model against the base, which is itself within the block `base`; states are
    put in place at these levels.
    """
    seen, skips = reference.look(inside), reference.begun.skips
    own = reference.begin(inside, levels, skips)
    yield _begins(reference.begun.likely, OF_BASE)
    yield _begins(own.likely)
    yield from _directions(reference, seen, rng)
    yield from _states(reference, seen, rng)
    yield from _next_tokens(reference, inside)
    yield from _restored(reference.begun, own, inside, rng)
    with base as itself:
        yield from _taken(reference.begun, own, itself)


def _begins(values: np.ndarray, part: str = ALL) -> dict:
    return row(BEGINS, mean_of(100 * values), part=part, position=WHOLE, n=len(values))


def _refusal_of(reference: Reference, layer: int) -> str | None:
    """Why a layer has no direction; None where it has one."""
    found = reference.ceilings[:, layer].mean()
    return None if found >= LEAST_CEILING else TOO_FEW.format(found, LEAST_CEILING)


def _ceiling(reference: Reference) -> Iterator[dict]:
    """The split-half cosine of the base's direction, and the same of shuffled labels."""
    states, rng = reference.seen.of, reference.rng()
    both, n = np.concatenate([states[HARMFUL], states[HARMLESS]]), len(states[HARMFUL])
    mixed = both[rng.permutation(len(both))]
    nulls = halves(mixed[:n], mixed[n:], rng)[:, 1:]
    for layer, own in enumerate(reference.ceilings.T):
        note = _refusal_of(reference, layer)
        found = between(own, own.mean())
        yield row(CEILING, found, layer=layer, n=len(both), note=note, **null_of(nulls[:, layer]))


def _directions(reference: Reference, seen: Seen, rng: np.random.Generator) -> Iterator[dict]:
    """The drift of the direction, and how far harmful prompts fall along the base's."""
    a, b = seen.of[HARMFUL][:, 1:], seen.of[HARMLESS][:, 1:]
    base = reference.directions
    drift = cosines(direction(a, b), base)
    drawn = [[rng.integers(0, len(part), len(part)) for part in (a, b)] for _ in range(DRAWS)]
    one, other = zip(*drawn, strict=True)
    draws = cosines(mean_states(a, one) - mean_states(b, other), base)
    nulls = cosines(shuffled(np.concatenate([a, b]), len(a), rng), base)
    own = reference.seen
    gap = ((own.of[HARMFUL].mean(0) - own.of[HARMLESS].mean(0))[1:] * base).sum(-1)
    moved = (own.reported[HARMFUL] - seen.reported[HARMFUL])[:, 1:]
    falls = 100 * (moved * base).sum(-1) / gap
    random = unit(rng.standard_normal((DRAWS, *base.shape)))
    others = 100 * np.einsum("lw,dlw->dl", moved.mean(0), random) / gap
    for layer in range(len(base)):
        if note := _refusal_of(reference, layer):
            yield row(DRIFT, None, layer=layer, note=note)
            yield row(DROP, None, layer=layer, note=note)
            continue
        value = between(draws[:, layer], drift[layer])
        yield row(DRIFT, value, layer=layer, n=len(a) + len(b), **null_of(nulls[:, layer]))
        more = {"n": len(falls), **null_of(others[:, layer])}
        yield row(DROP, mean_of(falls[:, layer]), layer=layer, **more)


def _states(reference: Reference, seen: Seen, rng: np.random.Generator) -> Iterator[dict]:
    """The drift of the states by layer: of their means, and of their geometry."""
    for kind in (HARMFUL, HARMLESS):
        a, b = reference.seen.reported[kind][:, 1:], seen.reported[kind][:, 1:]
        value, some, parts = 1 - cosines(a.mean(0), b.mean(0)), [], []
        for _ in range(DRAWS):
            some.append(rng.integers(0, len(a), len(a)))
            parts.append(np.array_split(rng.permutation(len(a)), 2))
        draws = 1 - cosines(mean_states(a, some), mean_states(b, some))
        nulls = 1 - cosines(*(mean_states(a, one) for one in zip(*parts, strict=True)))
        for layer, found in enumerate(value):
            own = between(draws[:, layer], found)
            more = {"n": len(a), **null_of(nulls[:, layer])}
            yield row(SHIFT, own, part=kind, layer=layer, **more)
    a = np.concatenate(list(reference.seen.reported.values()))[:, 1:]
    b = np.concatenate(list(seen.reported.values()))[:, 1:]
    orders = [np.arange(len(b)), *(rng.permutation(len(b)) for _ in range(20))]
    value, *nulls = linear_cka(a, b, orders)
    nulls = np.array(nulls)
    for layer, found in enumerate(value):
        yield row(CKA, found, layer=layer, n=len(a), **null_of(nulls[:, layer]))


def _next_tokens(reference: Reference, inside: Inside) -> Iterator[dict]:
    """KL(run || base) of the next token by its place in the base's own answer; the null of harmful
    prompts are the harmless ones at the same place (Qi et al. 2025, arXiv 2406.05946).
    """
    found: dict[str, list[np.ndarray]] = {}
    reports = reference.asked_of(inside).reports
    plain, own = (chain(*some.values()) for some in (reference.reports, reports))
    own = dict(zip(map(tuple, plain), own, strict=True))
    answered = (one for pairs, _ in reference.answers.values() for one in pairs)
    asked = [(own[tuple(prompt)], answer) for prompt, answer in answered]
    runs = iter(inside.scorer.distributions(asked))
    for kind, (_, base) in reference.answers.items():
        both = zip(islice(runs, len(base)), base, strict=True)
        every = [((p.exp() * (p - q)).sum(-1)).cpu().numpy() for p, q in both]
        longest = max(map(len, every), default=0)
        found[kind] = [np.array([one[k] for one in every if len(one) > k]) for k in range(longest)]
    for kind, places in found.items():
        for k, values in enumerate(places):
            same = found[HARMLESS][k] if kind == HARMFUL and k < len(found[HARMLESS]) else None
            null = {} if same is None else dict(zip(NULLS, mean_of(same), strict=True))
            more = {"position": f"answer {k + 1}", "n": len(values), **null}
            yield row(KL, mean_of(values), part=kind, **more)


NULLS = ("null", "null_low", "null_high")


def _restored(
    base: Beginnings, own: Beginnings, inside: Inside, rng: np.random.Generator
) -> Iterator[dict]:
    """Refusals of the run with the base's states put in at a level: what is enough to bring them
    back.
    """
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    for level, states in own.states.items():
        put = null = own.likely
        if not _alike(own, base, level):
            put = own.patched(inside, level, base.states)
            pairs = zip(states, base.states[level], strict=True)
            random = [a + _step(a, b, generator) for a, b in pairs]
            null = own.patched(inside, level, {level: random})
        ends = dict(zip(NULLS, mean_of(100 * null), strict=True))
        layer = level - 1 if level else None
        yield row(RESTORED, mean_of(100 * put), layer=layer, position=WHOLE, n=len(put), **ends)


def _taken(base: Beginnings, own: Beginnings, itself: Inside) -> Iterator[dict]:
    """Refusals of the base with the run's states put in at a level: what it needs for them."""
    for level in own.states:
        taken = base.likely
        if not _alike(own, base, level):
            taken = base.patched(itself, level, own.states)
        layer = level - 1 if level else None
        yield row(TAKEN, mean_of(100 * taken), layer=layer, position=WHOLE, n=len(taken))


def _alike(own: Beginnings, base: Beginnings, level: int) -> bool:
    """Whether a run's states at a level are the base's, as before the first layer it adapts."""
    pairs = zip(own.states[level], base.states[level], strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _step(a: torch.Tensor, b: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random step of each token's state [tokens, width] as long as that from a to b."""
    random = torch.randn(a.shape, generator=generator).to(a)
    length = torch.linalg.vector_norm(b - a, dim=-1, keepdim=True)
    return random / torch.linalg.vector_norm(random, dim=-1, keepdim=True) * length


# ---- what an adapter changes
def _of_adapter(
    reference: Reference, inside: Inside, variant: Variant, adapter: Path
) -> Iterator[dict]:
    if inside.engine.soft_prompt is not None or inside.scorer.after:
        yield from _attention(reference, inside)
    elif variant.method_class == "prompt":
        yield row(ATTENTION, None, note="key/values of prefix tuning are no tokens of a prompt")
    elif not safe_lora.has_update(adapter):
        yield row(UPDATE, None, note=f"{variant.method} changes no weight matrix by an update")
    else:
        yield from _updates(reference, inside, adapter)


def _attention(reference: Reference, inside: Inside) -> Iterator[dict]:
    """What the last token of harmful prompts sees of the soft prompt, by layer."""
    asked, soft = reference.asked_of(inside).reports[HARMFUL], inside.engine.n_virtual
    shares = prompt_attention(inside, asked)
    if shares is None:
        note = "the model gives no attention weights, which need eager attention"
        yield row(ATTENTION, None, note=note)
        return
    n = soft + len(inside.scorer.after)
    null = float(np.mean([100 * n / (soft + len(one)) for one in asked]))
    for layer, own in enumerate(shares.T):
        yield row(ATTENTION, mean_of(100 * own), layer=layer, n=len(own), null=null)


def _updates(reference: Reference, inside: Inside, adapter: Path) -> Iterator[dict]:
    """|dW h| / |h| of each module, and the update's energy in what alignment changed there."""
    if safe_lora.is_factored(adapter):
        every = updates.read(adapter)
    else:
        source = mitigations.checkpoint(reference.study.bases[reference.name], reference.study)
        every = updates.merged(adapter, open_checkpoint(source, "base"))
    every = {one.module: one for one in every}
    inputs = inside.module_inputs(reference.reports[HARMFUL], list(every))
    for name, update in every.items():
        layer, h = _layer_of(name), inputs[name]
        moved = abs(update.scale) * torch.linalg.vector_norm(h @ update.a.T @ update.b.T, dim=1)
        value = mean_of((100 * moved / torch.linalg.vector_norm(h, dim=1)).numpy())
        null = 100 * update.norm() / np.sqrt(update.shape[1])
        yield row(UPDATE, value, part=name, layer=layer, n=len(h), null=null)
        if update.norm() and reference.critical.get(name, np.zeros(1)).any():
            orders = reference.orders(update.shape[0])
            yield _in_neurons(update, reference.critical[name], name, orders)
        if update.norm() and reference.ranks.get(name, torch.empty(0, 0)).shape[1]:
            u = reference.ranks[name]
            null = dict(zip(NULLS, random_energy(update, u.shape[1]), strict=True))
            more = {"layer": layer, "n": u.shape[1], **null}
            yield row(RANKS, 100 * update.energy(u), part=name, **more)
        if reference.before is None or not update.norm():
            continue
        if (u := reference.main_directions(name)) is None:
            yield row(
                ENERGY, None, part=name, layer=layer, note="alignment left this module as it was"
            )
        else:
            null = 100 * u.shape[1] / len(u)
            yield row(ENERGY, 100 * update.energy(u), part=name, layer=layer, null=null)


def _in_neurons(
    update: updates.Update, critical: np.ndarray, name: str, orders: np.ndarray
) -> dict:
    """The share of an update's energy in the rows of critical neurons; null: as many random rows
    of the module, the first ones in orders [DRAWS, out].
    """
    energy = ((update.b @ (update.a @ update.a.T)) * update.b).sum(1).double().numpy()
    share = 100 * energy / energy.sum()
    n = int(critical.sum())
    draws = share[orders[:, :n]].sum(1)
    value, null = float(share[critical].sum()), null_of(draws)
    return row(NEURONS, value, part=name, layer=_layer_of(name), n=n, **null)


def _layer_of(module: str) -> int | None:
    """The layer of a module by its name; None where it has none."""
    return next((int(word) for word in module.split(".") if word.isdecimal()), None)
