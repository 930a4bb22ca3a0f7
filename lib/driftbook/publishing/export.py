"""`make export`: a finished study in the formats of lm-evaluation-harness and inspect_ai."""

import sys

from driftbook.publishing import licences
from driftbook.publishing.export_inspect import to_inspect
from driftbook.publishing.export_lm_eval import to_lm_eval
from driftbook.publishing.exported import TASKS, failures
from driftbook.study.files import private_folder, replacing
from driftbook.study.study_file import load

FORMATS = {"lm_eval": to_lm_eval, "inspect": to_inspect}


def main(name: str = "miniature", *formats: str) -> None:
    """Write a study's exports beside its tables, in the formats asked for or in all, and say how
    many files and which runs are left out.

    Raises:
        ValueError: an unknown format, no such study, or one without tables.
    """
    if unknown := set(formats) - set(FORMATS):
        raise ValueError(f"there is no format {unknown.pop()!r}; give {' or '.join(FORMATS)}")
    study = load(name)
    lost = failures(study)
    private_folder(study.folder)
    for one in formats or FORMATS:
        folder = study.folder / "exports" / one
        print(f"{one}: {len(FORMATS[one](study, folder))} files in {folder}")
    with replacing(study.folder / "exports" / "NOTICE") as new:
        new.write_text(licences.notice(study))
    if kept := [
        task.benchmark for task in TASKS if task.benchmark not in licences.allowed_items(study)
    ]:
        print(
            f"left out, since a licence keeps single items back: {', '.join(kept)}; make publish"
            " gives their rates (see exports/NOTICE)"
        )
    if lost:
        first, reason = next(iter(lost.items()))
        runs = "1 failed run has" if len(lost) == 1 else f"{len(lost)} failed runs have"
        print(
            f"{runs} no results in lm_eval's format and the status error in inspect_ai's; first"
            f" {first}: {reason}"
        )


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ValueError as error:
        sys.exit(f"driftbook: {error}")
