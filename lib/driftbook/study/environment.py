"""What a result was made with: package versions, machine, process memory."""

import os
import platform
import resource
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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

MAKING = ("torch", "transformers", "peft", "trl", "tokenizers", "numpy")  # what results depend on


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


def processor() -> str:
    """The processor's own name and its number of cores, and the GPU's name where there is one:
    asked of the system and of the driver, since torch takes seconds to import.
    """
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = found[0] if found else name
    return ", ".join(filter(None, (gpu_name(), f"{name}, {os.cpu_count()} cores")))


def gpu_name() -> str | None:
    """The name of this machine's GPU, None without one."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip().partition("\n")[0] or None if said.returncode == 0 else None
