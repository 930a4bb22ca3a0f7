"""What a result was made with: package versions, machine, process memory."""

import os
import platform
import resource
from functools import cache
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "driftbook",
    "torch",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "accelerate",
    "pandas",
    "numpy",
    "scipy",
    "statsmodels",
)


def versions() -> dict[str, str]:
    """Versions of the packages that shape results; those not installed are left out."""
    found = {package: _version(package) for package in PACKAGES}
    known = {package: number for package, number in found.items() if number is not None}
    return {"python": platform.python_version(), **known}


@cache
def _version(package: str) -> str | None:
    """The installed version, None where there is none: read once, since a training asks each
    time.
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def hardware() -> str:
    """The machine in words: the GPU where torch is loaded and sees one, else the processor and its
    cores.
    """
    import sys

    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {os.cpu_count()} cores"


def peak_memory() -> int:
    """The most memory this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
