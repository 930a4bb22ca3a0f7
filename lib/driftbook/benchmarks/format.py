"""What one benchmark declares about itself; each file of this package that reads a benchmark holds
one such declaration, and `formats.FORMATS` lists them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

FACTS = ("licence", "use", "items", "text", "outputs", "adapters")
PROMPT_TOKENS = 46  # of a prompt: counted in AILuminate's, which are longer than XSTest's 11
COVERED_JUDGES = ("llama_guard_2", "llama_guard_3", "wildguard")
# prompts and answers in, a row of score and unscored_reason out for each
Grader = Callable[[list[str], list[str]], pd.DataFrame]
Rating = tuple[str, str, float | None, float, str | None]


@dataclass(frozen=True)
class Licence:
    """What is known of a source's licence. `items`: may ids with scores of single items be
    published; `text`: may its text be redistributed.

    `seen` are the facts that were read on the page or in a copy of it; the others are to be checked
    there.
    """

    source: str  # as the register names it: see `licences.covers`
    licence: str
    url: str | None
    credit: str | None
    use: str
    items: bool
    text: bool
    outputs: str | None = None
    adapters: str | None = None
    seen: frozenset[str] = frozenset()
    where: str | None = None

    @property
    def unseen(self) -> tuple[str, ...]:
        """The facts that allow or oblige and were not read on the page; a refused fact is on the
        safe side.
        """
        given = (fact for fact in FACTS if getattr(self, fact) not in (None, False))
        return tuple(fact for fact in given if fact not in self.seen)

    def elsewhere(self, source: str, **changes: object) -> "Licence":
        """The licence of a copy of the set at another place."""
        return replace(self, source=source, url=_page(source), **changes)


@dataclass(frozen=True)
class Format:
    """All that the library knows about a benchmark in one file format.

    A format is a file here, an entry of `formats.FORMATS`, and its name in study/sections.py.
    Of the kind `prompts`, a model writes answers and judges read them; `items` are BBQ's questions
    with three options; of `utility`, `measure` rates a model on each item. `read` returns a table
    of items; of prompts it yields (id, category, kind, family, text), where kind is "harmful" or
    "benign look-alike", and family (or None) names prompts made from one template. A category that
    is about child abuse must say so in its name: its prompts are then off (data.CHILD_ABUSE).
    """

    name: str  # also declared in study/sections.py, which checks study files
    kind: str
    read: Callable[[Path], Any]
    version: int  # raise it when the same answers would get other numbers
    n_items: int  # in the public set, by its own description
    tokens: int = PROMPT_TOKENS  # of an item with all that is read, without a chat template
    is_written: bool = True  # whether the model writes text of its own
    file_items: Mapping[str, int] = field(default_factory=dict)  # of files that can be read alone
    template: str | None = None  # the default wording; a prompt as it is where not given
    measure: Callable[..., Iterable[Rating]] | None = None  # of items, a Scorer and an Asking
    # of each category the judges' hazard codes that hold it, in the order of COVERED_JUDGES; "~"
    # where they hold a part of it only, "" where none does
    coverage: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    licences: tuple[Licence, ...] = ()


@dataclass(frozen=True)
class Asking:
    """How a study asks a model for utility, and who grades its answers."""

    max_new_tokens: int = 64
    system_prompt: str | None = None
    graders: Mapping[str, Grader] = field(default_factory=dict)


def lacking(scorer: object, what: str) -> str | None:
    """Why a model cannot be asked for `losses`, `options` or `letters`; None where it can, as every
    model whose weights are here (see models.endpoint).
    """
    return getattr(scorer, "lacks", {}).get(what)


def set_licence(
    source: str,
    licence: str,
    *,
    leaves: str = "",
    seen: str = "",
    url: str | None = None,
    **more: str,
) -> Licence:
    """The licence of a public set: `leaves` says which of items and text may be published, `seen`
    which facts were read; the page is the set's own where none is given.
    """
    allowed = {fact: fact in leaves.split() for fact in ("items", "text")}
    page = url or _page(source)
    return Licence(source, licence, page, seen=frozenset(seen.split()), **allowed, **more)


def _page(source: str) -> str:
    kind, _, name = source.rpartition(":")
    return f"https://{'github.com' if kind == 'github' else 'huggingface.co/datasets'}/{name}"


def rating_table(rows: Iterable[Rating], benchmark: str, run_id: str) -> pd.DataFrame:
    """The table `ratings` of one model on one benchmark."""
    columns = ["prompt_id", "metric", "value", "weight", "unscored_reason"]
    frame = pd.DataFrame(list(rows), columns=columns).assign(run_id=run_id, benchmark=benchmark)
    return frame[["run_id", "benchmark", *columns]]
