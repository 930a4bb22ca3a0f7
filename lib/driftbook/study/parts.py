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


Method = Literal[METHODS[1:]]
Rate = Annotated[float, BeforeValidator(as_number), Field(gt=0, lt=1)]
Count = Annotated[int, Strict(), Field(ge=1)]
Seed = Annotated[int, Strict(), Field(ge=0)]
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
