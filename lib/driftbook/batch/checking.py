"""What notebook 01 would refuse, found while a study is planned: by its own checks, of everything
that is here without a fetch.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from driftbook.batch.lengths import is_here
from driftbook.batch.sizes import check_fits
from driftbook.benchmarks import data
from driftbook.benchmarks.formats import FORMATS
from driftbook.study import gguf_models, sources
from driftbook.study.files import OUTPUTS, check_safetensors, remedy_of
from driftbook.study.gguf_files import check_readable
from driftbook.study.sections import Base, Judge, Rater
from driftbook.study.study_file import Study

ROOM = 1.1  # times what is written, since a file is whole before it takes the place of another


def refusals(
    study: Study, needed: dict[str, float], gpu_memory: float | None = None
) -> dict[str, str]:
    """By the name of a model or set one sentence on why it would be refused; `needed` are the GB
    that the study writes and fetches, `gpu_memory` the bytes of one GPU where models run on one.
    """
    found: dict[str, str] = {}
    for name, model in study.models.items():
        _try(found, name, lambda name=name, model=model: _check_model(name, model, study))
    for name, one in study.data.items():
        if is_here(one, study):
            _try(found, f"data.{name}", lambda name=name: data.training_examples(name, study))
    for name, one in study.benchmarks.items():
        if is_here(one, study):
            _try(found, f"benchmarks.{name}", lambda name=name: _read(name, study))
    _try(found, "disk", lambda: _check_room(needed))
    if gpu_memory:
        _try(found, "memory", lambda: check_fits(study, gpu_memory))
    return found


def _try(found: dict[str, str], name: str, check: Callable) -> None:
    try:
        check()
    except ValueError as error:
        found[name] = str(error)
    except Exception as error:  # of a dozen kinds, and notebook 01 would stop at any of them
        found[name] = f"{name} cannot be read ({type(error).__name__}: {_first_line(error)})"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _check_model(name: str, model: Base | Judge | Rater, study: Study) -> None:
    if sources.is_gguf(model):
        _check_gguf(name, model, study)
    elif is_here(model, study):
        from driftbook.batch.preparing import check_model

        path = sources.locate(model, study)
        for file in Path(path).rglob("*.safetensors"):
            check_safetensors(file, remedy_of(file.parent))
        check_model(name, model, study)


def _check_gguf(name: str, model: Base | Judge | Rater, study: Study) -> None:
    """A GGUF file's hash, form and template; where its weights are here already, all else."""
    file = sources.gguf_file(model, fetch=False)
    if file is None:
        return
    header, known = check_readable(file), gguf_models.sha256(file)
    if model.revision and not known.startswith(model.revision):
        raise ValueError(
            f"{name}: {model.source} has the SHA-256 {known}, and its revision says"
            f" {model.revision}; correct the revision where you trust this file"
        )
    if gguf_models.dequantised_folder(file, model.dtype, sources.MODELS).exists():
        from driftbook.batch.preparing import check_model

        check_model(name, model, study)
    elif isinstance(model, Base) and not (
        model.chat_template or header.settings.get("tokenizer.chat_template")
    ):
        raise ValueError(
            f"{name}: its tokenizer has no chat template; use the instruction-tuned model's"
            " tokenizer, or give one to the base in the study file, under template:"
        )


def _read(name: str, study: Study) -> None:
    kind = FORMATS[study.benchmarks[name].format].kind
    data.prompts(name, study) if kind == "prompts" else data.items(name, study)


def _check_room(needed: dict[str, float]) -> None:
    folder = next(one for one in (OUTPUTS, *OUTPUTS.parents) if one.exists())
    free, need = shutil.disk_usage(folder).free / 1e9, ROOM * sum(needed.values())
    if free < need:
        parts = ", ".join(f"{what} {size:.1f}" for what, size in needed.items())
        raise ValueError(
            f"{folder} has {free:.1f} GB free and this study needs about {need:.1f} GB ({parts});"
            " make room or choose another folder with DRIFTBOOK_OUTPUTS"
        )
