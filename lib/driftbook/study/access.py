"""Whether the models and sets that a study names on the Hugging Face hub can be had, said in one
sentence each, and fetching their files.

A whole commit names content that cannot change, so its cached copy is as good as the hub's; a
branch does not. No sentence repeats an error of the hub or of its client: it may hold the token.
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
from huggingface_hub import HfApi, constants, errors, get_cached_repo_tree, snapshot_download
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import (
    build_hf_headers,
    filter_repo_objects,
    get_session,
    hf_raise_for_status,
    validate_repo_id,
)

from driftbook.study.gguf_files import check_readable
from driftbook.study.sections import Source
from driftbook.study.sources import gguf_file

Kind = Literal["model", "dataset"]
OK = ("local", "made here", "cached", "reachable", "not checked")
STATES = (*OK, "gated", "no token", "unknown", "wrong revision", "wrong file", "offline")
COMMIT = re.compile(r"[0-9a-f]{40}")
TIMEOUT = 5.0  # seconds, of each of at most two requests
# files that run code when they are loaded
NEVER = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.py")
LISTED = 1000  # files of a repository above which the hub's short listing may be cut
SIGN_IN = "sign in with `hf auth login` or set HF_TOKEN"
APPROVAL = "(manual approval can take days)"
OR_LOCAL = "or give a local copy with path:"
HEX_PHI = "LLM-Tuning-Safety/HEx-PHI"
HEX_PHI_NOTE = "; its own licence must be accepted there, and it has 300 prompts today"
Answer = tuple[str, str]  # a state and its sentence


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


def check(
    source: Source, kind: Kind, endpoint: str | None = None, token: str | None = None
) -> Access:
    """Whether a source can be had, found by at most two short requests and without a download."""
    answer = _not_on_hub(source, kind) or _ask(source, kind, source.files, endpoint, token)[0]
    return Access(source.source, kind, *answer)


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
        except Exception as error:  # must not hide what is known of the other sources
            said = f"{source.source} cannot be checked ({type(error).__name__}); correct its entry"
            found = Access(source.source, kind, "unknown", said)
        return name, kind, source.source, source.revision, found.state, found.ok, found.sentence

    with ThreadPoolExecutor(max(1, workers)) as pool:
        rows = list(pool.map(row, sources))
    columns = ["name", "kind", "source", "revision", "state", "ok", "sentence"]
    return pd.DataFrame(rows, columns=columns).astype({"ok": bool})


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
    if answer := _not_on_hub(source, kind):
        if answer[0] == "local":
            return source.local
        elsewhere = f"{source.source} is not on the hub; sources.locate finds it"
        raise ValueError(elsewhere if answer[0] in OK else answer[1])
    (state, sentence), asked = _ask(source, kind, patterns, endpoint, token)
    if state not in OK:
        raise ValueError(sentence)
    failure = asked.download() if state == "reachable" else None
    if missing := asked.missing():
        raise ValueError(asked.unfetched(missing, failure))
    if failure:
        state, sentence = asked.cached(f"{asked.hub} failed ({failure})")
    if state == "cached":
        warnings.warn(sentence, stacklevel=2)
    return asked.folder


def _not_on_hub(source: Source, use: Kind) -> Answer | None:
    """The answer for a source that needs no request; None for one on the hub."""
    name, kind = source.source, source.source.partition(":")[0]
    if source.local is not None and not os.path.exists(source.local):
        path = source.path or name
        gone = f"the path {path} does not exist ({source.local}); correct or remove it"
        return "wrong file", f"{name}: {gone}"
    try:
        if use == "model" and (file := gguf_file(source, fetch=False)):
            check_readable(file)
            return "local", f"{name} is read from the GGUF file {file}"
    except ValueError as error:
        return "wrong file", str(error)
    if source.local is not None:
        return "local", f"{name} is read from {source.local}"
    if kind == "package":
        return "not checked", f"{name} is fetched from the package registry when it is used"
    if kind in ("miniature", "random"):
        return "made here", f"{name} is made by notebook 01_prepare"
    if kind == "twin":
        return "made here", f"{name} is tuned by notebook 01_prepare"
    if kind != "github":
        return None
    if source.revision:
        when = f"at the commit {source.revision} when it is used"
        return "not checked", f"{name} is fetched from GitHub {when}"
    return "wrong revision", f"{name} needs a revision; name a commit of its repository on GitHub"


def _ask(
    source: Source, kind: Kind, patterns: Sequence[str], endpoint: str | None, token: str | None
) -> tuple[Answer, "_Hub | None"]:
    """The answer for a source on the hub, and the hub as it was asked."""
    if kind not in ("model", "dataset"):
        raise ValueError(f"kind={kind!r}; expected model or dataset")
    name = source.source
    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        if source.unset:
            return ("unknown", f"{name} cannot be had: {source.unset}; set it"), None
        wrong = f"{name} is no name on the hub, OWNER/NAME; correct it, {OR_LOCAL}"
        return ("unknown", wrong), None
    endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
    hub = _Hub(source, kind, tuple(patterns), endpoint)
    if constants.is_offline_mode():
        return hub.offline("HF_HUB_OFFLINE is set", "unset it"), hub
    try:
        hub = _Hub(source, kind, tuple(patterns), endpoint, _token(token))
    except ValueError as error:
        return ("no token", f"{name} is not looked up: {error}; {SIGN_IN} again"), hub
    try:
        return hub.ask(), hub
    except Exception as error:  # a page that is not the hub's makes the client raise anything
        failure = error
    return hub.failed(failure), hub


def _token(token: str | None) -> str | Literal[False]:
    """The token that the client would send, checked: the client's own error for one that no header
    can hold repeats it. False where there is none, so that the client looks for no other.
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


@dataclass(frozen=True)
class _Hub:
    """The hub, asked for one source by one user."""

    source: Source
    kind: Kind
    patterns: tuple[str, ...]
    endpoint: str
    token: str | Literal[False] = field(default=False, repr=False)

    @property
    def hub(self) -> str:
        """The hub's name in a sentence: without the user and password that an address may hold."""
        return f"the hub at {urlsplit(self.endpoint).netloc.rpartition('@')[2]}"

    @property
    def page(self) -> str:
        kind = "datasets/" * (self.kind == "dataset")
        return f"https://huggingface.co/{kind}{self.source.source}"

    @property
    def folder(self) -> Path:
        """Where the client keeps the files at the revision."""
        name = repo_folder_name(repo_id=self.source.source, repo_type=self.kind)
        cache = Path(constants.HF_HUB_CACHE).expanduser().resolve()
        return cache / name / "snapshots" / self.source.revision

    # ---- what the hub says
    def ask(self) -> Answer:
        """The answer when all is well with the network; raises errors of the hub and its client."""
        name, revision = self.source.source, self.source.revision
        if not COMMIT.fullmatch(revision or ""):
            return self.wrong_revision(self._info(None).sha)
        info = self._info(revision)
        if info.sha not in (None, revision):  # a mirror that gives what it has
            return self.wrong_revision(None)
        if info.gated:  # its files are listed for everyone
            self._check_gate()
        listing = [sibling.rfilename for sibling in info.siblings or ()]
        missing = _unmatched(self.patterns, listing) if 0 < len(listing) <= LISTED else None
        if missing is None:
            return "reachable", f"{name} is on the hub at {revision} and open to you"
        more = f" and {len(listing) - 5} more" if len(listing) > 5 else ""
        has = f"has no {missing} at {revision} that may be fetched, only {', '.join(listing[:5])}"
        return "wrong file", f"{name} {has}{more}; correct the names of the files"

    def _info(self, revision: str | None):
        api = HfApi(endpoint=self.endpoint, token=self.token)
        asked = {"repo_type": self.kind, "revision": revision, "timeout": TIMEOUT}
        return api.repo_info(self.source.source, **asked)

    def _check_gate(self) -> None:
        """Raise the hub's error where a gated repository is not open to us. HfApi.auth_check asks
        the same without a time limit, and so would wait for ever.
        """
        address = f"{self.endpoint}/api/{self.kind}s/{self.source.source}/auth-check"
        headers = build_hf_headers(token=self.token)
        response = get_session().get(address, headers=headers, timeout=TIMEOUT)
        if response.status_code != 404:  # a mirror may not know the question
            hf_raise_for_status(response)

    def failed(self, error: Exception) -> Answer:
        """The answer for an error of the hub, or of its client."""
        match error:
            case errors.OfflineModeIsEnabled():
                return self.offline("HF_HUB_OFFLINE is set", "unset it")
            case errors.GatedRepoError():  # before RepositoryNotFoundError, of which it is one
                return self._gated()
            case errors.RevisionNotFoundError():
                return self.wrong_revision(self._main())
            case errors.DisabledRepoError():
                what = f"{self.source.source} was disabled, see {self.page}"
                return "unknown", f"{what}; name another source, {OR_LOCAL}"
            case errors.RepositoryNotFoundError():
                return self._not_found()
            case errors.HfHubHTTPError():
                return self._refused(error.response.status_code)
        kind = type(error).__name__
        if isinstance(error, errors.HTTPError):
            return self.offline(f"{self.hub} does not answer ({kind})", "go online")
        proxy = "look for a proxy or a sign-in page"
        return self.offline(f"{self.hub} answers like no hub ({kind})", proxy)

    def _refused(self, status: int) -> Answer:
        """The answer for a status of HTTP that the client has no error of its own for."""
        if status == 401 and self.token:
            why = f"refuses your token for {self.source.source} (it may have expired)"
            return "no token", f"{self.hub} {why}; {SIGN_IN} again"
        if status == 403:
            see = f"see {self.page}, and the permissions of your token"
            return "gated", f"{self.hub} forbids your access to {self.source.source}; {see}"
        if status in (400, 401, 404):
            return self._not_found()
        return self.offline(f"{self.hub} answers with the error {status}", "try again later")

    def _gated(self) -> Answer:
        name = self.source.source
        note = HEX_PHI_NOTE if name == HEX_PHI else ""
        if not self.token:
            ask = f"and ask for access at {self.page} {APPROVAL}"
            return "no token", f"{name} is gated: {SIGN_IN}, {ask}{note}"
        ask = f"ask for it at {self.page} {APPROVAL}"
        token = "let a fine-grained token read gated repositories"
        return "gated", f"{name} is gated and your token has no access: {ask}, and {token}{note}"

    def _not_found(self) -> Answer:
        expired = "your token does not open it (it may have expired)"
        private = expired if self.token else f"you are not signed in: {SIGN_IN}"
        what = f"no {self.kind} {self.source.source} is on the hub: correct the name"
        return "unknown", f"{what}; or it is private and {private}"

    def wrong_revision(self, main: str | None) -> Answer:
        """The answer for a revision that is no commit of the repository."""
        name, revision = self.source.source, self.source.revision
        now = f", main is at {main} now" if main else ""
        if COMMIT.fullmatch(revision or ""):
            wrong = f"{name} has no commit {revision} on the hub{now}; correct the revision"
        else:
            whole = "name a whole commit (40 hex digits)"
            wrong = f"{name} has the revision {revision!r}; {whole}{now}"
        return "wrong revision", wrong

    def _main(self) -> str | None:
        """The commit that `main` is at; None where the hub does not say."""
        try:
            return self._info(None).sha
        except Exception:  # the sentence is right without it
            return None

    # ---- what the cache has
    def offline(self, why: str, what: str) -> Answer:
        """The answer where the hub cannot be asked."""
        name, revision = self.source.source, self.source.revision
        if not COMMIT.fullmatch(revision or ""):
            return self.wrong_revision(None)
        missing = self.missing()
        if missing is None:
            return self.cached(why)
        have = f"no copy of {name} at {revision} is in the cache"
        if self.folder.is_dir():
            have = f"the cached copy of {name} at {revision} lacks {missing}"
        return "offline", f"{why}, and {have}; {what}, {OR_LOCAL}"

    def cached(self, why: str) -> Answer:
        used = f"the cached copy at {self.source.revision} is used"
        return "cached", f"{self.source.source}: {why}; {used}"

    def missing(self) -> str | None:
        """What the cached copy lacks of the files that match, or else of what a model or a set is
        read from; None where it is whole.
        """
        files = (path for path in self.folder.rglob("*") if path.is_file())
        names = {path.relative_to(self.folder).as_posix() for path in files}
        if self.patterns:
            lost = set(_matching(self._tree(), self.patterns)) - names
            return min(lost) if lost else _unmatched(self.patterns, names)
        if self.kind == "dataset":
            about = ("README.md", ".gitattributes")
            return None if any(Path(name).name not in about for name in names) else "data"
        if not names & {"config.json", "adapter_config.json"}:
            return "a configuration"
        if not any(name.endswith(".safetensors") for name in names):
            return "weights (safetensors)"
        indices = map(Path.read_text, self.folder.glob("*.safetensors.index.json"))
        shards = {name for text in indices for name in json.loads(text)["weight_map"].values()}
        return min(shards - names, default=None)

    def _tree(self) -> list[str]:
        """The repository's files as the client has listed them: it does so when it fetches a whole
        snapshot.
        """
        where = {"repo_type": self.kind, "revision": self.source.revision}
        try:
            return [file.path for file in get_cached_repo_tree(self.source.source, **where)]
        except errors.CachedRepoTreeNotFoundError:
            return []

    # ---- fetching
    def download(self) -> str | None:
        """What went wrong when the files were fetched into the cache; None where nothing did."""
        wanted = {"allow_patterns": list(self.patterns) or None, "ignore_patterns": list(NEVER)}
        where = {"repo_type": self.kind, "revision": self.source.revision}
        client = {"endpoint": self.endpoint, "token": self.token, "etag_timeout": TIMEOUT}
        try:
            snapshot_download(self.source.source, **where, **wanted, **client)
        except Exception as error:  # one of a dozen kinds: each means that files may be missing
            if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
                error = error.__cause__  # why the client looked in the cache
            return getattr(error, "strerror", None) or type(error).__name__
        return None

    def unfetched(self, missing: str, failure: str | None) -> str:
        """The sentence for a file that is not there after all that could be fetched was."""
        name = f"{self.source.source} at {self.source.revision}"
        if failure is None:
            return f"{name} has no {missing} that may be fetched; correct the names of the files"
        why = f"cannot be fetched whole from {self.hub} ({failure}): {missing} is missing"
        return f"{name} {why}; try again, {OR_LOCAL}"


def _matching(names: Iterable[str], patterns: Sequence[str]) -> Iterable[str]:
    return filter_repo_objects(names, allow_patterns=list(patterns), ignore_patterns=list(NEVER))


def _unmatched(patterns: Sequence[str], names: Iterable[str]) -> str | None:
    """The first pattern that no file matches which may be fetched."""
    names = list(names)
    return next((each for each in patterns if not any(_matching(names, [each]))), None)
