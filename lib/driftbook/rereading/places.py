"""Where the files of a published study are: in a given folder, a local copy, or a repository."""

from collections.abc import Iterable
from pathlib import Path

from driftbook.study.files import expanded
from driftbook.study.sections import Source
from driftbook.study.sources import locate


def published_files(folder: str, name: str, what: str, sources: Iterable[Source]) -> Path:
    """The folder that is given, or DRIFTBOOK_SHARED's copy of the study of this name, or that of
    the sources' files at their pinned commit, fetched once. `what` calls the files in sentences.

    Raises:
        ValueError: they are not there, and cannot be fetched.
    """
    local = f"${{DRIFTBOOK_SHARED}}/data/{name}"  # the default, if the variable is set
    path = Path(expanded(folder or local) or local).expanduser()
    if folder and not path.is_dir():
        raise ValueError(
            f"there is no folder {folder}; give one with {what}, or none to fetch them"
        )
    if path.is_dir():
        return path
    try:
        found = [Path(locate(source, None)) for source in sources][-1]
    except ValueError as error:
        told = str(error).replace("path:", "the parameter folder, or set DRIFTBOOK_SHARED")
        raise ValueError(f"no {what} here: {told}") from None
    return found if found.is_dir() else found.parent
