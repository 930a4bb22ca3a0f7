"""One finding, and how several names are listed in its sentence."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True)
class Finding:
    """An error, warning or note; a sentence; and the module or tensor that shows it best."""

    severity: str
    finding: str
    sentence: str
    module: str | None = None


error, warning, note = (partial(Finding, name) for name in ("error", "warning", "note"))


def named(names: Iterable, most: int = 3) -> str:
    """The first few names, and how many more there are."""
    names = list(map(str, names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


def times(shape: Iterable[int]) -> str:
    """A shape in words: 4 x 8."""
    return " x ".join(map(str, shape))
