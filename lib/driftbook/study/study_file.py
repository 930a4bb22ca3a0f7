"""A study file: what it may say, checked, and the variants that it asks for."""

import dataclasses
import difflib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, Strict, ValidationError, model_validator

from driftbook.study.files import OUTPUTS, ROOT
from driftbook.study.methods import (
    BESIDE_FACTORS,
    LINEAR,
    METHOD_CLASS,
    MITIGATION_KINDS,
    PEFT_METHODS,
    REWRITING,
)
from driftbook.study.sections import (
    ITEM_FORMATS,
    PROMPT_FORMATS,
    Base,
    Benchmark,
    Block,
    Count,
    Drift,
    Family,
    Judge,
    Method,
    Mitigation,
    Pair,
    Part,
    Rater,
    Source,
    Text,
    Training,
    TrainingData,
)
from driftbook.study.variants import Variant

NAMED = ("parent", "base alone")  # what notebook 14 calls runs that are no repairs
REREAD = (
    "original_study",
    "peft_results",
)  # folders of outputs/ that notebooks 20 and 22 write, from what others published
RESERVED = (
    "models",
    "published",
    "bench",
    "cache",
    *REREAD,
)  # folders of outputs/ that are no study
ANALYSES = {
    "safety": "09_safety",
    "fairness": "10_fairness",
    "mixed_effects": "11_mixed_effects",
    "tradeoffs": "12_tradeoffs",
    "dose": "15_dose",
    "power": "16_power",
    "labels": "17_labels",
    "primary": "19_primary",
}
OF_REPAIRS = {"safe_lora": "14_safe_lora"}  # made where a study has mitigations
CORE = (
    "safety",
    "over_refusal",
    "bbq",
    "utility",
)  # what every study asks; others stand beside them under names of their own
ASKED_BY = {
    "safety": PROMPT_FORMATS,
    "over_refusal": PROMPT_FORMATS,
    "bbq": ITEM_FORMATS,
    "utility": ("gsm8k", "answers", "summaries"),
}


class Study(Part):
    """A study file, checked."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    note: Text  # what the numbers mean, printed on every figure
    seed: Annotated[int, Strict(), Field(ge=0)] = 0
    bases: Annotated[dict[Text, Base], Field(min_length=1)]
    judges: Annotated[dict[Text, Judge], Field(min_length=1)]
    raters: dict[Text, Rater] = {}
    methods: dict[Method, dict[str, Any]]
    init_texts: Source | None = None
    data: dict[Text, TrainingData]
    training: Training
    grid: tuple[Block, ...]
    # times that every base model itself is run: with drawn answers, each has random numbers of its
    # own
    base_repetitions: Count = 1
    benchmarks: dict[Text, Benchmark]
    primary: dict[
        Text, Family
    ] = {}  # families of tests, by name: registered with their hash before any answer is scored
    drift: Drift | None = None
    mitigations: dict[Text, Mitigation] = {}
    analyses: tuple[Literal[(*ANALYSES, *OF_REPAIRS)], ...] = ()  # only these; all where not given
    licences: dict[
        Text, Text
    ] = {}  # of sources that the register does not know, as the user states them: see licences.py

    @model_validator(mode="after")
    def _consistent(self) -> "Study":
        if self.name in RESERVED:
            raise ValueError(f"name={self.name!r} is taken by a folder of outputs/; choose another")
        for name in self.bases:
            if "." in name or "/" in name:
                raise ValueError(
                    f"base {name!r}: a name may hold neither '.' nor '/', since it is part of"
                    " run_ids and paths"
                )
        if len(self.models) < len(self.bases) + len(self.judges) + len(self.raters):
            raise ValueError("a base model, a judge and a rater share a name; give each its own")
        for block in self.grid:
            self._check_block(block)
        if twice := [
            name for name, n in Counter(block.name for block in self.grid).items() if n > 1
        ]:
            raise ValueError(
                f"the grid has two blocks of the name {twice[0]!r}; give each a name of its own"
            )
        if len({one.snapshots for one in self.mitigations.values() if one.kind == "average"}) > 1:
            raise ValueError(
                "two mitigations average over different numbers of snapshots; a training takes one"
                " number of them, so give both the same"
            )
        used = {method for block in self.grid for method in block.methods}
        if self.primary and not used:
            raise ValueError(
                "primary declares tests of what training does, and the grid trains nothing;"
                " remove it"
            )
        for name, mitigation in self.mitigations.items():
            self._check_mitigation(name, mitigation)
        if "safe_lora" in self.analyses and not self.mitigations:
            raise ValueError(
                "analyses names safe_lora, and the study has no mitigations; give some, or"
                " remove it"
            )
        if self.base_repetitions > 1 and not any(one.samples for one in self.benchmarks.values()):
            raise ValueError(
                "base_repetitions repeats base models for their drawn answers, and no benchmark has"
                " samples; add samples, or remove it"
            )
        for name, family in self.primary.items():
            if strange := [method for method in family.methods if method not in used]:
                raise ValueError(
                    f"primary family {name!r} tests {strange[0]}, which no block of the grid runs"
                )
            if family.test == "difference" and len(set(family.methods or used)) < 2:
                raise ValueError(
                    f"primary family {name!r} compares methods with each other and has only one;"
                    " name two, or test its change"
                )
        for method, settings in self.methods.items():
            known = PEFT_METHODS[method]
            if "init" in settings and settings["init"] not in known.inits:
                raise ValueError(
                    f"methods.{method}.init = {settings['init']!r}; expected"
                    f" {' or '.join(known.inits) or 'none: it has no prompt'}"
                )
            if missing := [name for name in known.needs if name not in settings]:
                raise ValueError(
                    f"methods.{method} has no {missing[0]}; PEFT's default differs by family, so"
                    " name them"
                )
            if fixed := [name for name in known.fixed if name in settings]:
                raise ValueError(
                    f"methods.{method}.{fixed[0]} is what makes it {known.label}; remove it"
                )
        chosen = {init for block in self.grid for init in block.inits} | {
            settings.get("init") for settings in self.methods.values()
        }
        if {"task_text", "safety_text"} & chosen and self.init_texts is None:
            raise ValueError(
                "an init from text needs init_texts, a JSON file with the keys task and safety"
            )
        if missing := [name for name in CORE if name not in self.benchmarks]:
            raise ValueError(
                f"benchmarks has no {missing[0]}; a study asks all of {', '.join(CORE)}, and others"
                " beside them"
            )
        for name, formats in ASKED_BY.items():
            if self.benchmarks[name].format not in formats:
                raise ValueError(
                    f"benchmarks.{name}.format = {self.benchmarks[name].format!r}; expected one of"
                    f" {', '.join(formats)}"
                )
        if extra := [
            name
            for name, one in self.benchmarks.items()
            if one.format in ITEM_FORMATS and name != "bbq"
        ]:
            raise ValueError(
                f"benchmarks.{extra[0]} is a second BBQ; a study asks one, under the name bbq"
            )
        if "heldout" not in self.data:
            raise ValueError("data has no heldout: the dose is measured on held-out answers")
        for number, (name, judge) in enumerate(self.judges.items()):
            if strange := [
                one for one in judge.benchmarks if one not in self.asked(PROMPT_FORMATS)
            ]:
                raise ValueError(
                    f"judges.{name}.benchmarks names {strange[0]!r}; prompts are asked of"
                    f" {', '.join(self.asked(PROMPT_FORMATS))}"
                )
            if number == 0 and judge.benchmarks:
                raise ValueError(
                    f"judges.{name} is the first judge, by whom the study is scored, and so judges"
                    " all benchmarks; remove its benchmarks"
                )
            if (judge.format == "classifier") != (judge.label is not None):
                raise ValueError(
                    f"judges.{name}: a classifier, and nothing else, needs label, the name of its"
                    " label that counts as unsafe"
                )
        return self

    def _check_block(self, block: Block) -> None:
        """Raise a ValueError where a block names what the study does not have, or what does not go
        together.
        """
        for name in block.bases:
            if name not in self.bases:
                raise ValueError(
                    f"grid block {block.name!r} names the base {name!r}; the study has"
                    f" {', '.join(self.bases)}"
                )
        for method in block.methods:
            if method not in self.methods:
                raise ValueError(
                    f"grid block {block.name!r} uses {method}, which has no settings under methods"
                )
            half = [
                name for name in block.bases or self.bases if self.bases[name].dtype != "float32"
            ]
            if method == "ln_tuning" and half:
                raise ValueError(
                    f"grid block {block.name!r} trains the norms of {half[0]} itself, in"
                    f" {self.bases[half[0]].dtype}, where small steps round to nothing; give it"
                    " dtype: float32"
                )
            wanted = PEFT_METHODS[method].quantized
            for name in block.bases or self.bases:
                if (self.bases[name].quantization is not None) != wanted and (
                    wanted or method in ("lora", "dora", "rslora")
                ):
                    raise ValueError(
                        f"grid block {block.name!r} trains {method} on {name}, which is"
                        f" {'not ' if wanted else ''}quantized; "
                        + (
                            "give that base model quantization: nf4, or name others under bases"
                            if wanted
                            else "there the method is called qlora"
                        )
                    )
        for objective in set(block.objectives) - {"untrained"}:
            for name in block.data or (objective,):
                if name not in self.data or name == "heldout":
                    raise ValueError(
                        f"grid block {block.name!r} trains by {objective}, but data has no {name}"
                        if name != "heldout"
                        else f"grid block {block.name!r} trains on the held-out answers"
                    )
                if objective == "dpo" and not self.data[name].is_preference:
                    raise ValueError(
                        f"grid block {block.name!r} trains by dpo on data.{name}, which has no"
                        " chosen and rejected answers"
                    )

    def _check_mitigation(self, name: str, mitigation: Mitigation) -> None:
        """Raise a ValueError where a mitigation names what the study does not have, or cannot be
        done to what its blocks train.
        """
        blocks, known = (
            {block.name: block for block in self.grid},
            MITIGATION_KINDS[mitigation.kind],
        )
        for wanted in (*mitigation.blocks, *([mitigation.safety] if mitigation.safety else [])):
            if wanted not in blocks:
                raise ValueError(
                    f"mitigation {name!r} names the grid block {wanted!r}; the grid has"
                    f" {', '.join(blocks)}"
                )
        if "," in name or name in NAMED:
            raise ValueError(
                f"mitigation {name!r}: a name may hold no comma, behind which its controls are"
                f" named, and not be {' or '.join(NAMED)}; give another name"
            )
        for block in (blocks[one] for one in mitigation.blocks):
            if "untrained" in block.objectives or (
                mitigation.kind == "constrained_sft" and "dpo" in block.objectives
            ):
                raise ValueError(
                    f"mitigation {name!r} ({known.label}) cannot be done to the block"
                    f" {block.name!r}, which has runs by"
                    f" {'dpo' if 'untrained' not in block.objectives else 'untrained'}; name others"
                )
            if wrong := [method for method in block.methods if method not in known.methods]:
                prompt = METHOD_CLASS[wrong[0]] == "prompt"
                raise ValueError(
                    f"mitigation {name!r}: {known.label} cannot be done to {wrong[0]} (block"
                    f" {block.name!r})"
                    + (
                        ", which has no weight update; to it apply: "
                        + ", ".join(
                            kind
                            for kind, one in MITIGATION_KINDS.items()
                            if wrong[0] in one.methods
                        )
                        if prompt
                        else f"; it applies to {', '.join(known.methods)}"
                    )
                )
            if known.when == "after":
                self._check_repairable(name, mitigation, block)
            if mitigation.data and (
                self.data.get(mitigation.data) is None or mitigation.data == "heldout"
            ):
                raise ValueError(
                    f"mitigation {name!r} mixes in data.{mitigation.data}, "
                    + (
                        "the held-out answers"
                        if mitigation.data == "heldout"
                        else "which the study does not have"
                    )
                )
            if (
                mitigation.data
                and "dpo" in block.objectives
                and not self.data[mitigation.data].is_preference
            ):
                raise ValueError(
                    f"mitigation {name!r} mixes data.{mitigation.data} into a training by dpo, and"
                    " it has no chosen and rejected answers"
                )
            for base in block.bases or self.bases:
                if mitigation.pair and mitigation.pair not in self.bases[base].pairs:
                    raise ValueError(
                        f"mitigation {name!r} needs the pair {mitigation.pair!r}, and bases.{base}"
                        f" has no such twin; give it under pairs: {{{mitigation.pair}: {{unaligned:"
                        " {source: ...}}}"
                    )

    def _check_repairable(self, name: str, mitigation: Mitigation, block: Block) -> None:
        """Raise a ValueError where a repair would leave a part of an adapter as it was trained, or
        cannot be done to what the settings of a method make.
        """
        if mitigation.safety == block.name:
            raise ValueError(
                f"mitigation {name!r} adds the block {block.name!r} to itself; give a block that"
                " was trained on safety data under safety"
            )
        label, alone = (
            MITIGATION_KINDS[mitigation.kind].label,
            mitigation.kind in ("safe_lora", "zero")
            and not set(mitigation.controls) - {"random subspace"},
        )
        for method in block.methods:
            settings = self.methods[method]
            for key in BESIDE_FACTORS:
                value = settings.get(key)
                if value not in (None, False, "none", [], ()) and not (
                    alone and (key == "lora_bias" or (key == "bias" and value == "lora_only"))
                ):
                    raise ValueError(
                        f"mitigation {name!r}: {method} trains {key}, of which {label} or a control"
                        f" would leave a part as it was trained; take {key} from methods.{method}"
                    )
            if str(settings.get("init_lora_weights", "")).lower().startswith(REWRITING):
                raise ValueError(
                    f"mitigation {name!r}: {method} begins as {settings['init_lora_weights']},"
                    " which changes the base model itself, so that BA is not its update; take"
                    f" init_lora_weights from methods.{method}"
                )
            if settings.get("use_dora") and mitigation.kind in LINEAR:
                raise ValueError(
                    f"mitigation {name!r}: {label} cannot be done to {method} with use_dora, whose"
                    " update is no product of two factors; call the method dora and name other"
                    " blocks"
                )
        for base in block.bases or self.bases:
            pair = self.bases[base].pairs.get(mitigation.pair)
            aligned = pair and (pair.aligned or self.bases[base])
            if pair and (aligned.source, aligned.revision, aligned.path) == (
                pair.unaligned.source,
                pair.unaligned.revision,
                pair.unaligned.path,
            ):
                raise ValueError(
                    f"bases.{base}.pairs.{mitigation.pair} has the same checkpoint as aligned and"
                    " unaligned, so that V is zero and no direction of alignment; give two that"
                    " differ"
                )

    @property
    def n_snapshots(self) -> int:
        """How many snapshots are taken along a training: as many as weight averaging needs."""
        return max(
            (one.snapshots for one in self.mitigations.values() if one.kind == "average"), default=0
        )

    def asked(self, formats: tuple[str, ...]) -> tuple[str, ...]:
        """The names of the benchmarks of these formats."""
        return tuple(name for name, one in self.benchmarks.items() if one.format in formats)

    @property
    def refusal_only(self) -> tuple[str, ...]:
        """The benchmarks whose prompts about child abuse are asked for the probability of a
        refusal.
        """
        return tuple(
            name
            for name, one in self.benchmarks.items()
            if one.child_abuse == "refusal probability"
        )

    @property
    def models(self) -> dict[str, Base | Judge | Rater]:
        """Every model that the study needs: its base models, judges and raters."""
        return {**self.bases, **self.judges, **self.raters}

    @property
    def folder(self) -> Path:
        """outputs/<study>/"""
        return OUTPUTS / self.name

    @property
    def miniature(self) -> bool:
        """Whether the models are the miniature's, or random: then no number is a finding about real
        models.
        """
        return any(
            base.source.startswith(("miniature:", "random:")) for base in self.bases.values()
        )

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        """The base models themselves, then every cell of the grid once."""
        found = {}
        for name in self.bases:
            for repetition in range(1, self.base_repetitions + 1):
                base = self._variant(name, repetition=repetition)
                found[base.run_id] = base
            trained = {
                block.name: self._expand(name, block) if name in (block.bases or self.bases) else []
                for block in self.grid
            }
            found.update(
                {variant.run_id: variant for variants in trained.values() for variant in variants}
            )
            for label, mitigation in self.mitigations.items():
                parents = {
                    variant.run_id: variant
                    for block in mitigation.blocks
                    for variant in trained[block]
                }
                if (
                    mitigation.kind == "template" and parents
                ):  # what the system prompt does to the base model itself
                    parents = {one.run_id: one for one in [self._variant(name)]} | parents
                safety = trained[mitigation.safety] if mitigation.safety else []
                found.update(
                    {
                        variant.run_id: variant
                        for parent in parents.values()
                        for variant in self._repairs(label, mitigation, parent, safety)
                    }
                )
        return tuple(found.values())

    def _repairs(
        self, name: str, mitigation: Mitigation, parent: Variant, safety: list[Variant]
    ) -> Iterator[Variant]:
        """The variants that a mitigation makes of a run: one of each value, and of each of its
        controls.
        """
        own = {"name": name, "kind": mitigation.kind, **mitigation.own}
        if mitigation.pair:
            own["checkpoints"] = (
                self.bases[parent.base_model]
                .pairs[mitigation.pair]
                .model_dump(mode="json", exclude={"aligned": {"path"}, "unaligned": {"path"}})
            )
        if mitigation.safety:
            own["safety_run_id"] = self._safety_run(name, mitigation, parent, safety).run_id
        if mitigation.data:
            own["examples"] = self.data[mitigation.data].model_dump(mode="json", exclude={"path"})
        for value, control in itertools.product(
            mitigation.values or (None,), (None, *mitigation.controls)
        ):
            label = (
                name
                + ("" if value is None else f" {value:g}")
                + ("" if control is None else f", {control}")
            )
            settings = json.loads(parent.settings) | {
                "mitigation": {**own, "value": value, "control": control}
            }
            yield dataclasses.replace(
                parent,
                mitigation=label,
                parent_run_id=parent.run_id,
                settings=json.dumps(settings, sort_keys=True),
                system_prompt=mitigation.system_prompt or parent.system_prompt,
            )

    def _safety_run(
        self, name: str, mitigation: Mitigation, parent: Variant, safety: list[Variant]
    ) -> Variant:
        """The run of the safety block that goes with a parent: the same method and seed, else the
        same repetition.
        """
        alike = [one for one in safety if one.method == parent.method]
        for same in ("seed", "repetition"):
            if found := [one for one in alike if getattr(one, same) == getattr(parent, same)]:
                return found[0]
        raise ValueError(
            f"mitigation {name!r}: the block {mitigation.safety!r} has no run of {parent.method} on"
            f" {parent.base_model} with the seed {parent.seed}; give it the same methods and seeds"
        )

    def of_base(self, base_model: str) -> tuple[Variant, ...]:
        """The variants of one base model.

        Raises:
            ValueError: the study has no such base model.
        """
        if base_model not in self.bases:
            raise ValueError(
                f"base_model={base_model!r}; the study {self.name} has {', '.join(self.bases)}"
            )
        return tuple(variant for variant in self.variants if variant.base_model == base_model)

    def of_stage(self, stage: str, base_model: str) -> tuple[Variant, ...]:
        """The variants of one base model that a stage works on: repaired ones are not trained, and
        only they are made by `mitigate`.
        """
        variants = self.of_base(base_model)
        return tuple(
            one
            for one in variants
            if stage not in ("train", "mitigate") or one.is_repaired == (stage == "mitigate")
        )

    def _expand(self, base_model: str, block: Block) -> list[Variant]:
        variants = []
        for method, objective, epochs, (repetition, seed) in itertools.product(
            block.methods, block.objectives, block.epochs, enumerate(block.seeds, 1)
        ):
            if objective == "untrained":
                ways = [(None, None, None)]
            else:
                ways = [
                    (name, rate, epochs)
                    for name in block.data or (objective,)
                    for rate in block.learning_rates.get(method, ())
                ]
            for data, rate, n_epochs in ways:
                for init in self._inits(block, method):
                    variants.append(
                        self._variant(
                            base_model,
                            method,
                            objective,
                            data,
                            rate,
                            n_epochs,
                            seed,
                            repetition,
                            init,
                        )
                    )
        return variants

    def _inits(self, block: Block, method: str) -> tuple[str | None, ...]:
        if not PEFT_METHODS[method].inits:
            return (None,)
        return block.inits or (self.methods[method].get("init", "random"),)

    def _variant(
        self,
        base_model,
        method="none",
        objective="none",
        data=None,
        rate=None,
        epochs=None,
        seed=None,
        repetition=1,
        init=None,
    ) -> Variant:
        base, examples = self.bases[base_model], self.data.get(data)
        settings = {
            "base": base.model_dump(
                exclude={"path", "answer_mode", "system_prompt", "pairs"}, mode="json"
            )
        }
        if method != "none":
            settings["peft"] = {
                key: value for key, value in self.methods[method].items() if key != "init"
            }
        if init in ("task_text", "safety_text"):
            settings["init_texts"] = self.init_texts.model_dump(exclude={"path"}, mode="json")
        if examples:
            settings["training"] = self.training.model_dump(
                exclude={"tokens_per_batch"}, mode="json"
            )
            settings["data"] = {
                "name": data,
                **examples.model_dump(
                    exclude={"path"} | (set() if examples.template else {"template"}), mode="json"
                ),
            }
        if examples and self.drift and (self.drift.stop_unsafe or self.drift.stop_over_refusal):
            settings["drift"] = self.drift.model_dump(mode="json")  # it may end the training
        return Variant(
            base_model=base_model,
            family=base.family,
            method=method,
            objective=objective,
            dataset=data,
            n_train=examples.n if examples else None,
            learning_rate=rate,
            epochs=epochs,
            seed=seed,
            repetition=repetition,
            init=init,
            settings=json.dumps(settings, sort_keys=True),
            system_prompt=base.system_prompt,
        )


def load(study: str | Path) -> Study:
    """The study of a file, or of the name of one in studies/, checked.

    Raises:
        ValueError: with one sentence that says what is wrong, where, and what to do.
    """
    path = find(study)
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path.name} holds no keys; see studies/miniature.yaml for what a study file says"
        )
    try:
        study = Study(**content)
    except ValidationError as error:
        raise ValueError(f"{path.name}: {_sentence(error)}") from None
    try:
        study.variants  # noqa: B018 - made here, so that what cannot be made is said at once
        return study
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def find(study: str | Path) -> Path:
    """The path of a study file, given as a path or as the name of a file in studies/."""
    for path in (Path(study), ROOT / study, ROOT / "studies" / f"{study}.yaml"):
        if path.is_file():
            return path.resolve()
    known = ", ".join(sorted(path.stem for path in (ROOT / "studies").glob("*.yaml")))
    raise ValueError(f"there is no study file {study}; studies/ has {known}")


def _sentence(error: ValidationError) -> str:
    """The first thing that is wrong, in words: unknown keys first, since they explain what is then
    missing.
    """
    problem = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    where = ".".join(str(part) for part in problem["loc"])
    value = problem["input"]
    match problem["type"]:
        case "extra_forbidden":
            key, known = problem["loc"][-1], _known_keys(problem["loc"][:-1])
            near = difflib.get_close_matches(str(key), known, 1)
            return f"unknown key {where!r}; " + (
                f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
            )
        case "missing":
            return f"{where!r} is missing"
        case "literal_error":
            return f"{where} = {value!r}; expected {problem['ctx']['expected']}"
        case "value_error":
            return f"{where}: {problem['ctx']['error']}" if where else str(problem["ctx"]["error"])
        case "tuple_type":
            return f"{where} = {value!r} is one value; write a list, [{value}]"
        case _:
            return f"{where} = {value!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _known_keys(location: tuple) -> list[str]:
    """The keys that the section at `location` may have."""
    sections = {
        "bases": Base,
        "judges": Judge,
        "raters": Rater,
        "data": TrainingData,
        "benchmarks": Benchmark,
        "training": Training,
        "grid": Block,
        "primary": Family,
        "drift": Drift,
        "mitigations": Mitigation,
    }
    part = Pair if "pairs" in location else sections.get(location[0], Source) if location else Study
    return list(part.model_fields)


def finite(value: float | None) -> float | None:
    """The number, or None where it is none or not finite."""
    return None if value is None or not math.isfinite(value) else float(value)
