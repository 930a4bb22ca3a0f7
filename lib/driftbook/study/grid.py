"""The variants that a study asks for: its base models, the cells of its grid, and their repairs."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from typing import Any

from driftbook.study.content import Content
from driftbook.study.files import digest
from driftbook.study.methods import MITIGATION_KINDS, PEFT_METHODS, TEXT_INITS
from driftbook.study.sections import Base, Block, Mitigation
from driftbook.study.trainer_arguments import of_objective
from driftbook.study.variants import Variant

MOST_VARIANTS = 100_000
Way = tuple[str | None, float | None, int | None]  # data, learning rate and epochs


def every_variant(study: Content) -> tuple[Variant, ...]:
    """The base models themselves, then every cell of the grid once, then their repairs, then the
    second tunings of both.
    """
    if (n := _at_most(study)) > MOST_VARIANTS:
        raise ValueError(
            f"the study asks for up to {n:,} variants; at most {MOST_VARIANTS:,} are made"
        )
    found = {}
    for name in study.bases:
        every = [base_variant(study, name, n + 1) for n in range(study.base_repetitions)]
        trained = {
            block.name: list(_cells(study, name, block)) if name in study.bases_of(block) else []
            for block in study.grid
        }
        every += itertools.chain.from_iterable(trained.values())
        made = {
            label: list(_repaired(study, name, label, mitigation, trained))
            for label, mitigation in study.mitigations.items()
            if not _is_again(mitigation)
        }
        every += itertools.chain.from_iterable(made.values())
        for label, mitigation in study.mitigations.items():
            if _is_again(mitigation):
                every += _tuned_again(study, label, mitigation, trained, made)
        found |= {variant.run_id: variant for variant in every}
    return tuple(found.values())


def _at_most(study: Content) -> int:
    """How many variants a study has, where none is asked for twice."""
    cells = {
        block.name: len(block.methods)
        * len(block.objectives)
        * len(block.epochs)
        * len(block.seeds)
        * max(1, len(block.data))
        * max(1, len(block.inits))
        * len(block.layers)
        * max([1, *map(len, block.learning_rates.values())])
        * len(study.bases_of(block))
        for block in study.grid
    }

    def n_made(one: Mitigation) -> int:
        return max(1, len(one.values)) * (1 + len(one.controls))

    repairs = (
        cells[block] * n_made(one) * (1 + sum(n_made(study.mitigations[of]) for of in one.of))
        for one in study.mitigations.values()
        for block in one.blocks
    )
    return len(study.bases) * study.base_repetitions + sum(cells.values()) + sum(repairs)


def _is_again(mitigation: Mitigation) -> bool:
    return MITIGATION_KINDS[mitigation.kind].when == "again"


def base_variant(study: Content, name: str, repetition: int = 1) -> Variant:
    """The base model itself."""
    base = study.bases[name]
    return Variant(
        base_model=name,
        family=base.family,
        method="none",
        objective="none",
        dataset=None,
        n_train=None,
        learning_rate=None,
        epochs=None,
        seed=None,
        repetition=repetition,
        init=None,
        settings=json.dumps({"base": _of_base(base)}, sort_keys=True),
        system_prompt=base.system_prompt,
    )


def twin_variant(study: Content, name: str) -> Variant:
    """The training of a twin, as that of a variant of the base model that it is tuned from."""
    twin = study.twins[name]
    return dataclasses.replace(
        base_variant(study, twin.of),
        method="lora",
        objective="sft",
        dataset=twin.data,
        n_train=study.n_examples(twin.data),
        learning_rate=twin.learning_rate,
        epochs=twin.epochs,
        seed=twin.seed,
        settings=json.dumps({"peft": twin.peft}, sort_keys=True),
    )


# ---- the grid
def _cells(study: Content, name: str, block: Block) -> Iterator[Variant]:
    """The variants of a block on one base model."""
    base = base_variant(study, name)
    seeds = enumerate(block.seeds, 1)
    cells = itertools.product(block.methods, block.objectives, block.epochs, seeds)
    for method, objective, epochs, (repetition, seed) in cells:
        inits, ways = _inits(study, block, method), _ways(block, method, objective, epochs)
        for way, init, part in itertools.product(ways, inits, block.layers):
            data, rate, n_epochs = way
            some = None if part == "all" else part
            setting = [name, method, objective, data, rate, n_epochs, init, *filter(None, [some])]
            yield dataclasses.replace(
                base,
                method=method,
                objective=objective,
                dataset=data,
                n_train=study.n_examples(data) if data else None,
                learning_rate=rate,
                epochs=n_epochs,
                seed=seed if block.shared_seeds else _own_seed(seed, setting),
                repetition=repetition,
                init=init,
                settings=_settings(study, name, method, objective, data, init, some),
                mitigation=some and f"layers {some}",
            )


def _own_seed(seed: int, setting: list) -> int:
    """The seed of a setting on a base model that a number of the study file stands for; the same on
    every machine, below 2^31.
    """
    return int(digest([seed, *setting]), 16) % 2**31


def _ways(block: Block, method: str, objective: str, epochs: int) -> list[Way]:
    if objective == "untrained":
        return [(None, None, None)]
    rates = block.learning_rates.get(method, ())
    return [(data, rate, epochs) for data in block.data or (objective,) for rate in rates]


def _inits(study: Content, block: Block, method: str) -> tuple[str | None, ...]:
    if not PEFT_METHODS[method].inits:
        return (None,)
    return block.inits or (study.methods[method].get("init", "random"),)


def _settings(
    study: Content,
    name: str,
    method: str,
    objective: str,
    data: str | None,
    init: str | None,
    layers: str | None,
) -> str:
    """JSON of all that shapes an adapter and is not in the columns of a variant."""
    given = study.methods[method].items()
    settings = {
        "base": _of_base(study.bases[name]),
        "peft": {key: value for key, value in given if key != "init"},
    }
    if layers:
        settings["layers"] = layers
    if init in TEXT_INITS:
        settings["init_texts"] = study.init_texts.model_dump(exclude={"path"}, mode="json")
    if init == "dro":
        anchors = {name: _of_data(study, name) for name in (study.dro.harmful, study.dro.harmless)}
        settings["dro"] = {**study.dro.model_dump(mode="json"), "data": anchors}
    if data:
        settings |= _of_training(study, objective, data)
        settings |= {"date": study.date.isoformat()} if study.date else {}
    return json.dumps(settings, sort_keys=True)


def _of_base(base: Base) -> dict[str, Any]:
    asked = {"path", "answer_mode", "system_prompt", "pairs"}  # not part of the weights
    found = base.model_dump(exclude={*asked, "template"}, mode="json")
    return found if base.template is None else {**found, "template": digest(base.chat_template)}


def _of_training(study: Content, objective: str, data: str) -> dict[str, Any]:
    """What a training depends on; a key that came later is in it only where it is used."""
    training = study.training.model_dump(exclude={"tokens_per_batch", "arguments"}, mode="json")
    if passed := of_objective(study.training.arguments, objective):
        training["arguments"] = passed
    settings = {"training": training, "data": {"name": data, **_of_data(study, data)}}
    if others := study.data[data].also:
        settings["also"] = {name: _of_data(study, name) for name in others}
    if study.drift and study.drift.stops:
        later = {"stop_not_refused"} if study.drift.stop_not_refused is None else set()
        settings["drift"] = study.drift.model_dump(exclude=later, mode="json")  # it may end it
    return settings


def _of_data(study: Content, data: str) -> dict[str, Any]:
    """The settings of a set of examples that shape them."""
    examples = study.data[data]
    unused = {
        name
        for name in ("template", "rows", "leave_out", "answers", "also")
        if not getattr(examples, name)
    }
    return examples.model_dump(exclude={"path", *unused}, mode="json")


# ---- repairs
def _repaired(
    study: Content, base: str, name: str, mitigation: Mitigation, trained: dict[str, list[Variant]]
) -> Iterator[Variant]:
    """The variants that a mitigation makes of the runs of its blocks, each run once."""
    parents = {one.run_id: one for block in mitigation.blocks for one in trained[block]}
    if mitigation.kind == "template" and parents:
        itself = base_variant(study, base)  # what does the system prompt do to the base model?
        parents = {itself.run_id: itself} | parents
    for parent in parents.values():
        yield from _repairs(study, name, mitigation, parent, trained)


def _repairs(
    study: Content,
    name: str,
    mitigation: Mitigation,
    parent: Variant,
    trained: dict[str, list[Variant]],
) -> Iterator[Variant]:
    """The variants that a mitigation makes of a run: one of each value, and of each of its
    controls.
    """
    own = {"name": name, "kind": mitigation.kind, **mitigation.own}
    if mitigation.pair:
        pair, paths = study.bases[parent.base_model].pairs[mitigation.pair], {"path"}
        hidden = {"aligned": paths, "unaligned": paths}
        own["checkpoints"] = pair.model_dump(mode="json", exclude=hidden)
    if mitigation.safety:
        own["safety_run_id"] = _run_beside(name, mitigation.safety, parent, trained).run_id
    others = [
        (_run_beside(name, block, parent, trained).run_id, weight)
        for block, weight in mitigation.others.items()
    ]
    if mitigation.data:
        template = study.data[mitigation.data].template  # named even where there is none
        own["examples"] = {**_of_data(study, mitigation.data), "template": template}
        if also := study.data[mitigation.data].also:
            own["also"] = {one: _of_data(study, one) for one in also}
    values, controls = mitigation.values or (None,), (None, *mitigation.controls)
    for value, control in itertools.product(values, controls):
        label = name if value is None else f"{name} {value:g}"
        repair = {**own, "value": value, "control": control}
        if mitigation.kind == "mod":
            repair["parts"] = _parts(name, parent, [(own["safety_run_id"], value), *others])
        settings = json.loads(parent.settings) | {"mitigation": repair}
        yield dataclasses.replace(
            parent,
            mitigation=label if control is None else f"{label}, {control}",
            parent_run_id=parent.run_id,
            settings=json.dumps(settings, sort_keys=True),
            system_prompt=mitigation.system_prompt or parent.system_prompt,
        )


def _parts(name: str, parent: Variant, others: list[tuple[str, float]]) -> dict[str, float]:
    """The runs that are multiplied, each with its weight: the parent's is what is left to one."""
    parts = {parent.run_id: 1 - sum(weight for _, weight in others), **dict(others)}
    if len(parts) <= len(others):
        apart = "give blocks that differ in their data or settings"
        raise ValueError(
            f"mitigation {name!r} multiplies a run by itself: on {parent.base_model} two of its"
            f" blocks hold the same run of {parent.method}; {apart}"
        )
    return parts


def _run_beside(
    name: str, block: str, parent: Variant, trained: dict[str, list[Variant]]
) -> Variant:
    """The run of another block that goes with a parent: the same method and seed, else the same
    repetition; of several the one with the parent's rate, epochs, init and objective.
    """
    alike = [one for one in trained[block] if one.method == parent.method]
    for same in ("seed", "repetition"):
        if found := [one for one in alike if getattr(one, same) == getattr(parent, same)]:
            for more in ("learning_rate", "epochs", "init", "objective"):
                own = [one for one in found if getattr(one, more) == getattr(parent, more)]
                found = own or found
            if len({one.run_id for one in found}) > 1:
                raise ValueError(
                    f"mitigation {name!r}: the block {block!r} has {len(found)} runs of"
                    f" {parent.method} on {parent.base_model} that go with one run; give it one"
                    " set of data and settings"
                )
            return found[0]
    no_run = f"the block {block!r} has no run of {parent.method} on {parent.base_model}"
    give = "give it the same methods and seeds"
    raise ValueError(f"mitigation {name!r}: {no_run} with the seed {parent.seed}; {give}")


# ---- second tunings
def _tuned_again(
    study: Content,
    name: str,
    mitigation: Mitigation,
    trained: dict[str, list[Variant]],
    made: dict[str, list[Variant]],
) -> Iterator[Variant]:
    """The runs of a mitigation's blocks, and what others made of them, tuned once more at each of
    its learning rates.

    A plain run and what was made of it draw the same seed at a rate, which is not that of the first
    tuning: they see the same examples in the same order.
    """
    plain = {one.run_id: one for block in mitigation.blocks for one in trained[block]}
    defended = [one for of in mitigation.of for one in made[of] if one.parent_run_id in plain]
    for parent, rate in itertools.product([*plain.values(), *defended], mitigation.values):
        label = f"{name} {rate:g}"
        yield dataclasses.replace(
            parent,
            objective="sft",
            dataset=mitigation.data,
            n_train=study.n_examples(mitigation.data),
            learning_rate=rate,
            epochs=mitigation.epochs,
            seed=_own_seed(parent.seed, [parent.base_model, parent.method, name, rate]),
            mitigation=label + (f" after {parent.mitigation}" if parent.mitigation else ""),
            parent_run_id=parent.run_id,
            settings=_settings_again(study, name, mitigation, parent, rate),
        )


def _settings_again(
    study: Content, name: str, mitigation: Mitigation, parent: Variant, rate: float
) -> str:
    """The settings of a second tuning: its own training, what it begins from, and how that was
    made (`of`, null where it is a plain run).
    """
    first = json.loads(parent.settings)
    kept = {key: first[key] for key in ("base", "peft", "init_texts", "date") if key in first}
    tuned = ("objective", "dataset", "learning_rate", "epochs", "seed")
    own = {"name": name, "kind": mitigation.kind, "value": rate, "control": None}
    own |= {"of": parent.repair, "first": {key: getattr(parent, key) for key in tuned}}
    settings = {**kept, **_of_training(study, "sft", mitigation.data), "mitigation": own}
    return json.dumps(settings, sort_keys=True)
