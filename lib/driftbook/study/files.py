"""Paths of the project, content hashes, and writes that are whole or not there."""

import hashlib
import json
import math
import os
import platform
import re
import shutil
import tempfile
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(os.environ.get("DRIFTBOOK_ROOT", Path(__file__).resolve().parents[3]))
VARIABLE = re.compile(r"\$\{(\w+)\}")
WRITTEN = "DRIFTBOOK_WRITTEN"  # names the file in which a job's written files are listed
# names of variables that hold what no sentence may show, and so no path
SECRET = re.compile(
    r"TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|(?<![A-Z])(API_?)?KEY|_KEY|AUTH(?!OR)", re.I
)
OUTPUTS = Path(os.environ.get("DRIFTBOOK_OUTPUTS", ROOT / "outputs")).resolve()


def private_folder(path: Path) -> Path:
    """The folder, made where it is missing, that nobody but its owner may enter (mode 0700): what
    models said to safety prompts may come to lie in it.

    Raises:
        ValueError: it is another user's, and open.
    """
    _made(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    try:
        if path.stat().st_mode & 0o077:
            path.chmod(0o700)
    except PermissionError:
        raise ValueError(
            f"{path} is another user's and open to others; choose another folder of outputs with"
            " DRIFTBOOK_OUTPUTS"
        ) from None
    return path


def users_folder(name: str) -> Path:
    """A private folder for the user's locks on this machine, the same for all checkouts; below the
    outputs where the user has no home of their own that can be written.
    """
    with suppress(OSError, RuntimeError, ValueError):
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = private_folder(home / "driftbook" / f"{name}-{platform.node()}")
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
            return folder
    return private_folder(OUTPUTS / f".{name}-{platform.node()}")


def _made(folder: Path) -> int:
    """Make a folder and those above it, each as open to others as the one that holds it; how open
    the folder is, as the bits of its mode.
    """
    if not folder.is_dir():
        folder.mkdir(mode=_made(folder.parent), exist_ok=True)
    return 0o700 | (folder.stat().st_mode & 0o777)


SETTLED = 2_000_000_000  # nanoseconds after which a change would show in a file's times
_DIGESTS: dict[tuple[int, ...], str] = {}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` when the block ends without an error; in a
    folder of its own, so that who lists files of that kind meanwhile does not see it. It is never
    more open to others than the folder, nor than the umask says.
    """
    mode = _made(path.parent)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=".new-"))
    new = folder / path.name
    try:
        new.touch()
        new.chmod(new.stat().st_mode & mode)
        yield new
        os.replace(new, path)
        if written := os.environ.get(WRITTEN):
            with open(written, "a", encoding="utf-8") as names:
                names.write(f"{path.absolute()}\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends without error, as
    open to others as the folder that holds it.
    """
    mode = _made(path.parent)
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=".new-"))
    folder = scratch / path.name
    try:
        folder.mkdir(mode=mode)
        yield folder
        shutil.rmtree(path, ignore_errors=True)
        os.replace(folder, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all."""
    with replacing(path) as new:
        new.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        ValueError: the file is torn or is no JSON; the sentence names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON, or of its letters
        why = not_the_file(path) or f"it is damaged ({error}); {remedy_of(path)}"
        raise ValueError(f"{path}: {why}") from None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: the file is torn, or holds anything else; the sentence names it.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise ValueError(f"{path}: it holds a {kind} and no object; {remedy_of(path)}")
    return found


def digest(value: Any, length: int = 16) -> str:
    """The first `length` hex digits of the SHA-256 of a JSON value, with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


def file_digest(path: Path) -> str | None:
    """SHA-256 of a file's bytes, 32 hex digits; None where there is no file. A file that has not
    changed since this process read it is not read again.
    """
    if not path.is_file():
        return None
    found = path.stat()
    state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    if state in _DIGESTS:
        return _DIGESTS[state]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
    if time.time_ns() - found.st_ctime_ns > SETTLED:  # else it may change within one tick
        _DIGESTS[state] = digest
    return digest


def folder_digest(folder: Path, pattern: str = "*") -> str:
    """One hash of the names and bytes of all files in a folder (or of one file)."""
    if folder.is_file():
        return str(file_digest(folder))
    files = sorted(
        path for path in folder.rglob(pattern) if path.is_file() and not path.name.startswith(".")
    )
    if not files:
        raise ValueError(f"{folder} has no files; it is empty or does not exist")
    return digest({str(path.relative_to(folder)): file_digest(path) for path in files}, 32)


def remedy_of(path: Path) -> str:
    """What to do about a damaged file: only what is made here is deleted, never a user's own."""
    made_here = path.resolve().is_relative_to(OUTPUTS)
    return f"delete {path} and run again" if made_here else "copy or fetch the file again"


def first_bytes(path: Path, n: int = 512) -> bytes:
    """The first n bytes of a file; none where it is no file or cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(n)
    except OSError:
        return b""


def not_the_file(path: Path) -> str | None:
    """What stands in a file's place, with the way out: a pointer of git-lfs, or a web page."""
    head = first_bytes(path).lstrip()
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return (
            f"{path.name} is a pointer of git-lfs and not the file itself; fetch the file with git"
            " lfs pull"
        )
    if head[:15].lower().startswith((b"<!doctype html", b"<html")):
        return (
            f"{path.name} is a web page and not the file; download it again, logged in if need be"
        )
    return None


def check_safetensors(path: Path, remedy: str) -> None:
    """Raise a ValueError where a file of weights is another file than it should be, or is torn: its
    header cannot be read, or names more bytes than there are.
    """
    if why := not_the_file(path):
        raise ValueError(f"{path}: {why}")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is torn ({error}); {remedy}") from None


def check_path(path: Path, what: str) -> None:
    """Raise a ValueError where a path has a character that Snakemake or a log cannot carry; spaces,
    quotation marks, $ and letters of any script are fine.
    """
    if (mark := strange_mark(str(path))) is not None:
        raise ValueError(f"{what} {str(path)!r} has the character {mark!r}; rename it")


def strange_mark(name: str) -> str | None:
    """The first brace, control character, line break or undecodable byte in a name, else None."""
    kinds = ("Cc", "Cs", "Zl", "Zp")
    return next((one for one in name if one in "{}" or unicodedata.category(one) in kinds), None)


def expanded(path: str) -> str | None:
    """A path with every ${NAME} replaced by that environment variable; None where one is not set or
    empty. Any other $ is part of the path.

    Raises:
        ValueError: by its name a variable holds a secret.
    """
    values = [os.environ.get(name) for name in _variables(path)]
    return VARIABLE.sub(lambda _: values.pop(0), path) if all(values) else None


def unset_variables(path: str) -> list[str]:
    """The environment variables in a path that are not set, or empty."""
    return [name for name in _variables(path) if not os.environ.get(name)]


def _variables(path: str) -> list[str]:
    names = VARIABLE.findall(path)
    if secret := next(filter(SECRET.search, names), None):
        raise ValueError(f"${{{secret}}} holds a secret by its name and is no part of a path")
    return names


def check_writable(folder: Path, need_bytes: int = 0) -> None:
    """Raise a ValueError where `folder` cannot be written or has too little room."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(
            f"cannot write to {folder}: {error.strerror}; make room or choose another folder with"
            " DRIFTBOOK_OUTPUTS"
        ) from None
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise ValueError(
            f"{folder} has {free / 1e9:.1f} GB free and this study needs about"
            f" {need_bytes / 1e9:.1f} GB; make room"
        )


def finite(value: float | None) -> float | None:
    """The number, or None where it is none or not finite: JSON has no other."""
    return None if value is None or not math.isfinite(value) else float(value)
