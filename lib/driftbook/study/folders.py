"""Where a study keeps the files of a run."""

from pathlib import Path

from driftbook.study.study_file import Study
from driftbook.study.variants import Variant


def folder(study: Study, variant: Variant) -> Path:
    """runs/<run_id>/ of the study."""
    return study.folder / "runs" / variant.run_id


def adapter(study: Study, variant: Variant) -> Path | None:
    """The folder of a variant's adapter; None for the base model itself."""
    return None if variant.method == "none" else folder(study, variant) / "adapter"


def adapter_files(study: Study, variant: Variant) -> list[Path]:
    """The files of a variant's adapter, whose bytes its answers depend on."""
    path = adapter(study, variant)
    return (
        [] if path is None else [path / "adapter_config.json", path / "adapter_model.safetensors"]
    )
