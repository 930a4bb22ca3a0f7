"""Text that may be published: of a path its last part alone, and no user's name."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

SEPARATOR = r"[/\\]+"
HOMES = ("home", "home$", "homes", "users", "profiles", "documents and settings")
_PART = r"[^\s/\\\"'`<>|:*?]+"
_WORD = r"[^\s/\\\"'`<>|:*?,;]+"
_NAME_WITH_SPACES = (  # a user's name, such as Jane Doe; no words that stand between two paths
    rf"(?i:home|users){SEPARATOR}{_WORD}"
    rf"(?:\ (?!(?:and|as|at|by|for|from|in|is|not|of|on|or|to|with)\b){_WORD}){{1,2}}"
    r"(?=[/\\])"
)
_PART_WITH_SPACES = (  # before a backslash, where nothing else is meant
    r"[^\s/\\\"'`<>|:*?](?:[^/\\\"'`<>|:*?$%\r\n]*[^\s/\\\"'`<>|:*?])?(?=\\)"
)
_REMOTE = r"(?:[\w.+-]+@[\w.-]+:)?"
_WINDOWS = rf"""(?:
    (?:file:[/\\]+)?[A-Za-z]:{SEPARATOR}
    | \\\\+(?:\?\\+(?:UNC\\+[\w.$-]+|[A-Za-z]:)|[\w.$-]+)\\+
    | (?:~[\w.-]*|%\w+%)\\+
    | (?:\.\.?\\+)+
)"""
_POSIX = rf"""(?:
    {_REMOTE}(?: file:(?://[^/\\\s]*)?/+ | (?:~[\w.-]*|\$\{{?\w+\}}?)/+ | (?:\.\.?/+)+ | /+ )
)"""
_LAST = r"[^\s/\\\"'`<>|:*?,;)\]}]*"
_PATH = re.compile(
    rf"""
    (?P<kept> data:[\w/+.-]+;base64,[\w+/=]+
        | (?<![\w+.-])(?!file:)[A-Za-z][\w+.-]*://(?P<login>[^\s/@]+@)?[^\s\"'`<>,;]* )
    | (?P<quote>["'`])(?P<quoted>(?:{_WINDOWS}|{_POSIX})[^"'`\r\n]*)(?=(?P=quote))
    | (?:(?<![\w)\]}}.~%*+/\\@#&$-]) | (?<=\\[nrt])) (?P<plain>
        {_WINDOWS}(?:(?:{_NAME_WITH_SPACES}|{_PART_WITH_SPACES}|{_PART}(?=[/\\]))
            {SEPARATOR})*+{_LAST}
        | {_POSIX}(?:(?:{_NAME_WITH_SPACES}|{_PART})/+)*+{_LAST}
      )
    """,
    re.VERBOSE,
)
_COLOURS = re.compile(r"(\x1b\[[\d;]*m)")
_START = re.compile(rf"{_WINDOWS}|{_POSIX}", re.VERBOSE)
_CACHED = re.compile(
    r"(?:models|datasets)--([^/\\]+?)--([^/\\]+)(?:[/\\]+snapshots[/\\]+\w+)?[/\\]*"
)


def nameless(text: str) -> str:
    """The text with the last part of each absolute path (POSIX, Windows, UNC, ~, $VARIABLE, file:)
    in the path's place, and ~ where this would be a user's name. Names on the hub, in its cache
    too, and addresses of sites stay.
    """
    if "/" not in text and "\\" not in text:
        return text
    pieces = _COLOURS.split(text)  # a colour's code ends in a letter, where no path could begin
    pieces[::2] = [_PATH.sub(_replaced, piece) for piece in pieces[::2]]
    return "".join(pieces)


def model_name(name: str) -> str:
    """A model's name on the hub, also from the hub's cache; of a folder its last part."""
    bare = name.strip().strip("\"'")
    if cached := _CACHED.search(bare):
        return "/".join(cached.groups())
    is_path = "\\" in bare or bare.count("/") > 1 or bool(_START.match(bare))
    return _last_of(bare) if is_path else name


def nameless_value(value: Any) -> Any:
    """A value as JSON has it, every text in it nameless."""
    if isinstance(value, str):
        return nameless(value)
    if isinstance(value, list):
        return [nameless_value(one) for one in value]
    if isinstance(value, dict):
        return {key: nameless_value(one) for key, one in value.items()}
    return value


def nameless_column(column: pd.Series) -> pd.Series:
    """A column of texts, each nameless; of JSON the texts in it, so that it stays JSON."""
    known = column.dropna().unique()
    changed = {text: new for text in known if (new := _nameless_json(text)) != text}
    if not changed:
        return column
    new = column.map(lambda text: changed.get(text, text), na_action="ignore")
    return new.astype(column.dtype)


def _nameless_json(text: str) -> str:
    if text[:1] not in ("{", "["):
        return nameless(text)
    try:
        value = json.loads(text)
    except ValueError:
        return nameless(text)
    changed = nameless_value(value)
    return text if changed == value else json.dumps(changed)


def _replaced(found: re.Match) -> str:
    if found["kept"]:
        return found["kept"].replace(found["login"] or "", "") if found["login"] else found["kept"]
    if found["quote"]:
        return found["quote"] + _last_of(found["quoted"])
    return _last_of(found["plain"])


def _last_of(path: str) -> str:
    """The last part of a path; ~ where it is a user's folder."""
    cached = _CACHED.search(path)
    if cached and cached.end() == len(path):
        return "/".join(cached.groups())
    root = _START.match(path)
    start = root.group() if root else ""
    parts = [part for part in re.split(SEPARATOR, path[len(start) :]) if part]
    if not parts:
        return "~" if start.startswith("~") else path
    if set(start) == {"/"} and len(parts) == 1 and parts[0] != _user():
        return path
    last = parts[-1].rstrip(".!")
    before = parts[-2].lower() if parts[1:] else ""
    return "~" + parts[-1][len(last) :] if before in HOMES or last == _user() else parts[-1]


@cache
def _user() -> str:
    """The name of the folder of whoever runs this; empty where it is nobody's name."""
    name = Path.home().name
    return "" if name == "root" else name
