"""Text files, read as their formats say: nothing is lost or changed in silence, and an error names
the file and the line.

Every text is UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    import pandas as pd  # imported where it is needed: who only names a model waits for neither

MERGE = "tag:yaml.org,2002:merge"
DELIMITERS = ",;\t"
LONGEST_WORD = 40  # characters
MOST_NODES = 1_000_000  # values of a study file; the largest here has some hundreds
LONGEST_FIELD = 2**31 - 1  # characters; csv itself stops at 131,072


def in_short(value: Any) -> str:
    """A column, an id or a word of a file, for a sentence; its length alone where it may be the
    text of a prompt, which no sentence shows (columns may be swapped, or a header missing).
    """
    text = str(value)
    is_text = len(text) > LONGEST_WORD or len(text.split()) > 3
    return f"a text of {len(text)} characters" if is_text else repr(text)


def columns_of(names: Iterable[Any]) -> str:
    """The columns of a file, for a sentence."""
    return ", ".join(in_short(name).strip("'") for name in names)


def utf8_text(path: Path) -> str:
    """The text of a file, its line ends as they are.

    Raises:
        ValueError: it is not UTF-8.
    """
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: line {line} is not UTF-8; save the file as UTF-8") from None


# ---- JSON
def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The number of each line that is not blank, from 1, and the JSON value in it.

    Lines end at a line feed only: JSON allows U+2028, U+2029 and U+0085 within a text.

    Raises:
        ValueError: a line is no JSON, or has an object with a repeated key.
    """
    for number, line in enumerate(utf8_text(path).split("\n"), 1):
        if line.strip(" \t\r"):
            yield number, _parsed(line, f"{path}: line {number}")


def json_value(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        ValueError: it is no JSON, or has an object with a repeated key.
    """
    return _parsed(utf8_text(path), str(path))


def json_rows(path: Path) -> list[Any]:
    """The rows of a file of JSON lines (.jsonl) or of one JSON list (any other name).

    Raises:
        ValueError: see `json_lines` and `json_value`, or the value is no list.
    """
    if path.suffix == ".jsonl":
        return [row for _, row in json_lines(path)]
    rows = json_value(path)
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds no list of rows; write it as [...], or as .jsonl")
    return rows


def line_rows(path: Path) -> list[dict[str, str]]:
    """The lines of a text file that are not empty, each as a row with the one column `prompt`.

    Raises:
        ValueError: it is not text in UTF-8.
    """
    return [{"prompt": line} for line in utf8_text(path).splitlines() if line.strip()]


def table_frame(path: Path) -> pd.DataFrame:
    """The rows of a parquet, CSV, JSON or JSON lines file, by the end of its name, as a table whose
    values are as they are written.

    Raises:
        ValueError: it cannot be read as what its name says.
    """
    import pandas as pd

    if path.suffix == ".csv":
        return csv_frame(path)
    if path.suffix != ".parquet":
        rows = json_rows(path)
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path} holds rows that are no JSON objects; name their columns")
        return pd.DataFrame(rows, dtype=object)
    try:
        return pd.read_parquet(path)
    except (ValueError, OSError) as error:
        said = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be read ({said}); fetch it again") from None


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is torn or no JSON ({error}); fetch the file again") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {in_short(twice)} twice; keep one of them")
    return made


# ---- CSV
def csv_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file by column, every field as the text that it is; blank rows are skipped.

    Fields are separated by commas, or by semicolons or tabs where the header has no comma.

    Raises:
        ValueError: a column is named twice, a row has more or fewer fields than the header, or a
            quotation mark is not closed.
    """
    header, rows = _csv(path)
    return [dict(zip(header, row, strict=True)) for row in rows]


def csv_frame(path: Path) -> pd.DataFrame:
    """What `csv_rows` reads, as a table of texts: no NA, null or 007 is taken for something else.

    Raises:
        ValueError: see `csv_rows`.
    """
    import pandas as pd

    header, rows = _csv(path)
    return pd.DataFrame(rows, columns=header, dtype=str)


def _csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a CSV file."""
    text = utf8_text(path)
    first = text.partition("\n")[0]
    delimiter = next((mark for mark in DELIMITERS if mark in first), ",")
    rows = list(numbered_rows(text, path, delimiter))
    if not rows:
        return [], []
    header = rows[0][1]
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise ValueError(f"{path} has the column {in_short(twice[0])} twice; rename or remove one")
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise ValueError(
                f"{path}: line {line} has {len(row)} fields and the header has {len(header)}; put"
                f" a text that holds {delimiter!r} or a line break in quotation marks"
            )
    return header, [row for _, row in rows[1:]]


def numbered_rows(text: str, path: Path, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV text that are not blank, each with the number of the line it begins in.

    Raises:
        ValueError: a quotation mark is not closed, or stands where none may.
    """
    csv.field_size_limit(LONGEST_FIELD)
    reader, line = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), 1
    try:
        for row in reader:
            if any(row):
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}: the row that begins in line {line} is no CSV ({error}); put the text in"
            " quotation marks and double those within it"
        ) from None


# ---- YAML
def yaml_value(path: Path) -> Any:
    """The value in a YAML file.

    Raises:
        ValueError: it is no YAML, or a mapping has a key twice, of which YAML would keep the last.
    """
    loader = yaml.SafeLoader(utf8_text(path))
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_keys(loader, node, path, "", set())
        if (n := _expanded(node, {})) > MOST_NODES:
            raise ValueError(f"{path.name} has aliases that stand for {n:,} values; write fewer")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is no YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply; no study needs that") from None
    finally:
        loader.dispose()


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node has with every alias in it written out.

    Raises:
        RecursionError: it holds itself.
    """
    if id(node) not in known:
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        each = [one for part in parts for one in (part if isinstance(part, tuple) else (part,))]
        known[id(node)] = 1 + sum(_expanded(one, known) for one in each)
    return known[id(node)]


def _check_keys(
    loader: yaml.SafeLoader, node: yaml.Node, path: Path, where: str, seen: set[int]
) -> None:
    """Raise a ValueError where a mapping has a key twice. It looks at what is written, before any
    merge (`<<`): a key beside a merge may replace one of the merged mapping.
    """
    if id(node) in seen:  # an alias, checked where its anchor is
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _check_keys(loader, item, path, f"{where}[{i}]", seen)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[Any, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue  # no mapping of Python can have it; the constructor says so
        name = MERGE if key.tag == MERGE else loader.construct_object(key)
        full, line = f"{where}.{key.value}".removeprefix("."), key.start_mark.line + 1
        if name in lines:
            way = "write <<: [*a, *b]" if name == MERGE else "keep one of them"
            both = f"in lines {lines[name]} and {line}"
            raise ValueError(f"{path.name}: the key {full} stands twice, {both}; {way}")
        lines[name] = line
        _check_keys(loader, value, path, full, seen)
