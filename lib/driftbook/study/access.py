"""Whether the models and sets that a study names on the Hugging Face hub can be had, said in one
sentence each, and fetching their files.

What a whole commit names cannot change, so a copy of it in the cache is as good as the hub's; a
branch's is not. No sentence repeats what the hub or its client says: they may repeat the token.
"""

import json
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import pandas as pd
from huggingface_hub import HfApi, constants, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the hub's own client, whichever it is: httpx in its version 1, httpx2 in 2
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import (
    build_hf_headers,
    filter_repo_objects,
    get_session,
    hf_raise_for_status,
    validate_repo_id,
)

from driftbook.study.sections import Source

Kind = Literal["model", "dataset"]
OK = ("local", "made here", "cached", "reachable", "not checked")
STATES = (*OK, "gated", "no token", "unknown", "wrong revision", "wrong file", "offline")
COLUMNS = ("name", "kind", "source", "revision", "state", "ok", "sentence")
COMMIT = re.compile(r"[0-9a-f]{40}")
TIMEOUT = 5.0  # seconds, of each of at most two requests
NEVER = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.pkl",
    "*.pickle",
    "*.py",
)  # files that run code when they are loaded
LISTED = 1000  # files of a repository above which the hub's short listing may be cut
SIGN_IN = "sign in with `hf auth login` or set HF_TOKEN"
NOTES = {
    "LLM-Tuning-Safety/HEx-PHI": (
        "; its own licence must be accepted there, and it has 300 prompts today"
    )
}


@dataclass(frozen=True)
class Access:
    """Whether a source can be had: its state, one of STATES, and one sentence on what is wrong and
    what to do.
    """

    source: str
    kind: Kind
    state: str
    sentence: str

    @property
    def ok(self) -> bool:
        """Whether a study can use the source."""
        return self.state in OK


Answer = tuple[str, str]  # a state and its sentence


@dataclass(frozen=True)
class _Question:
    """What the hub is asked for, and as whom; no token is False, so that the client looks for no
    other.
    """

    source: Source
    kind: Kind
    patterns: tuple[str, ...]
    endpoint: str
    token: str | Literal[False] = field(default=False, repr=False)

    @property
    def api(self) -> HfApi:
        return HfApi(endpoint=self.endpoint, token=self.token)

    @property
    def page(self) -> str:
        return (
            f"https://huggingface.co/{'datasets/' * (self.kind == 'dataset')}{self.source.source}"
        )

    @property
    def hub(self) -> str:
        """The hub's name in a sentence: without the user and the password that an address may hold."""
        return f"the hub at {urlsplit(self.endpoint).netloc.rpartition('@')[2]}"

    @property
    def folder(self) -> Path:
        """Where the client keeps the files at the revision."""
        repository = repo_folder_name(repo_id=self.source.source, repo_type=self.kind)
        return (
            Path(constants.HF_HUB_CACHE).expanduser().resolve()
            / repository
            / "snapshots"
            / self.source.revision
        )


def check(
    source: Source, kind: Kind, endpoint: str | None = None, token: str | None = None
) -> Access:
    """Whether a source can be had, found by at most two short requests and without a download."""
    state, sentence = _here(source) or _on_hub(source, kind, source.files, endpoint, token)[0]
    return Access(source.source, kind, state, sentence)


def check_all(
    sources: Iterable[tuple[str, Kind, Source]],
    endpoint: str | None = None,
    token: str | None = None,
    workers: int = 8,
) -> pd.DataFrame:
    """One row per source, in order: name, kind, source, revision, state, ok, sentence. Whatever is
    wrong is said in its row.
    """

    def row(entry: tuple[str, Kind, Source]) -> tuple:
        name, kind, source = entry
        try:
            found = check(source, kind, endpoint, token)
        except (
            Exception
        ) as error:  # one source that cannot be checked must not hide what is known of the others
            found = Access(
                source.source,
                kind,
                "unknown",
                f"{source.source} cannot be checked ({type(error).__name__}); correct its entry",
            )
        return name, kind, source.source, source.revision, found.state, found.ok, found.sentence

    with ThreadPoolExecutor(max(1, workers)) as pool:
        rows = list(pool.map(row, sources))
    return pd.DataFrame(rows, columns=COLUMNS).astype({"ok": bool})


def fetch(
    source: Source,
    kind: Kind,
    patterns: Sequence[str],
    endpoint: str | None = None,
    token: str | None = None,
) -> Path:
    """The folder of a repository at its revision, with the files that match, and never those of
    NEVER; a local source's own path. The cached copy serves, with a warning, where the hub is down
    or HF_HUB_OFFLINE is set.

    Raises:
        ValueError: the files cannot be had; the sentence says why and what to do.
    """
    if _here(source) is not None:
        return _local(source)
    (state, sentence), question = _on_hub(source, kind, patterns, endpoint, token)
    if state not in OK:
        raise ValueError(sentence)
    failure = _download(question) if state == "reachable" else None
    missing = _missing(question)
    if missing is not None:
        raise ValueError(_unfetched(question, missing, failure))
    if failure:
        state, sentence = _cached(question, f"{question.hub} failed ({failure})")
    if state == "cached":
        warnings.warn(sentence, stacklevel=2)
    return question.folder


def _local(source: Source) -> Path:
    """The path of a source that is not on the hub."""
    state, sentence = _here(source)
    if state == "local":
        return source.local
    raise ValueError(
        f"{source.source} is not on the hub; sources.locate finds it" if state in OK else sentence
    )


def _unfetched(question: _Question, missing: str, failure: str | None) -> str:
    """The sentence for a file that is not there after all that could be fetched was."""
    name = f"{question.source.source} at {question.source.revision}"
    if failure is None:
        return f"{name} has no {missing} that may be fetched; correct the names of the files"
    return (
        f"{name} cannot be fetched whole from {question.hub} ({failure}): {missing} is missing; try"
        " again, or give a local copy with path:"
    )


def _download(question: _Question) -> str | None:
    """What went wrong when the files were fetched into the cache; None where nothing did."""
    source = question.source
    try:
        snapshot_download(
            source.source,
            repo_type=question.kind,
            revision=source.revision,
            allow_patterns=list(question.patterns) or None,
            ignore_patterns=list(NEVER),
            endpoint=question.endpoint,
            token=question.token,
            etag_timeout=TIMEOUT,
        )
    except (
        Exception
    ) as error:  # the client raises a dozen kinds; every one means that files may be missing
        if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
            error = error.__cause__  # why it was looked for in the cache
        return getattr(error, "strerror", None) or type(error).__name__
    return None


# ---- what needs no request
def _here(source: Source) -> Answer | None:
    """The answer for a source that is not on the hub; None for one that is."""
    name, kind = source.source, source.source.partition(":")[0]
    if source.local is not None and not os.path.exists(source.local):
        return (
            "wrong file",
            f"{name}: the path {source.path} does not exist ({source.local}); correct or remove it",
        )
    if source.local is not None:
        return "local", f"{name} is read from {source.local}"
    if kind in ("miniature", "random"):
        return "made here", f"{name} is made by notebook 01_prepare"
    if kind != "github":
        return None
    if not source.revision:
        return (
            "wrong revision",
            f"{name} needs a revision; name a commit of its repository on GitHub",
        )
    return (
        "not checked",
        f"{name} is fetched from GitHub at the commit {source.revision} when it is used",
    )


# ---- what the hub says
def _on_hub(
    source: Source, kind: Kind, patterns: Sequence[str], endpoint: str | None, token: str | None
) -> tuple[Answer, _Question | None]:
    """The answer for a source on the hub, and the question that the hub was asked."""
    if kind not in ("model", "dataset"):
        raise ValueError(f"kind={kind!r}; expected model or dataset")
    try:
        validate_repo_id(source.source)
    except HFValidationError:
        unset = f" (a variable of its path {source.path} is not set)" if source.path else ""
        return (
            "unknown",
            (
                f"{source.source} is no name on the hub, OWNER/NAME{unset}; correct it, or give a"
                " local copy with path:"
            ),
        ), None
    question = _Question(
        source, kind, tuple(patterns), (endpoint or constants.ENDPOINT).rstrip("/")
    )
    if constants.is_offline_mode():
        return _without_hub(question, "HF_HUB_OFFLINE is set", "unset it"), question
    try:
        question = _Question(source, kind, tuple(patterns), question.endpoint, _token(token))
    except ValueError as error:
        return ("no token", f"{source.source} is not looked up: {error}; {SIGN_IN} again"), question
    try:
        return _ask(question), question
    # beside the hub's and its client's errors, whatever a page that is not the hub's makes of the
    # client
    except Exception as error:
        failure = error
    return _failed(question, failure), question


def _token(token: str | None) -> str | Literal[False]:
    """The token that the client would send, checked: the client's own error for one that no header
    can hold repeats it.
    """
    try:
        header = build_hf_headers(token=None if token == "" else token).get("authorization", "")
    except Exception as error:
        name = type(error).__name__
    else:
        value = header.removeprefix("Bearer").strip()
        if re.fullmatch(r"[!-~]*", value):
            return value or False
        name = "it has a space, a line break or a letter that no token has"
    raise ValueError(f"your token cannot be read ({name})")


def _ask(question: _Question) -> Answer:
    """What the hub says when all is well with the network; errors of the hub and of its client are
    raised.
    """
    source = question.source
    commit = COMMIT.fullmatch(source.revision or "")
    info = question.api.repo_info(
        source.source,
        repo_type=question.kind,
        revision=source.revision if commit else None,
        timeout=TIMEOUT,
    )
    if not commit:
        return _wrong_revision(question, info.sha)
    if info.sha not in (None, source.revision):  # a mirror that gives what it has
        return _wrong_revision(question, None)
    if info.gated:  # its files are listed for everyone
        _check_gate(question)
    listing = [sibling.rfilename for sibling in info.siblings or ()]
    missing = _unmatched(question.patterns, listing) if 0 < len(listing) <= LISTED else None
    if missing is not None:
        has = f"has no {missing} at {source.revision} that may be fetched, only {_some(listing)}"
        return "wrong file", f"{source.source} {has}; correct the names of the files"
    return "reachable", f"{source.source} is on the hub at {source.revision} and open to you"


def _check_gate(question: _Question) -> None:
    """Raise the hub's error where a gated repository is not open to us. HfApi.auth_check asks the
    same, and waits for ever.
    """
    address = f"{question.endpoint}/api/{question.kind}s/{question.source.source}/auth-check"
    response = get_session().get(
        address, headers=build_hf_headers(token=question.token), timeout=TIMEOUT
    )
    if (
        response.status_code != 404
    ):  # of a mirror that does not know the question: the repository itself was found
        hf_raise_for_status(response)


def _failed(question: _Question, error: Exception) -> Answer:
    """The answer for an error of the hub, or of its client."""
    name, status = (
        question.source.source,
        error.response.status_code if isinstance(error, HfHubHTTPError) else None,
    )
    if isinstance(error, OfflineModeIsEnabled):
        return _without_hub(question, "HF_HUB_OFFLINE is set", "unset it")
    if isinstance(error, GatedRepoError):  # before RepositoryNotFoundError, of which it is one
        return _gated(question)
    if isinstance(error, RevisionNotFoundError):
        return _wrong_revision(question, _main(question))
    if isinstance(error, DisabledRepoError):
        return (
            "unknown",
            (
                f"{name} was disabled, see {question.page}; name another source, or give a local"
                " copy with path:"
            ),
        )
    if status == 401 and question.token and not isinstance(error, RepositoryNotFoundError):
        return (
            "no token",
            f"{question.hub} refuses your token for {name} (it may have expired); {SIGN_IN} again",
        )
    if status == 403:
        return (
            "gated",
            (
                f"{question.hub} forbids your access to {name}; see {question.page}, and the"
                " permissions of your token"
            ),
        )
    if isinstance(error, RepositoryNotFoundError) or status in (400, 401, 404):
        private = (
            "your token does not open it (it may have expired)"
            if question.token
            else f"you are not signed in: {SIGN_IN}"
        )
        return (
            "unknown",
            (
                f"no {question.kind} {name} is on the hub: correct the name; or it is private and"
                f" {private}"
            ),
        )
    if isinstance(error, HTTPError) and status is None:
        return _without_hub(
            question, f"{question.hub} does not answer ({type(error).__name__})", "go online"
        )
    if status is None:
        return _without_hub(
            question,
            f"{question.hub} answers like no hub ({type(error).__name__})",
            "look for a proxy or a sign-in page",
        )
    return _without_hub(
        question, f"{question.hub} answers with the error {status}", "try again later"
    )


def _gated(question: _Question) -> Answer:
    name, note = question.source.source, NOTES.get(question.source.source, "")
    if not question.token:
        return (
            "no token",
            (
                f"{name} is gated: {SIGN_IN}, and ask for access at {question.page} (manual"
                f" approval can take days){note}"
            ),
        )
    return (
        "gated",
        (
            f"{name} is gated and your token has no access: ask for it at {question.page} (manual"
            f" approval can take days), and let a fine-grained token read gated repositories{note}"
        ),
    )


def _wrong_revision(question: _Question, main: str | None) -> Answer:
    """The answer for a revision that is no commit of the repository."""
    name, revision, now = (
        question.source.source,
        question.source.revision,
        f", main is at {main} now" if main else "",
    )
    if not COMMIT.fullmatch(revision or ""):
        return (
            "wrong revision",
            f"{name} has the revision {revision!r}; name a whole commit (40 hex digits){now}",
        )
    return (
        "wrong revision",
        f"{name} has no commit {revision} on the hub{now}; correct the revision",
    )


def _main(question: _Question) -> str | None:
    """The commit that `main` is at; None where the hub does not say."""
    try:
        return question.api.repo_info(
            question.source.source, repo_type=question.kind, timeout=TIMEOUT
        ).sha
    except Exception:  # only an addition to a sentence that is right without it
        return None


# ---- what the cache has
def _without_hub(question: _Question, why: str, what: str) -> Answer:
    """The answer where the hub cannot be asked."""
    name, revision = question.source.source, question.source.revision
    if not COMMIT.fullmatch(revision or ""):
        return _wrong_revision(question, None)
    missing = _missing(question)
    if missing is None:
        return _cached(question, why)
    have = (
        f"the cached copy of {name} at {revision} lacks {missing}"
        if question.folder.is_dir()
        else f"no copy of {name} at {revision} is in the cache"
    )
    return "offline", f"{why}, and {have}; {what}, or give a local copy with path:"


def _cached(question: _Question, why: str) -> Answer:
    return (
        "cached",
        f"{question.source.source}: {why}; the cached copy at {question.source.revision} is used",
    )


def _missing(question: _Question) -> str | None:
    """What the cached copy lacks of the files that match, or else of what a model or a set is read
    from; None where it is whole.
    """
    names = {
        path.relative_to(question.folder).as_posix()
        for path in question.folder.rglob("*")
        if path.is_file()
    }
    if question.patterns:
        lost = (
            set(
                filter_repo_objects(
                    _tree(question), allow_patterns=question.patterns, ignore_patterns=NEVER
                )
            )
            - names
        )
        return min(lost) if lost else _unmatched(question.patterns, names)
    if question.kind == "dataset":
        return (
            None
            if any(Path(name).name not in ("README.md", ".gitattributes") for name in names)
            else "data"
        )
    if not names & {"config.json", "adapter_config.json"}:
        return "a configuration"
    if not any(name.endswith(".safetensors") for name in names):
        return "weights (safetensors)"
    return min(_shards(question.folder, names) - names, default=None)


def _shards(folder: Path, names: Iterable[str]) -> set[str]:
    """The files of weights that the cached indices name."""
    indices = [
        folder / name
        for name in names
        if "/" not in name and name.endswith(".safetensors.index.json")
    ]
    return {
        shard for index in indices for shard in json.loads(index.read_text())["weight_map"].values()
    }


def _tree(question: _Question) -> list[str]:
    """The names of the repository's files where the client has kept them: only fetching a whole
    snapshot keeps them.
    """
    try:
        kept = get_cached_repo_tree(
            question.source.source, repo_type=question.kind, revision=question.source.revision
        )
    except CachedRepoTreeNotFoundError:
        return []
    return [file.path for file in kept]


def _unmatched(patterns: Sequence[str], names: Iterable[str]) -> str | None:
    """The first pattern that no file matches which may be fetched."""
    names = list(names)
    return next(
        (
            each
            for each in patterns
            if not any(filter_repo_objects(names, allow_patterns=[each], ignore_patterns=NEVER))
        ),
        None,
    )


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
