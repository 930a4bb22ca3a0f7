"""What leaves the machine: a study's text-free tables and its figures, never the text of a prompt
or a response.
"""

import os
import shutil
import sys
from pathlib import Path

from driftbook.publishing import licences
from driftbook.stats import estimation
from driftbook.study.commands import command
from driftbook.study.consistency import REREAD
from driftbook.study.files import OUTPUTS, ROOT, read_json, replacing_folder, write_json
from driftbook.study.nameless import nameless
from driftbook.study.opening import OPTIONAL
from driftbook.study.study_file import Study, load
from driftbook.study.tables import TABLES

PUBLISHED = (
    "variants",
    "runs",
    "curves",
    "prompts",
    "rates",
    *OPTIONAL,
)  # what figures need, and the prompts' ids and categories


def publish(
    study_folder: Path,
    destination: Path,
    note: str,
    names: tuple[str, ...] = PUBLISHED,
    study: Study | None = None,
) -> list[Path]:
    """Copy tables, estimates and figures with captions from a study's folder to `destination`,
    whole or not at all; the files written. Of a `study` the ids of those benchmarks are left out
    whose licences keep single items back, and a NOTICE says under what terms the rest stands.

    Raises:
        ValueError: a table is private, undeclared or missing, a value names a folder of this
            machine, or a licence is not known.
    """
    if study is not None:
        licences.check_export(study, items=False)
    there = [
        name
        for name in names
        if name not in OPTIONAL or TABLES[name].path(study_folder / "tables").is_file()
    ]  # what was read again has none
    checked = {name: text_free(study_folder / "tables", name) for name in there}
    if study is not None and "prompts" in checked:
        checked["prompts"] = checked["prompts"][
            checked["prompts"]["benchmark"].isin(licences.allowed_items(study))
        ]
    parts = sorted((study_folder / "tables" / "estimates").glob("*.parquet"))
    with replacing_folder(destination) as new:
        for name, frame in checked.items():
            TABLES[name].write(frame, new / "tables")
        for path in parts:
            part = TABLES["estimates"].nameless(TABLES["estimates"].read(path))
            _check_paths(part, f"estimates/{path.name}")
            estimation.write_estimates(part, new / "tables", path.stem)
        (new / "figures").mkdir()
        for path in sorted((study_folder / "figures").glob("*.png")):
            for file in (path, path.with_suffix(".md")):
                if file.is_file() and file.suffix == ".md":
                    (new / "figures" / file.name).write_text(nameless(file.read_text()))
                elif file.is_file():
                    shutil.copyfile(file, new / "figures" / file.name)
        if study is not None and not study.miniature:
            (new / "NOTICE").write_text(licences.notice(study))
        families = (
            read_json(register) if (register := study_folder / "primary.json").is_file() else []
        )
        facts = {"name": study_folder.name, "note": nameless(note), "primary": families}
        write_json(new / "study.json", facts)
    return sorted(path for path in destination.rglob("*") if path.is_file())


def published(name: str = "") -> list[Path]:
    """The folders of published studies: the one of this name or path, or all of them.

    Raises:
        ValueError: nothing of this name is published.
    """
    home = OUTPUTS / "published"
    if not name:
        return sorted(path.parent for path in home.glob("*/study.json"))
    found = [path for path in (Path(name), home / name) if (path / "study.json").is_file()]
    if not found:
        raise ValueError(
            f"nothing is published as {name}; make publish STUDY={name} copies a finished study"
        )
    return found[:1]


def text_free(folder: Path, name: str):
    """A study's table that may be published, its texts nameless.

    Raises:
        ValueError: it is private, undeclared or missing, or a key names a folder of this machine.
    """
    if name not in TABLES:
        raise ValueError(f"{name} is no declared table; known: {', '.join(TABLES)}")
    if TABLES[name].private:
        raise ValueError(f"{name} holds text of prompts or responses and is never published")
    frame = TABLES[name].nameless(TABLES[name].read(folder))
    _check_paths(frame, name)
    return frame


def _check_paths(frame, where: str) -> None:
    """Raise where a text names a folder of this machine."""
    homes = [str(path) for path in {ROOT, OUTPUTS, Path.home()} if len(path.parts) > 1]
    for column in frame.select_dtypes("string"):
        for home in homes:
            if frame[column].str.contains(home + os.sep, regex=False).fillna(False).any():
                raise ValueError(
                    f"{where}: column {column} names a folder of this machine, so it is not"
                    " published"
                )


def made(name: str) -> tuple[Path, str, Study | None]:
    """The folder, the note and the study file of a finished study, or of published data that
    notebooks read again (`REREADING`), which have no such file.
    """
    if name in REREAD:
        known = OUTPUTS / name / "study.json"
        if not known.is_file():
            raise ValueError(f"there is no {name} in {OUTPUTS}; make reread makes it")
        return known.parent, read_json(known)["note"], None
    this = load(name)
    return this.folder, this.note, this


@command(wrong=1)
def main(name: str) -> None:
    """Publish a study."""
    folder, note, study = made(name)
    written = publish(folder, OUTPUTS / "published" / folder.name, note, study=study)
    print(
        f"{len(written)} files, {sum(path.stat().st_size for path in written) / 1e6:.1f} MB, in"
        f" {OUTPUTS / 'published' / folder.name}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
