"""A study file: what it may say, checked, and the variants that it asks for."""

import difflib
import itertools
import json
import math
import os
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from driftbook.files import OUTPUTS, ROOT, digest

FAMILIES = ("llama", "qwen2", "mistral", "gemma")
METHODS = ("none", "lora", "ia3", "prompt_tuning", "p_tuning")
METHOD_CLASS = {"none": "base", "lora": "adapter", "ia3": "adapter", "prompt_tuning": "prompt", "p_tuning": "prompt"}
INITS = ("random", "vocabulary", "task_text", "safety_text")
REREAD = ("original_study", "peft_results")  # folders of outputs/ that notebooks 20 and 22 write, from what others published
RESERVED = ("models", "published", "bench", "cache", *REREAD)  # folders of outputs/ that are no study
OUTCOMES = ("unsafe", "over_refusal", "refused", "accuracy_ambiguous", "accuracy_disambiguated", "bias_ambiguous", "bias_disambiguated", "loss", "correct")
HARMS = ("unsafe", "over_refusal", "correct")  # of which a margin in percentage points can be fixed

Method = Literal[METHODS[1:]]


def _number(value: Any) -> float:
    if isinstance(value, str):
        raise ValueError(f"{value!r} is text to YAML; write it with a point and a sign, as 1.0e-3")
    return value


Rate = Annotated[float, BeforeValidator(_number), Field(gt=0, lt=1)]
Count = Annotated[int, Strict(), Field(ge=1)]
Text = Annotated[str, Strict(), Field(min_length=1)]


class Part(BaseModel):
    """A section of a study file: every key is declared, and nothing is changed after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Source(Part):
    """Where something comes from: a public source at a revision, or a local path that overrides it.

    `source` is `miniature:NAME` (made by notebook 01), `random:FAMILY` (random weights, made by notebook 01),
    `github:OWNER/REPO/FOLDER`, or a name on the Hugging Face hub.
    """

    source: Text
    revision: Text | None = None
    files: tuple[Text, ...] = ()
    sha256: dict[str, Text] = {}
    path: Text | None = None

    @cached_property
    def local(self) -> Path | None:
        """The local path that overrides the source; None where it is not given or its environment variable is not set."""
        if self.path is None:
            return None
        path = os.path.expandvars(self.path)
        return None if "$" in path else (ROOT / Path(path).expanduser()).resolve()


class Base(Source):
    """A base model: the instruction-tuned model before PEFT."""

    family: Literal[FAMILIES]
    answer_mode: Literal["letters", "options"] = "letters"
    dtype: Literal["float32", "bfloat16"] = "float32"
    system_prompt: str | None = None


class Judge(Source):
    """A judge model and how its reply is read (judging.FORMATS); a verdict with less than `min_mass` on its words together is null."""

    format: Literal["llama_guard_2", "llama_guard_3", "wildguard", "rubric_harm"]
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    min_mass: Annotated[float, Field(ge=0, le=1)] = 0.9
    dtype: Literal["float32", "bfloat16"] = "float32"


class Rater(Source):
    """A chat model that grades the answers to the utility questions from 1 to 10 (rubrics.UTILITY)."""

    min_mass: Annotated[float, Field(ge=0, le=1)] = 0.9
    dtype: Literal["float32", "bfloat16"] = "float32"


class TrainingData(Source):
    """Examples to train on (or held-out ones, for the dose)."""

    format: Literal["alpaca", "preference", "gsm8k"]
    n: Count


class Benchmark(Source):
    """Prompts to ask, or items to score, in the file format of a public benchmark."""

    format: Literal["hex_phi", "ailuminate", "xstest", "bbq", "bbq_lite", "gsm8k", "csv"]
    n: Count | None = None  # a seeded sample of this size; all items where it is not given
    max_new_tokens: Count = 64
    samples: Count | None = None  # so many answers to each prompt are also drawn, at `temperature` from the nucleus of `top_p`
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    template: Text | None = None  # wording of a BBQ item, with {context} {question} {ans0} {ans1} {ans2}
    stem: str = ""  # of BBQ: how the answer begins before the option, with the same fields
    min_mass: Annotated[float, Field(ge=0, le=1)] = 0.0  # of BBQ: where the options have less probability together, the answer is null
    permuted: Count | None = None  # of BBQ: so many items are also asked with their options in the two other cyclic orders
    generated: Count | None = None  # of BBQ: so many items are also answered in generated text
    truth: Text | None = None  # the miniature's known truth, a file beside the prompts


class Training(Part):
    """What every training shares. `batch_size` is the effective one."""

    batch_size: Count
    micro_batch_size: Count | None = None
    max_length: Count
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    dpo_beta: Annotated[float, Field(gt=0)] = 0.1


class Block(Part):
    """A product of factors; the grid is the union of its blocks. objective `untrained` is an adapter as it was initialised."""

    name: Text
    bases: tuple[Text, ...] = ()  # all bases where not given
    methods: Annotated[tuple[Method, ...], Field(min_length=1)]
    objectives: Annotated[tuple[Literal["sft", "dpo", "untrained"], ...], Field(min_length=1)]
    learning_rates: dict[Method, tuple[Rate, ...]] = {}
    epochs: tuple[Count, ...] = (1,)
    inits: tuple[Literal[INITS], ...] = ()
    seeds: Annotated[tuple[Annotated[int, Strict(), Field(ge=0)], ...], Field(min_length=1)]
    repeated_seeds: bool = False  # True: these repetitions share a seed, so their spread says nothing about seeds

    @model_validator(mode="after")
    def _complete(self) -> "Block":
        if len(set(self.seeds)) < len(self.seeds) and not self.repeated_seeds:
            raise ValueError(
                "seeds repeats a seed, so its repetitions are copies of one run; give distinct seeds, or say repeated_seeds: true"
            )
        trained = [objective for objective in self.objectives if objective != "untrained"]
        missing = [method for method in self.methods if trained and not self.learning_rates.get(method)]
        if missing:
            raise ValueError(f"learning_rates has none for {missing[0]}")
        if self.inits and any(METHOD_CLASS[method] != "prompt" for method in self.methods):
            raise ValueError("inits apply to prompt_tuning and p_tuning only")
        if "p_tuning" in self.methods and set(self.inits) - {"random"}:
            raise ValueError("p_tuning's prompt comes out of an encoder: its only init is random")
        return self


@dataclass(frozen=True)
class Variant:
    """A base model x method x settings x repetition; method `none` is the base model itself. One row of `variants`."""

    base_model: str
    family: Literal[FAMILIES]
    method: Literal[METHODS]
    objective: Literal["none", "sft", "dpo", "untrained"]
    dataset: str | None
    n_train: int | None
    learning_rate: float | None
    epochs: int | None
    seed: int | None
    repetition: int
    init: str | None
    settings: str  # JSON: all that shapes the weights and is not in the columns
    mitigation: str | None = None
    parent_run_id: str | None = None
    template: str = "chat"
    system_prompt: str | None = None

    @property
    def method_class(self) -> str:
        """adapter, prompt, or base."""
        return METHOD_CLASS[self.method]

    @cached_property
    def run_id(self) -> str:
        """Readable settings and a short hash of all of them and of the repetition."""
        if self.method == "none":
            words = [self.base_model, "none"]
        else:
            rate = "" if self.learning_rate is None else f"lr{self.learning_rate:.0e}".replace("e-0", "e-")
            epochs = "" if self.epochs is None else f"e{self.epochs}"
            words = [self.base_model, self.method, self.init or "", self.objective, rate, epochs, f"s{self.seed}"]
        return ".".join(word for word in words if word) + "." + digest(self.fields(), 8)

    def fields(self) -> dict[str, Any]:
        """The variant's own fields, by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def row(self) -> dict[str, Any]:
        """The variant as a row of the table `variants`."""
        return {"run_id": self.run_id, **self.fields(), "method_class": self.method_class}


class Family(Part):
    """A family of primary tests, declared before any answer is scored; within it p values are adjusted by Holm's method.

    test `change`: each method against its base model; `difference`: each pair of methods; `preserves`: each method is not worse than its base
    model by more than `margin` percentage points, on all the outcomes jointly.
    """

    test: Literal["change", "difference", "preserves"]
    outcomes: Annotated[tuple[Literal[OUTCOMES], ...], Field(min_length=1)]
    methods: tuple[Method, ...] = ()  # all methods of the grid where not given
    bases: Literal["all together", "each"] = "all together"
    group: Literal["as configured", "trained"] = "as configured"  # trained: without the no-ops
    margin: Annotated[float, Field(gt=0, lt=100)] | None = None

    @model_validator(mode="after")
    def _margin_where_needed(self) -> "Family":
        if (self.test == "preserves") != (self.margin is not None):
            raise ValueError("a family of the test 'preserves' needs a margin, in percentage points" if self.margin is None else f"the test {self.test!r} has no margin; remove it")
        if self.test == "preserves" and (wrong := [name for name in self.outcomes if name not in HARMS]):
            raise ValueError(f"{wrong[0]!r} is not counted in percentage points of harm, so it has no margin; expected some of {', '.join(HARMS)}")
        return self


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
    data: dict[Literal["sft", "dpo", "heldout"], TrainingData]
    training: Training
    grid: tuple[Block, ...]
    benchmarks: dict[Literal["safety", "over_refusal", "bbq", "utility"], Benchmark]
    primary: dict[Text, Family] = {}  # families of tests, by name: registered with their hash before any answer is scored

    @model_validator(mode="after")
    def _consistent(self) -> "Study":
        if self.name in RESERVED:
            raise ValueError(f"name={self.name!r} is taken by a folder of outputs/; choose another")
        for name in self.bases:
            if "." in name or "/" in name:
                raise ValueError(f"base {name!r}: a name may hold neither '.' nor '/', since it is part of run_ids and paths")
        if len(self.models) < len(self.bases) + len(self.judges) + len(self.raters):
            raise ValueError("a base model, a judge and a rater share a name; give each its own")
        for block in self.grid:
            for name in block.bases:
                if name not in self.bases:
                    raise ValueError(f"grid block {block.name!r} names the base {name!r}; the study has {', '.join(self.bases)}")
            for method in block.methods:
                if method not in self.methods:
                    raise ValueError(f"grid block {block.name!r} uses {method}, which has no settings under methods")
            for objective in set(block.objectives) - {"untrained"}:
                if objective not in self.data:
                    raise ValueError(f"grid block {block.name!r} trains by {objective}, but data has no {objective}")
        used = {method for block in self.grid for method in block.methods}
        for name, family in self.primary.items():
            if strange := [method for method in family.methods if method not in used]:
                raise ValueError(f"primary family {name!r} tests {strange[0]}, which no block of the grid runs")
            if family.test == "difference" and len(set(family.methods or used)) < 2:
                raise ValueError(f"primary family {name!r} compares methods with each other and has only one; name two, or test its change")
        for method, settings in self.methods.items():
            allowed = {"prompt_tuning": INITS, "p_tuning": ("random",)}.get(method, ())
            if "init" in settings and settings["init"] not in allowed:
                raise ValueError(f"methods.{method}.init = {settings['init']!r}; expected {' or '.join(allowed) or 'none: it has no prompt'}")
        chosen = {init for block in self.grid for init in block.inits} | {settings.get("init") for settings in self.methods.values()}
        if {"task_text", "safety_text"} & chosen and self.init_texts is None:
            raise ValueError("an init from text needs init_texts, a JSON file with the keys task and safety")
        if missing := [name for name in ("safety", "over_refusal", "bbq", "utility") if name not in self.benchmarks]:
            raise ValueError(f"benchmarks has no {missing[0]}; a study asks all four")
        if "heldout" not in self.data:
            raise ValueError("data has no heldout: the dose is measured on held-out answers")
        return self

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
        """Whether the models are the miniature's, or random: then no number is a finding about real models."""
        return any(base.source.startswith(("miniature:", "random:")) for base in self.bases.values())

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        """The base models themselves, then every cell of the grid once."""
        found = {}
        for name in self.bases:
            base = self._variant(name)
            found[base.run_id] = base
            for block in self.grid:
                if name in (block.bases or self.bases):
                    found.update({variant.run_id: variant for variant in self._expand(name, block)})
        return tuple(found.values())

    def of_base(self, base_model: str) -> tuple[Variant, ...]:
        """The variants of one base model.

        Raises:
            ValueError: the study has no such base model.
        """
        if base_model not in self.bases:
            raise ValueError(f"base_model={base_model!r}; the study {self.name} has {', '.join(self.bases)}")
        return tuple(variant for variant in self.variants if variant.base_model == base_model)

    def _expand(self, base_model: str, block: Block) -> list[Variant]:
        cells = itertools.product(block.methods, block.objectives, block.epochs, enumerate(block.seeds, 1))
        variants = []
        for method, objective, epochs, (repetition, seed) in cells:
            trained = objective != "untrained"
            for rate in block.learning_rates.get(method, ()) if trained else (None,):
                for init in self._inits(block, method):
                    variants.append(
                        self._variant(base_model, method, objective, rate, epochs if trained else None, seed, repetition, init)
                    )
        return variants

    def _inits(self, block: Block, method: str) -> tuple[str | None, ...]:
        if METHOD_CLASS[method] != "prompt":
            return (None,)
        return block.inits or (self.methods[method].get("init", "random"),)

    def _variant(self, base_model, method="none", objective="none", rate=None, epochs=None, seed=None, repetition=1, init=None) -> Variant:
        base = self.bases[base_model]
        data = self.data.get(objective)
        settings = {"base": base.model_dump(exclude={"path", "answer_mode", "system_prompt"}, mode="json")}
        if method != "none":
            settings["peft"] = {key: value for key, value in self.methods[method].items() if key != "init"}
        if init in ("task_text", "safety_text"):
            settings["init_texts"] = self.init_texts.model_dump(exclude={"path"}, mode="json")
        if data:
            settings["training"] = self.training.model_dump(mode="json")
            settings["data"] = data.model_dump(exclude={"path"}, mode="json")
        return Variant(
            base_model=base_model,
            family=base.family,
            method=method,
            objective=objective,
            dataset=data.source if data else None,
            n_train=data.n if data else None,
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
        raise ValueError(f"{path.name} holds no keys; see studies/miniature.yaml for what a study file says")
    try:
        return Study(**content)
    except ValidationError as error:
        raise ValueError(f"{path.name}: {_sentence(error)}") from None


def find(study: str | Path) -> Path:
    """The path of a study file, given as a path or as the name of a file in studies/."""
    for path in (Path(study), ROOT / study, ROOT / "studies" / f"{study}.yaml"):
        if path.is_file():
            return path.resolve()
    known = ", ".join(sorted(path.stem for path in (ROOT / "studies").glob("*.yaml")))
    raise ValueError(f"there is no study file {study}; studies/ has {known}")


def _sentence(error: ValidationError) -> str:
    """The first thing that is wrong, in words: unknown keys first, since they explain what is then missing."""
    problem = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    where = ".".join(str(part) for part in problem["loc"])
    value = problem["input"]
    match problem["type"]:
        case "extra_forbidden":
            key, known = problem["loc"][-1], _known_keys(problem["loc"][:-1])
            near = difflib.get_close_matches(str(key), known, 1)
            return f"unknown key {where!r}; " + (f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}")
        case "missing":
            return f"{where!r} is missing"
        case "literal_error":
            return f"{where} = {value!r}; expected {problem['ctx']['expected']}"
        case "value_error":
            return f"{where}: {problem['ctx']['error']}" if where else str(problem["ctx"]["error"])
        case _:
            return f"{where} = {value!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _known_keys(location: tuple) -> list[str]:
    """The keys that the section at `location` may have."""
    sections = {"bases": Base, "judges": Judge, "raters": Rater, "data": TrainingData, "benchmarks": Benchmark, "training": Training, "grid": Block, "primary": Family}
    part = sections.get(location[0], Source) if location else Study
    return list(part.model_fields)


def finite(value: float | None) -> float | None:
    """The number, or None where it is none or not finite."""
    return None if value is None or not math.isfinite(value) else float(value)
