"""What the header of a GGUF file says, and whether its model can be read as it is meant.

The format is that of ggml (docs/gguf.md of its repository): settings by name, then the tensors'
names, shapes, types and offsets, then their bytes. The header is read here without torch and
without the weights, so that a plan is quick.
"""

import mmap
import struct
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"
FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT_VALUE, ARRAY_VALUE = 8, 9
TOKENS = "tokenizer.ggml.tokens"
TABLE = "token_embd.weight"
OR_FOLDER = "give the model as a folder of safetensors"
INSTALL = "a GGUF file is read with the package gguf, which is not here; pip install gguf"
# How a byte-level vocabulary splits text where transformers has no pattern of that name and so
# takes GPT-2's: the vocabularies that were learned with it, and those that split digits besides,
# whose merges join none.
LIKE_GPT2 = (
    "gpt-2 mpt olmo jais phi-2 smollm starcoder refact command-r codeshell exaone minerva-7b"
).split()
# of these sizes of Gemma the scale of attention is another than of the rest, and not in the file
UNSAID_SCALES = {("gemma2", 46), ("gemma3", 62)}


@dataclass(frozen=True)
class Header:
    """A GGUF file's settings by name (of a list of texts only its length), and its tensors: the
    shape of each in torch's order, its ggml type, and the offset of its bytes in the file.
    """

    path: Path
    settings: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, ...], int, int]]

    @property
    def architecture(self) -> str:
        return str(self.settings.get("general.architecture", ""))

    def own(self, name: str, otherwise: Any = None) -> Any:
        """A setting of the architecture: `block_count` is `llama.block_count` of a Llama."""
        return self.settings.get(f"{self.architecture}.{name}", otherwise)

    @property
    def n_weights(self) -> int:
        """How many numbers the tensors hold."""
        return sum(prod(shape) for shape, *_ in self.tensors.values())


class _Cursor:
    """Values of a file, one after another; struct.error where it ends too early."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def numbers(self, kind: str, n: int = 1) -> tuple:
        found = struct.unpack_from(f"<{n}{kind}", self.data, self.at)
        self.at += struct.calcsize(f"<{n}{kind}")
        return found

    def number(self, kind: str) -> Any:
        return self.numbers(kind)[0]

    def text(self) -> bytes:
        length = self._room(self.number("Q"))
        self.at += length
        return self.data[self.at - length : self.at]

    def _room(self, length: int) -> int:
        if self.at + length > len(self.data):
            raise struct.error("a text is longer than the file")
        return length

    def value(self, kind: int) -> Any:
        if kind == TEXT_VALUE:
            return self.text().decode()
        if kind != ARRAY_VALUE:
            return self.number(FIXED[kind])
        of, n = self.number("I"), self.number("Q")
        if of in FIXED:
            return list(self.numbers(FIXED[of], self._room(n)))
        for _ in range(n):
            self.text() if of == TEXT_VALUE else self.value(of)
        return n

    def tensor(self) -> tuple[str, tuple[tuple[int, ...], int, int]]:
        name, n_dims = self.text().decode(), self.number("I")
        shape = tuple(reversed(self.numbers("Q", n_dims)))
        return name, (shape, *self.numbers("IQ"))


def read_header(path: Path) -> Header:
    """The header of a GGUF file, after a check that all its tensors' bytes are there.

    Raises:
        ValueError: it is no GGUF file, is cut off or damaged, or is of another version or byte
            order.
    """
    stat = path.stat()
    return _read(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=16)
def _read(path: Path, size: int, changed: int) -> Header:
    """Kept while the file is the same: a vocabulary of 262,144 tokens takes a quarter second."""
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ValueError(
                f"{path} is no GGUF file (it does not begin with GGUF); {OR_FOLDER}, or the GGUF"
                " file itself"
            )
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header, begin = _header(path, data)
        except (struct.error, KeyError, UnicodeDecodeError, OverflowError, MemoryError):
            raise ValueError(
                f"{path} is cut off or damaged in its header; fetch it again"
            ) from None
    missing = begin + _end(header) - size
    if missing > 0:
        raise ValueError(
            f"{path} is cut off: {missing:,} bytes of its tensors are missing; fetch it again, all"
            " its parts where it has several"
        )
    return header


def _header(path: Path, data: mmap.mmap) -> tuple[Header, int]:
    """The header, and where the tensors' bytes begin."""
    cursor = _Cursor(data)
    cursor.at = len(MAGIC)
    version = cursor.number("I")
    if version not in (2, 3):
        other = "of a big-endian machine" if version > 0xFFFF else f"of version {version}"
        raise ValueError(f"{path} is a GGUF file {other}, and 2 and 3 are read; convert it again")
    n_tensors, n_settings = cursor.numbers("Q", 2)
    settings = {}
    for _ in range(n_settings):
        name, kind = cursor.text().decode(), cursor.number("I")
        settings[name] = cursor.value(kind)
    tensors = dict(cursor.tensor() for _ in range(n_tensors))
    align = settings.get("general.alignment", 32)
    return Header(path, settings, tensors), -(-cursor.at // align) * align


def _end(header: Header) -> int:
    """Where the last tensor's bytes end, counted from where the first's begin."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        raise ValueError(f"{INSTALL}, or {OR_FOLDER}") from None
    sizes = {int(kind): GGML_QUANT_SIZES[kind] for kind in GGMLQuantizationType}
    end = 0
    for name, (shape, kind, offset) in header.tensors.items():
        if kind not in sizes:
            raise ValueError(
                f"{header.path}: {name} is stored in a form ({kind}) that the package gguf does not"
                f" know; upgrade it, or {OR_FOLDER}"
            )
        block, width = sizes[kind]
        end = max(end, offset + prod(shape) // block * width)
    return end


def check_readable(path: Path) -> Header:
    """The header of a GGUF file whose model transformers reads as it is meant.

    Raises:
        ValueError: it is no GGUF file, no language model, or one that would be read wrongly.
    """
    header = read_header(path)
    if wrong := _no_language_model(header) or _misread(header) or _wrong_words(header):
        raise ValueError(f"{path} {wrong}")
    return header


def _no_language_model(header: Header) -> str | None:
    kind, pieces = header.settings.get("general.type"), header.settings.get("split.count", 1)
    arch = header.architecture
    if kind == "mmproj" or arch in ("clip", "mmproj"):
        return "is a projector (mmproj), which turns images into a model's input; give the GGUF" + (
            " file of the language model itself"
        )
    if kind == "adapter" or "adapter.type" in header.settings:
        return "is an adapter and no base model; give the GGUF file of a whole model"
    if pieces > 1:
        return f"is one of {pieces} pieces; join them with llama-gguf-split --merge"
    embeds = header.own("pooling_type") or header.own("attention.causal") is False
    if embeds or any(word in arch for word in ("bert", "embedding", "t5encoder")):
        return f"is an embedding model ({arch}) and answers nothing; give a causal language model"
    if TABLE not in header.tensors:
        return "holds no weights of a language model (no token_embd.weight); give the whole file"
    return None


def _misread(header: Header) -> str | None:
    """What transformers would leave out in silence."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

    arch = header.architecture
    known = {*GGUF_CONFIG_MAPPING, *GGUF_CONFIG_ARCHS} - {"general", "tokenizer", "t5", "umt5"}
    # its names of four of them are not those of the format
    if arch not in known and arch.replace("-", "_").replace("moe", "_moe") not in known:
        return f"is of the architecture {arch!r}, which transformers cannot read from GGUF; " + (
            OR_FOLDER
        )
    if factors := next((name for name in header.tensors if name.startswith("rope_f")), None):
        return (
            f"holds {factors} (scaled rotary positions), which transformers does not read from"
            + (f" GGUF: its numbers would be wrong; {OR_FOLDER}")
        )
    scaling = header.own("rope.scaling.type", "none")
    if scaling != "none" and arch not in (*GGUF_CONFIG_ARCHS, "gpt-oss"):
        return f"scales its rotary positions ({scaling}), which transformers does not read from" + (
            f" GGUF: its numbers would be wrong; {OR_FOLDER}"
        )
    if (arch, header.own("block_count")) in UNSAID_SCALES:
        return f"is a {arch} whose scale of attention GGUF does not hold; {OR_FOLDER}"
    return None


def _wrong_words(header: Header) -> str | None:
    """What would make other tokens of a text than the model was trained on."""
    kind, split = (header.settings.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind is None or TOKENS not in header.settings:
        return f"holds no tokenizer; give the whole model's GGUF file, or {OR_FOLDER[5:]}"
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_PRE_TOKENIZER_SPLITS,
        GGUF_TOKENIZER_TYPES,
    )

    if kind not in GGUF_TOKENIZER_TYPES:
        return f"has a tokenizer of the kind {kind!r}, which transformers cannot read; {OR_FOLDER}"
    if kind == "gpt2" and split not in (*GGUF_PRE_TOKENIZER_SPLITS, *LIKE_GPT2):
        how = f"in the way {split!r}, which" if split else "in a way that it does not say, so"
        return f"splits text {how} transformers would split otherwise; {OR_FOLDER}"
    return None
