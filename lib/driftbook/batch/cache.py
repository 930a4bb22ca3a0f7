"""Results kept by what they depend on, for all studies: the same work is not done twice, by this
process or by another at the same time.

An entry is a folder outputs/cache/<hash>/ with the tables and entry.json, written last, which holds
the key in clear and a hash of each file. Nothing is served that is not whole.
"""

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
from filelock import FileLock

from driftbook.study.files import (
    OUTPUTS,
    digest,
    file_digest,
    private_folder,
    read_json,
    read_object,
    replacing_folder,
    write_json,
)
from driftbook.study.tables import TABLES

FOLDER = OUTPUTS / "cache"
SERVED = "served.json"  # in an entry: the folders that have it


def served(key: Any, run_id: str, folder: Path, make: Callable[[], list[Path]]) -> list[Path]:
    """The tables of a piece of work in `folder`, under this run_id: those of the entry of `key`
    (any JSON value), else what `make` writes there.

    Two processes that want the same wait for each other: one does the work, the other takes it.
    """
    entry = private_folder(FOLDER) / digest(key, 32)
    with FileLock(entry.with_suffix(".lock")):
        if is_whole(entry):
            _note(entry, folder)  # before the text is there, so that a purge finds it
            return [_copied(path, run_id, folder) for path in sorted(entry.glob("*.parquet"))]
        files = make()
        with replacing_folder(entry) as new:
            write_json(new / SERVED, [os.path.relpath(folder, FOLDER)])
            for path in files:
                shutil.copyfile(path, new / path.name)
            write_json(
                new / "entry.json",
                {"key": key, "files": {path.name: file_digest(new / path.name) for path in files}},
            )
        return files


def _note(entry: Path, folder: Path) -> None:
    """Write in an entry that it is of this folder too; whose it was stays unknown where it was."""
    known, here = _folders(entry), os.path.relpath(folder, FOLDER)
    if known is not None and here not in known:
        write_json(entry / SERVED, [*known, here])


def _folders(entry: Path) -> list[str] | None:
    """The folders that an entry was made for or served to; None where that is not known."""
    try:
        found = read_json(entry / SERVED)
        return [*map(str, found)] if found and isinstance(found, list) else None
    except (ValueError, OSError, TypeError):
        return None


def is_whole(entry: Path) -> bool:
    """Whether there is an entry and each of its files has the bytes that it was written with; a
    damaged one is named in a warning.
    """
    if not entry.exists():
        return False
    try:
        files = dict(read_object(entry / "entry.json")["files"])
    except (ValueError, OSError, KeyError, TypeError):
        files = None
    if files is None or any(file_digest(entry / name) != known for name, known in files.items()):
        warnings.warn(f"the cached result {entry} is damaged; it is computed again", stacklevel=2)
        return False
    return True


def _copied(path: Path, run_id: str, folder: Path) -> Path:
    table = TABLES[path.stem]
    return table.write(table.read(path).assign(run_id=run_id), folder)


def content(path: Path) -> str | None:
    """What a piece of work reads of a file: of a table its rows without their run_id, of any other
    file its bytes; None where there is none.
    """
    if path.suffix != ".parquet" or not path.is_file():
        return file_digest(path)
    rows = pq.read_table(path).to_pandas().drop(columns="run_id", errors="ignore")
    return digest(
        [list(rows.columns), pd.util.hash_pandas_object(rows, index=False).astype(str).tolist()], 32
    )


def forget(folder: Path) -> int:
    """Delete every entry with texts that was made for something in a folder or served to it, or of
    which that is not known; how many there were. What was being written by a process that is gone
    goes too.

    Raises:
        ValueError: one could not be deleted.
    """
    names = [one.name for one in TABLES.values() if one.private]
    entries = {path.parent for name in names for path in FOLDER.rglob(f"{name}.parquet")}
    ours = {entry for entry in entries if _is_of(entry, folder)}
    for entry in ours:
        with FileLock(FOLDER / f"{entry.name}.lock"):
            shutil.rmtree(entry, ignore_errors=True)
    if left := sorted(entry for entry in ours if entry.exists()):
        raise ValueError(f"{len(left)} cached results could not be deleted, first {left[0]}")
    return len(ours)


def _is_of(entry: Path, folder: Path) -> bool:
    known = _folders(entry)
    homes = [Path(os.path.normpath(FOLDER / one)) for one in known or ()]
    return known is None or any(one.is_relative_to(folder) for one in homes)
