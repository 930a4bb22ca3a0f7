"""Several audits of one base model together: each against the base, and each against each other."""

from collections.abc import Iterable, Mapping
from itertools import combinations

import pandas as pd

from driftbook.analyses.audit import CANDIDATE, OF_BASE, compared, watched_together

SAME = ("base", "tokenizer_hash", "template_hash", "system_prompt", "judges")


def check_together(records: Mapping[str, dict]) -> None:
    """Raise a ValueError where audits are not of the same base model, asked the same way."""
    first, *others = records
    for name in others:
        for what in SAME:
            if records[name].get(what) != records[first].get(what):
                raise ValueError(
                    f"{first} and {name} were not audited alike: their {what.replace('_', ' ')}"
                    " differs; audit them on the same base model, with the same judges"
                )
        if not _asked(records[first]) & _asked(records[name]):
            raise ValueError(
                f"{first} and {name} were asked no prompt in common; name the same BENCHMARKS="
            )


def _asked(record: dict) -> set[tuple[str, str]]:
    """What was asked: area and item."""
    return {(row["area"], row["item"]) for row in record["items"]}


def _scores(record: dict, sides: Mapping[str, str]) -> pd.DataFrame:
    """The items of a record as scores; `sides` says which of its columns stands for which side."""
    items = pd.DataFrame(record["items"])
    parts = [
        items.assign(side=side, score=items[column].astype("Float64"))
        for side, column in sides.items()
    ]
    return pd.concat(parts, ignore_index=True)


def against_base(records: Mapping[str, dict], margin: float) -> pd.DataFrame:
    """A row per audit and area, as analyses.audit.decided, adjusted over all of them; with a column
    name.
    """
    parts = [
        _scores(record, {OF_BASE: OF_BASE, CANDIDATE: CANDIDATE}).assign(name=name)
        for name, record in records.items()
    ]
    return _together(pd.concat(parts, ignore_index=True), margin, any_watched(records.values()))


def against_each_other(records: Mapping[str, dict], margin: float) -> pd.DataFrame:
    """A row per pair of audits and area: the second less the first, on the items that both were
    asked, adjusted over all of them; with a column name, as `second less first`: the words are
    about the second.
    """
    parts = []
    for first, second in combinations(records, 2):
        sides = [
            _scores(records[first], {OF_BASE: CANDIDATE}),
            _scores(records[second], {CANDIDATE: CANDIDATE}),
        ]
        asked = [set(zip(side["area"], side["item"], strict=True)) for side in sides]
        both = asked[0] & asked[1]
        kept = [
            side[[key in both for key in zip(side["area"], side["item"], strict=True)]]
            for side in sides
        ]
        parts.append(pd.concat(kept).assign(name=f"{second} less {first}"))
    return _together(pd.concat(parts, ignore_index=True), margin, any_watched(records.values()))


def any_watched(records: Iterable[Mapping]) -> bool:
    """Whether one of these audits was watched as its answers came, so that it may have stopped by
    what it saw.
    """
    return any((one.get("how") or {}).get("sequential") for one in records)


def _together(scores: pd.DataFrame, margin: float, is_watched: bool) -> pd.DataFrame:
    scores = scores.assign(task=scores["name"] + "\t" + scores["area"])
    found = (watched_together if is_watched else compared)(scores, margin)
    return found.assign(name=found["task"].str.partition("\t")[0]).drop(columns="task")
