"""A study file, checked, and the variants that it asks for."""

import difflib
import os
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Self

from pydantic import ValidationError, model_validator

from driftbook.study.anchors import Dro, Probes
from driftbook.study.consistency import check_consistent
from driftbook.study.content import Content
from driftbook.study.files import ROOT, digest
from driftbook.study.grid import every_variant
from driftbook.study.methods import MAKING_STAGES
from driftbook.study.reading import yaml_value
from driftbook.study.sections import (
    Base,
    Benchmark,
    Block,
    Drift,
    Family,
    Judge,
    Mitigation,
    Pair,
    Rater,
    Source,
    Training,
    TrainingData,
    Twin,
)
from driftbook.study.variants import Variant

PLANNED = "DRIFTBOOK_PLANNED"  # in a batch: the digest of the planned study, and its file
SECTIONS = {
    "bases": Base,
    "twins": Twin,
    "judges": Judge,
    "raters": Rater,
    "data": TrainingData,
    "benchmarks": Benchmark,
    "training": Training,
    "grid": Block,
    "primary": Family,
    "drift": Drift,
    "mitigations": Mitigation,
    "probes": Probes,
    "dro": Dro,
}


class Study(Content):
    """A study file, checked."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_consistent(self)
        return self

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        """The base models themselves, then every cell of the grid once, and their repairs."""
        return every_variant(self)

    def of_base(self, base_model: str) -> tuple[Variant, ...]:
        """The variants of one base model.

        Raises:
            ValueError: the study has no such base model.
        """
        if base_model not in self.bases:
            has = f"the study {self.name} has {', '.join(self.bases)}"
            raise ValueError(f"base_model={base_model!r}; {has}")
        return tuple(variant for variant in self.variants if variant.base_model == base_model)

    def of_stage(self, stage: str, base_model: str) -> tuple[Variant, ...]:
        """The variants of one base model that a stage works on: those that it makes, or all."""
        variants = self.of_base(base_model)
        if stage not in MAKING_STAGES:
            return variants
        return tuple(one for one in variants if one.made_in == stage)


def load(study: str | Path) -> Study:
    """The study of a file, or of the name of one in studies/, checked.

    Raises:
        ValueError: with one sentence that says what is wrong, where, and what to do.
    """
    path = find(study)
    content = yaml_value(path)
    if not isinstance(content, dict):
        see = "see studies/miniature.yaml for what a study file says"
        raise ValueError(f"{path.name} holds no keys; {see}")
    try:
        checked = Study(**content)
        checked.variants  # noqa: B018 - made here, so that what cannot be made is said at once
    except ValidationError as error:
        raise ValueError(f"{path.name}: {_sentence(error)}") from None
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    planned, _, file = os.environ.get(PLANNED, "").partition(" ")
    if file == str(path) and planned != study_digest(checked):
        raise ValueError(
            f"{path.name} was edited while the study runs; make study does what the edit asks for"
        )
    return checked


def study_digest(study: Study) -> str:
    """The digest of all that a study file says."""
    return digest(study.model_dump(mode="json"), 32)


def find(study: str | Path) -> Path:
    """The path of a study file, given as a path or as the name of a file in studies/."""
    for path in (Path(study), ROOT / study, ROOT / "studies" / f"{study}.yaml"):
        with suppress(OSError, ValueError):  # what is too long for a path, or none
            if path.is_file():
                return path.resolve()
    known = ", ".join(sorted(path.stem for path in (ROOT / "studies").glob("*.yaml")))
    raise ValueError(f"there is no study file {str(study)[:200]}; studies/ has {known}")


def _sentence(error: ValidationError) -> str:
    """The first thing that is wrong, in words: unknown keys first, since they explain what is then
    missing.
    """
    problem = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    where, value = ".".join(map(str, problem["loc"])), problem["input"]
    match problem["type"]:
        case "extra_forbidden":
            key, known = problem["loc"][-1], _known_keys(problem["loc"][:-1])
            near = difflib.get_close_matches(str(key), known, 1)
            here = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
            return f"unknown key {where!r}; {here}"
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
    part = Content if not location else SECTIONS.get(location[0], Source)
    return list((Pair if "pairs" in location else part).model_fields)
