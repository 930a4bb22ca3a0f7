"""Where models, benchmarks and training data are found: made by notebook 01, a local path, GitHub
at a commit, or the hub at a revision.
"""

import re
from functools import cache
from importlib.metadata import version
from pathlib import Path

from driftbook.study import code
from driftbook.study.files import OUTPUTS, digest, folder_digest
from driftbook.study.sections import Source
from driftbook.study.study_file import Study

MODELS = (
    OUTPUTS / "models"
)  # shared by all studies: what notebook 01 makes, by the hash of its recipe


def made_folder(study: Study, kind: str) -> Path:
    """The folder of what notebook 01 makes for a study: kind `miniature` (by recipe and seed) or
    `random` (by recipe and training data).
    """
    if kind == "miniature":
        return MODELS / f"miniature-{recipe()}-s{study.seed}"
    texts = [study.data[name].model_dump(mode="json") for name in sorted(study.data)]
    return MODELS / f"random-{digest([recipe(), texts, study.seed], 12)}"


@cache
def recipe() -> str:
    """Twelve hex digits that change with the code of the miniature and with the versions of torch
    and transformers.
    """
    versions = {package: version(package) for package in ("torch", "transformers")}
    made = code.fingerprint(code.of_module("driftbook.miniature"))
    return digest([made, versions], 12)


def locate(source: Source, study: Study | None) -> Path | str:
    """The local file or folder of a source, fetched first where it is public; for a model on the
    hub, its name.

    Raises:
        ValueError: it is not there; the sentence says what to do.
    """
    if source.local is not None:
        if not source.local.exists():
            raise ValueError(
                f"{source.source}: the path {source.path} does not exist ({source.local}); correct"
                " or remove it"
            )
        return source.local
    kind, _, name = source.source.partition(":")
    if kind in ("miniature", "random"):
        path = made_folder(study, kind) / name
        if not path.exists():
            raise ValueError(
                f"{source.source} is not made yet; run notebook 01_prepare with"
                f" study={study.name!r}, or make study"
            )
        return path
    if kind == "github":
        return _from_github(source, name)
    return source.source


def _from_github(source: Source, name: str) -> Path:
    """The folder (or the only file) with the files of OWNER/REPO/FOLDER at a commit, fetched once,
    hashes checked where given.
    """
    import pooch

    owner, repo, *folder = name.split("/")
    if not source.revision or not source.files:
        raise ValueError(f"{source.source} needs a revision (a commit) and the names of its files")
    cache = Path(pooch.os_cache("driftbook")) / f"{owner}-{repo}-{source.revision}"
    for file in source.files:
        url = "/".join(
            ["https://raw.githubusercontent.com", owner, repo, source.revision, *folder, file]
        )
        try:
            pooch.retrieve(url, known_hash=source.sha256.get(file), fname=file, path=cache)
        except Exception as error:
            raise ValueError(
                f"cannot fetch {source.source} at {source.revision} ({type(error).__name__}); go"
                " online, or give a local copy with path:"
            ) from None
    return cache / source.files[0] if len(source.files) == 1 else cache


def identity(source: Source, study: Study | None) -> str:
    """What the content of a source is known by: the hash of local files, or the revision on the
    hub.

    Raises:
        ValueError: a hub source without a commit: what a branch or nothing names may change from
            day to day.
    """
    path = locate(source, study)
    if isinstance(path, Path):
        return folder_digest(path)
    if not re.fullmatch(r"[0-9a-f]{40}", source.revision or ""):
        raise ValueError(
            f"{source.source} has the revision {source.revision!r}; name a whole commit (40 hex"
            " digits), so that a result is known to be of the same content"
        )
    return f"{source.source}@{source.revision}"
