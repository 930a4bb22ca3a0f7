"""Where a study keeps the files of a run."""

from pathlib import Path

from driftbook.study.study_file import Study
from driftbook.study.variants import Variant


def folder(study: Study, variant: Variant) -> Path:
    """runs/<run_id>/ of the study."""
    return study.folder / "runs" / variant.run_id


def adapter(study: Study, variant: Variant) -> Path | None:
    """The folder of a variant's adapter; None for the base model itself, and for a product of the
    distributions of others.
    """
    none = variant.method == "none" or variant.parts
    return None if none else folder(study, variant) / "adapter"


def part_adapters(study: Study, variant: Variant) -> list[Path]:
    """The folders of the adapters of whose distributions a variant is the product."""
    return [study.folder / "runs" / run_id / "adapter" for run_id in variant.parts]


def adapter_files(study: Study, variant: Variant) -> list[Path]:
    """The files of a variant's adapter, or of those of its parts, whose bytes its answers depend
    on.
    """
    paths = filter(None, [adapter(study, variant), *part_adapters(study, variant)])
    names = ("adapter_config.json", "adapter_model.safetensors")
    return [path / name for path in paths for name in names]
