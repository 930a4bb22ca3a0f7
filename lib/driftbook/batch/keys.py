"""What each stage and analysis depends on, as keys of content: settings, inputs, code, packages and
device. A result is served only if its key is the same.
"""

from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from driftbook.batch import gpus
from driftbook.study import code, sources
from driftbook.study.content import ANALYSES as ANALYSES
from driftbook.study.content import OF_PROBES, OF_REPAIRS
from driftbook.study.environment import MAKING
from driftbook.study.files import ROOT, digest
from driftbook.study.methods import MAKING_STAGES
from driftbook.study.sections import ITEM_FORMATS, PROMPT_FORMATS, UTILITY_FORMATS, Source
from driftbook.study.study_file import Study
from driftbook.study.variants import Variant

NOTEBOOKS = {
    "train": "02_train",
    "mitigate": "03_mitigate",
    "retune": "02_train",
    "respond": "04_respond",
    "judge": "05_judge",
    "answer": "06_answer",
    "utility": "07_utility",
    "probe": "25_probe",
}
RESULT = "done"  # the variable of a stage's notebook to which its work leads
FITTING = ("numpy", "scipy", "pandas", "statsmodels")  # what analyses compute with
STAGES = ("train", "respond", "judge", "answer", "utility")  # of every study
AFTER = {
    "mixed_effects": ("safety",),
    "labels": ("safety",),
    "safe_lora": ("fairness",),
    "tradeoffs": ("safety", "fairness"),
    "dose": ("safety",),
    "mechanisms": ("safety",),
    "power": ("safety", "tradeoffs"),
    "primary": ("safety", "fairness", "mixed_effects", "tradeoffs"),
}

OF_BASES = ("safety", "fairness")  # what says something of base models alone


def stages(study: Study) -> tuple[str, ...]:
    """The stages of a study, in their order: with mitigate where it repairs what it trained, and
    retune where it tunes it once more, and probe where it looks into its runs.
    """
    made = {"train"} | {variant.made_in for variant in study.variants}
    looked = ("probe",) if study.probes else ()
    return (*(one for one in MAKING_STAGES if one in made), *STAGES[1:], *looked)


def page(stage: str) -> str:
    """The name of a stage's executed notebooks, before the base model and the shard: no two stages
    have one in common.
    """
    name = NOTEBOOKS[stage]
    return f"{name}.{stage}" if "stage" in parameters(stage) else name


def parameters(stage: str) -> dict[str, str]:
    """What the notebook of a stage is told besides the study and base model: which stage it is,
    where it is another's too.
    """
    first = next(one for one, name in NOTEBOOKS.items() if name == NOTEBOOKS[stage])
    return {} if stage == first else {"stage": stage}


def analyses(study: Study) -> dict[str, str]:
    """The analyses of a study and their notebooks: those that it names, or all; where nothing is
    trained, those of the base models; without a judge none of its errors.
    """
    known = (
        {
            **ANALYSES,
            **(OF_REPAIRS if study.mitigations else {}),
            **(OF_PROBES if study.probes else {}),
        }
        if study.grid
        else {name: ANALYSES[name] for name in OF_BASES}
    )
    return {
        name: notebook
        for name, notebook in known.items()
        if (not study.analyses or name in study.analyses) and (study.judges or name != "labels")
    }


def notebook(name: str) -> Path:
    """The file of a notebook."""
    return ROOT / "notebooks" / f"{name}.ipynb"


def versions(packages: tuple[str, ...] = MAKING) -> dict[str, str]:
    """The installed versions of packages."""
    return {name: _version(name) for name in packages}


_version = cache(version)  # it reads a file of text each time


@cache
def device() -> str:
    """The kind of device on which models run here; torch is asked only where there is a GPU."""
    if not gpus.numbers():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def code_of(stage: str, texts: frozenset[str]) -> str:
    """The digest of all code that leads to a stage's results, where settings hold these texts."""
    return _code_of(stage, texts & _choices(stage))


@cache
def _choices(stage: str) -> frozenset[str]:
    return code.choices(code.of_notebook(notebook(NOTEBOOKS[stage]), RESULT))


@cache
def _code_of(stage: str, texts: frozenset[str]) -> str:
    return code.fingerprint(code.of_notebook(notebook(NOTEBOOKS[stage]), RESULT), texts)


def modules() -> list[str]:
    """The modules of the library to which the notebooks of stages lead."""
    parts = set().union(*(code.of_notebook(notebook(name)) for name in NOTEBOOKS.values()))
    found = {module for module, _ in code.closure(parts, code.choices(parts))}
    return sorted(module for module in found if "/" not in module)


def texts_of(value: Any) -> frozenset[str]:
    """All texts in a JSON value."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    parts = map(texts_of, value) if isinstance(value, list | tuple) else ()
    return frozenset({value} if isinstance(value, str) else ()).union(*parts)


Content = Callable[[Source, Study], str]


def settings(
    stage: str,
    study: Study,
    base_model: str,
    content: Content = sources.identity,
    on: str | None = None,
) -> dict[str, Any]:
    """All that a stage's results for one base model depend on, except for code, adapters and the
    results of earlier stages. By declared content it is known on any machine, so without a device;
    `on` is the kind of device on which jobs run, where it is not this machine's.
    """
    elsewhere = {"path", "source", "sha256", "files", "revision", "truth", "pairs"}
    elsewhere |= set() if stage == "answer" else {"answer_mode"}
    present = {
        name: {"content": content(part, study), **part.model_dump(mode="json", exclude=elsewhere)}
        for name, part in _read(stage, study, study.bases[base_model]).items()
    }
    for name, part in _read(stage, study, study.bases[base_model]).items():
        if getattr(part, "answers", None):  # of a file of answers the texts, not the place
            present[name]["answers"] = sources.answers_digest(part)
    if "base" in present:  # of a template's file the text, not the place
        present["base"]["template"] = study.bases[base_model].chat_template
    if study.date is not None:
        present["date of templates"] = study.date.isoformat()
    shared: dict[str, Any] = {}
    if stage in ("train", "retune"):
        shared = {
            "training": study.training.model_dump(mode="json", exclude={"tokens_per_batch"}),
            "drift": study.drift and study.drift.model_dump(mode="json"),
        }
        if stage == "train" and study.n_snapshots:
            shared["snapshots"] = study.n_snapshots
    if stage == "probe":
        shared = {"probes": study.probes and study.probes.model_dump(mode="json")}
    if stage == "utility" and study.asked_to_begin:
        shared = {"asked to begin": list(study.asked_to_begin)}
    found = {"stage": stage, "seed": study.seed, **shared, **present}
    of_device = {} if content is sources.stated else {"device": on or device()}
    made_by = {"packages": versions()} | of_device
    return found | made_by


def _read(stage: str, study: Study, base: Source) -> dict[str, Source]:
    """The models, data and benchmarks that a stage reads."""

    def asked(formats: tuple[str, ...]) -> dict[str, Source]:
        return {name: study.benchmarks[name] for name in study.asked(formats)}

    drift = {**asked(PROMPT_FORMATS), **asked(ITEM_FORMATS), **study.judges} if study.drift else {}
    training = {
        "base": base,
        **{f"data {name}": part for name, part in study.data.items()},
        **({"init_texts": study.init_texts} if study.init_texts else {}),
        **{f"drift {name}": part for name, part in drift.items()},
    }
    parts: dict[str, dict[str, Source]] = {
        "train": training,
        "retune": training,
        "mitigate": {"base": base, "heldout": study.data["heldout"], **base.checkpoints},
        "respond": {"base": base, **asked(PROMPT_FORMATS)},
        "judge": {
            **asked(PROMPT_FORMATS),
            **{f"judge {name}": judge for name, judge in study.judges.items()},
        },
        "answer": {"base": base, **asked(ITEM_FORMATS)},
        "utility": {
            "base": base,
            **asked(UTILITY_FORMATS),
            **{name: study.benchmarks[name] for name in study.refusal_only},
            **{name: study.benchmarks[name] for name in study.asked_to_begin},
            **{f"rater {name}": rater for name, rater in study.raters.items()},
        },
        "probe": {"base": base, **_probed(study), **base.checkpoints},
    }
    return parts[stage]


def _probed(study: Study) -> dict[str, Source]:
    """The prompts of directions, and those reported on."""
    one = study.probes
    sets = {f"data {name}": study.data[name] for name in one.data} if one else {}
    return sets | {name: study.benchmarks[name] for name in ("safety", "over_refusal")}


def made_by(stage_settings: dict[str, Any], variant: Variant) -> dict[str, Any]:
    """The settings of a stage and the digest of the code that it runs for a variant."""
    texts = texts_of(stage_settings) | texts_of(variant.fields())
    return {**stage_settings, "code": code_of(stage_settings["stage"], texts)}


def result_key(stage_settings: dict[str, Any], variant: Variant) -> str:
    """The key of a variant's result in a stage."""
    return digest([made_by(stage_settings, variant), variant.fields()])
