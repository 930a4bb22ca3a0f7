"""`make purge`: deletes every copy of what models said, of a study or of an audit."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from driftbook.batch import cache, keys
from driftbook.batch.make_study import holding
from driftbook.study.commands import command
from driftbook.study.files import OUTPUTS, ROOT
from driftbook.study.study_file import Study, load
from driftbook.study.tables import TABLES

READING = (*keys.NOTEBOOKS.values(), "01_prepare", "08_collect", "17_labels", "21_audit")


def purge(study: Study) -> int:
    """Delete all that a study keeps of what models said; how many files and folders went. Tables,
    figures, the report and the pages of what analyses say have no text, and stay.

    Raises:
        ValueError: the study is being run.
    """
    return _alone(study.folder) if study.folder.is_dir() else cache.forget(study.folder)


def _alone(folder: Path) -> int:
    """`_purged`, while nobody runs the study or the audit, nor any audit in the folder.

    Raises:
        ValueError: somebody does, or a text could not be deleted.
    """
    with contextlib.ExitStack() as stack:
        for one in (folder, *(lock.parent for lock in folder.glob("*/.lock"))):
            stack.enter_context(
                holding(one, f"{one} is in use by another make study or make audit")
            )
        return _purged(folder)


def _purged(folder: Path) -> int:
    """Delete all texts in a study's or an audit's folder, and the entries of the cache that were
    made for it or served to it.

    Raises:
        ValueError: one could not be deleted.
    """
    every, n_cached = set(_texts(folder)), cache.forget(folder)
    for path in every:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    if left := sorted(path for path in every if os.path.lexists(path)):
        raise ValueError(f"{len(left)} of {len(every)} could not be deleted, first {left[0]}")
    return len(every) + n_cached


def _texts(folder: Path) -> Iterator[Path]:
    """Where texts are, or may be: tables, what was being written when a batch was killed, sheets of
    any kind for labelling, audits' texts, and executed notebooks that read them and batches' logs,
    for an error may quote them.
    """
    for name in (one.name for one in TABLES.values() if one.private):
        yield from folder.glob(f"runs/*/{name}.parquet")
        yield from folder.glob(f"tables/{name}.parquet")
    yield from (*folder.rglob(".new-*"), *folder.glob("labels/*"))
    # audits lie in one folder; a link leads to what is the user's own
    for part in (folder, *(one for one in folder.glob("*/") if not one.is_symlink())):
        yield from part.glob("text")
        for name in READING:
            yield from (*part.glob(f"{name}*"), *part.glob(f".ipynb_checkpoints/{name}*"))
    yield from (*folder.glob("*.log"), *folder.glob(".snakemake"), *folder.glob("slurm"))


def _audit(name: str) -> Path | None:
    """The folder of an audit, where this is its path."""
    path = Path(os.path.normpath(ROOT / name))
    return path if path.parent == OUTPUTS / "audit" else None


@command(wrong=2)
def main(name: str) -> None:
    """Purge a study, or the folder of an audit, and say how much went."""
    audit = _audit(name)
    print(_alone(audit) if audit and audit.is_dir() else purge(load(name)), "files deleted")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
