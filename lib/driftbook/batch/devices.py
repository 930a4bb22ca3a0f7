"""The memory of the device on which models run here."""

import errno
from functools import cache

import psutil

from driftbook.batch import gpus

MORE = 1.1  # times the memory: no other count of the same machine


@cache
def device_memory() -> int:
    """Bytes of the GPU that this process sees, or of this machine where it sees none."""
    if gpus.numbers():
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_properties(0).total_memory
    return psutil.virtual_memory().total


def has_more_than(had: int | None, there: float | None = None) -> bool:
    """Whether there is clearly more memory, here or where jobs will run, than a failed work had;
    False where it did not fail for want of it.
    """
    return had is not None and (device_memory() if there is None else there) > MORE * had


def lacked_memory(error: BaseException) -> bool:
    """Whether an error is a failed allocation; on a CPU torch has no class of its own for it."""
    words = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return (
        isinstance(error, MemoryError)
        or getattr(error, "errno", None) == errno.ENOMEM
        or (isinstance(error, RuntimeError) and any(one in str(error) for one in words))
    )
