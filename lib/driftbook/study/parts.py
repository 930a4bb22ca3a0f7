"""What the sections of a study file are made of: checked values, and sources."""

import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    model_validator,
)

from driftbook.study import packages
from driftbook.study.files import ROOT, expanded, unset_variables
from driftbook.study.methods import METHODS


def as_number(value: Any) -> float:
    """The value; text that YAML did not read as a number is refused."""
    if isinstance(value, str):
        raise ValueError(f"{value!r} is text to YAML; write it with a point and a sign, as 1.0e-3")
    return value


NAME = re.compile(r"\w([\w .,()+-]*[\w)+])?")
LONGEST_NAME = 60  # bytes: three of them and the settings are one name of a folder, of at most 255


def check_name(name: str) -> str:
    """The name that a study file gives to one of its parts, checked. It may become the name of a
    file, a word of a command, of a table and of a page, so no sign that means something there is
    in it.

    Raises:
        ValueError: it has another sign, or is too long.
    """
    if NAME.fullmatch(name) and len(name.encode()) <= LONGEST_NAME:
        return name
    signs = "letters, digits, spaces and _ - + . , ( ), with a letter or digit first"
    raise ValueError(
        f"{name[:80]!r} is no name; a name has {signs}, and at most {LONGEST_NAME} bytes"
    )


Method = Literal[METHODS[1:]]
Name = Annotated[str, Strict(), AfterValidator(check_name)]
Rate = Annotated[float, BeforeValidator(as_number), Field(gt=0, lt=1)]
Count = Annotated[int, Strict(), Field(ge=1)]
Seed = Annotated[int, Strict(), Field(ge=0, lt=2**32)]  # numpy takes no larger one
Text = Annotated[str, Strict(), Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Points = Annotated[float, Field(gt=0, le=100)]  # percentage points
Dtype = Literal["float32", "bfloat16"]


class Part(BaseModel):
    """A section of a study file: every key is declared, and nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Source(Part):
    """Where something comes from: a public source at a revision, or a local path that overrides it.

    `source` is `miniature:NAME` (made by notebook 01), `random:FAMILY` (random weights, made by
    notebook 01), `github:OWNER/REPO/FOLDER`, or a name on the Hugging Face hub. `revision` is a
    whole commit. A `path` may hold environment variables, as ${NAME}; it is ignored where one is
    not set. Where there is a `path` alone, it is the source too.

    Of a model, `path` is a folder of safetensors or a GGUF file, and `source` may be such a path
    too, or `twin:NAME`, a twin of a base model that notebook 01 makes. A source may also be a file
    that a package ships (of a model a GGUF file): `package:NAME==VERSION/FILE`, with ` + ` between
    its packages where it has parts (packages.py); its `revision`, where given, is the SHA-256 of
    the file, of which at least the first 16 digits.
    """

    is_model: ClassVar[bool] = True
    source: Text
    revision: Text | None = None
    files: tuple[Text, ...] = ()
    sha256: dict[str, Text] = {}
    path: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _path_is_source(cls, content: Any) -> Any:
        if isinstance(content, dict) and content.get("path") and "source" not in content:
            return {"source": content["path"], **content}
        return content

    @model_validator(mode="after")
    def _stays_in_its_folder(self) -> Self:
        """What it names becomes part of a path, below the folder where it is made or fetched;
        and no path holds a secret.
        """
        unset_variables(self.path or self.source)
        named = [*self.files, *self.sha256, self.revision or ""]
        if self._own_path is None:
            named.append(self.source.partition(":")[2])
        for one in named:
            if one.startswith(("/", "~")) or ".." in re.split(r"[/\\\s]", one):
                raise ValueError(f"{one!r} leads out of its folder; name what is in it")
        return self

    @model_validator(mode="after")
    def _package_is_named(self) -> Self:
        if self.source.startswith(packages.PREFIX):
            if self.is_model != packages.shipped(self.source).is_model:
                form = "a model is a GGUF file, and data are none"
                raise ValueError(f"{self.source} is the wrong kind of file: {form}")
            if not re.fullmatch(r"[0-9a-f]{16,64}", self.revision or "0" * 16):
                known = "the revision of a package's file is its SHA-256, 16 to 64 hex digits"
                raise ValueError(f"revision = {self.revision!r}; {known}")
        return self

    @cached_property
    def local(self) -> Path | None:
        """The local path of the source, or that overrides it; None where there is none or its
        environment variable is not set.
        """
        path = self.path or self._own_path
        path = None if path is None else expanded(path)
        return None if path is None else (ROOT / Path(path).expanduser()).resolve()

    @property
    def unset(self) -> str:
        """In words the environment variables that its path needs and that are not set; "" where
        there is none.
        """
        path = self.path or self._own_path or ""
        names = " and ".join(unset_variables(path))
        return (
            f"its path {path} needs {names}, which the environment does not have" if names else ""
        )

    @property
    def _own_path(self) -> str | None:
        """The source itself where it is a path: no name on the hub begins so, or ends so."""
        is_path = self.source.startswith(("/", "./", "../", "~/", "$"))
        is_file = self.source.lower().endswith(".gguf") and ":" not in self.source
        return self.source if is_path or is_file else None


def _in_order(rows: tuple[int, int]) -> tuple[int, int]:
    if rows[0] >= rows[1]:
        raise ValueError(f"{list(rows)} holds no row; write [first, one after the last], from 0")
    return rows


Rows = Annotated[tuple[Seed, Count], AfterValidator(_in_order)]  # from the first, before the second
