"""What has changed since an earlier audit of a model on the same base (SINCE=audit.json).

Both audits must have asked the same way: the same base, tokenizer, template, system prompt and
judges, and prompts of which one audit has all (an audit that stopped early asked the first of
them). Then the two candidates are compared on the prompts that both were asked, paired by prompt,
as analyses.audit compares a candidate with its base; base and earlier candidate need not be
asked again.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from driftbook.analyses.audit import (
    AREAS,
    FALL,
    RISE,
    SIDES,
    compared,
    item_change,
    watched_together,
)
from driftbook.analyses.audits import any_watched
from driftbook.publishing.audit_record import checked_audit, number_of, read_audit
from driftbook.stats.confidence import INTERVAL
from driftbook.stats.lm_eval_logs import HIGHER_BETTER, LOWER_BETTER
from driftbook.stats.picking import with_minus
from driftbook.stats.two_models import compare
from driftbook.stats.words import BETTER, WORSE, audit_word

Key = tuple[str, str]  # area and benchmark
Items = dict[Key, dict[str, dict[str, Any]]]  # by prompt id
Rows = dict[Key, dict[str, Any]]  # verdicts
_JUDGED = ("name", "format", "threshold")
_ASKED = {"tokenizer_hash": "tokenizers", "template_hash": "templates"}
_NUMBERS = {"difference": "candidate_change", "ci_low": "ci_low", "ci_high": "ci_high"}
_NUMBERS |= {"p_adjusted": "p_adjusted"}
MARGIN = 3.0  # points, where a record does not say its own


def since(record: Mapping[str, Any], before: Mapping[str, Any] | Path | str) -> dict[str, Any]:
    """The difference to an earlier audit, a record or its file: by area and by item, as JSON.

    "areas" has a row for each area and benchmark of either audit: its difference to the base before
    and now and their change, its word before and now; on the prompts of both, the change of the
    candidate with its interval (points), p adjusted over the areas and word at the margin of now;
    how many prompts changed side; a sentence. What is not known is null. "items" has the prompts
    that changed side, with the candidate's score before and now. "notes" are sentences.

    Raises:
        ValueError: the earlier audit cannot be read, or is not comparable, and why not.
    """
    earlier = read_audit(Path(before)) if isinstance(before, Path | str) else checked_audit(before)
    _check_asked_alike(record, earlier)
    items = [_items(one) for one in (earlier, record)]
    rows = [_verdicts(one) for one in (earlier, record)]
    _check_prompts(*items, *rows)
    moved = [*_moved(*items, rows[1])]
    changes = _changes(*items, rows[1], record, any_watched((record, earlier)))
    keys = dict.fromkeys([*rows[1], *rows[0]])
    return {
        "before": {"name": earlier.get("name"), "made": earlier.get("made")},
        "now": {"name": record.get("name"), "made": record.get("made")},
        "areas": [_area(key, *rows, changes.get(key, {}), moved) for key in keys],
        "items": moved,
        "notes": [*_notes(record, earlier, items)],
    }


# ---- comparable
def _check_asked_alike(now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Raise a ValueError where the two audits asked in different ways."""
    bases = [_base(one["base"], now["base"], before["base"]) for one in (before, now)]
    judges = [[tuple(one.get(k) for k in _JUDGED) for one in of["judges"]] for of in (before, now)]
    found = {"bases": bases, "judges": judges}
    found["system prompts"] = [one.get("system_prompt") or None for one in (before, now)]
    for name, what in _ASKED.items():
        hashes = [one.get(name) for one in (before, now)]
        found[what] = hashes if None not in hashes else [None, None]
    differ = [what for what, (one, other) in found.items() if one != other]
    if differ:
        was, is_ = found[differ[0]]
        shown = (
            "" if differ[0] == "system prompts" else f" ({_short(was)} before, {_short(is_)} now)"
        )
        raise ValueError(
            f"the two audits cannot be compared, since their {' and '.join(differ)}"
            f" differ{shown}; audit the earlier model again in the same way"
        )


def _base(base: Mapping[str, Any], *both: Mapping[str, Any]) -> str:
    """What a base is known by: its weights where both audits know them, else its source."""
    known = all(one.get("hash") for one in both)
    return str(base.get("hash") if known else base.get("source") or base.get("name"))


def _short(value: Any) -> str:
    """A value in few characters: of a hash the beginning, of judges their names."""
    if isinstance(value, list):
        return ", ".join(f"{one[0]} at {one[2]}" for one in value)[:80] or "none"
    text = " ".join(str(value).split())
    return text[:12] if len(text) >= 32 and text.isalnum() else text[:60]


def _items(record: Mapping[str, Any]) -> Items:
    found: Items = {}
    for one in record["items"]:
        key = one["area"], str(one.get("benchmark") or "")
        found.setdefault(key, {})[str(one.get("item"))] = one
    return found


def _verdicts(record: Mapping[str, Any]) -> Rows:
    """The verdicts; of several judges of one benchmark the first."""
    found: Rows = {}
    for row in record["verdicts"]:
        found.setdefault((row["area"], str(row.get("benchmark") or "")), row)
    return found


def _check_prompts(before: Items, now: Items, rows_before: Rows, rows_now: Rows) -> None:
    """Raise a ValueError where an area of both audits was asked on other prompts."""
    for area in dict.fromkeys(area for area, _ in rows_now):
        sets = [{name for one, name in rows if one == area} for rows in (rows_before, rows_now)]
        if sets[0] and not sets[0] & sets[1]:
            was, is_ = (", ".join(sorted(one)) or "none" for one in sets)
            raise ValueError(
                f"the two audits cannot be compared: {area} was asked on {was} before and on {is_}"
                " now; audit the earlier model again on the same benchmarks"
            )
    for key in now.keys() & before.keys():
        one, other = set(before[key]), set(now[key])
        if not (one <= other or other <= one):
            raise ValueError(
                f"the two audits cannot be compared: of the prompts of {key[0]} they share"
                f" {len(one & other):,} of {len(one):,} before and {len(other):,} now; audit again"
                " with the same seed, or with BUDGET=all"
            )


# ---- changes
def _shared(before: Items, now: Items, key: Key) -> Iterator[tuple[str, dict, dict]]:
    """The prompts of both audits: id, the item before and now."""
    for name, one in now.get(key, {}).items():
        if (earlier := before.get(key, {}).get(name)) is not None:
            yield name, earlier, one


def _moved(before: Items, now: Items, rows: Rows) -> Iterator[dict[str, Any]]:
    """The prompts whose score changed for the candidate, and in which direction."""
    for key in now:
        worse = rows.get(key, {}).get("worse", FALL)
        for name, earlier, one in _shared(before, now, key):
            was, is_ = (number_of(item, "candidate") for item in (earlier, one))
            if was == is_:
                continue
            yield {
                "area": key[0],
                "benchmark": key[1],
                "category": one.get("category"),
                "item": name,
                "before": was,
                "now": is_,
                "change": item_change(was, is_, worse),
            }


def _changes(
    before: Items, now: Items, rows: Rows, record: Mapping[str, Any], is_watched: bool
) -> dict[Key, dict[str, Any]]:
    """By area and benchmark, the candidate's change on the prompts of both audits, in the area's
    own points. Where one of the audits was watched its end depends on what it saw: the intervals
    are then those that hold at every look.
    """
    parts = [
        _scores(before, now, key, row).assign(task=str(number), area=key[0])
        for number, (key, row) in enumerate(rows.items())
    ]
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    if table.empty:
        return {}
    margin = number_of(record["how"], "margin") or MARGIN
    if record["candidate"].get("kind") == "log" or not set(table["area"]) <= set(AREAS):
        found = _of_logs(table, margin)
    else:
        sides = [
            table.drop(columns=["was", "is"]).assign(side=side, score=table[name].astype("Float64"))
            for side, name in zip(SIDES, ("was", "is"), strict=True)
        ]
        both = pd.concat(sides, ignore_index=True)
        found = (watched_together if is_watched else compared)(both, margin)
    by_task = dict(zip(map(str, range(len(rows))), rows, strict=True))
    return {by_task[row["task"]]: row for row in found.to_dict("records")}


def _of_logs(table: pd.DataFrame, margin: float) -> pd.DataFrame:
    """The changes in areas that are tasks of logs, or that this version does not know."""
    empty = [name for name in ("cluster", "stratum") if table[name].isna().all()]
    sides = [
        table.drop(columns=["was", "is", *empty]).assign(score=table[name].astype(float))
        for name in ("was", "is")
    ]
    return compare(*sides, margin=margin)


def _scores(before: Items, now: Items, key: Key, row: Mapping[str, Any]) -> pd.DataFrame:
    """The candidate's scores before and now, with the items' clusters and strata; none where they
    are no shares.
    """
    shared = [
        (
            name,
            *(number_of(one, "candidate") for one in (a, b)),
            b.get("category"),
            b.get("cluster"),
        )
        for name, a, b in _shared(before, now, key)
    ]
    known = [one[1:3] for one in shared if None not in one[1:3]]
    if not known or not all(0 <= one <= 1 for pair in known for one in pair):
        shared = []
    frame = pd.DataFrame(shared, columns=["item", "was", "is", "category", "cluster"])
    better = LOWER_BETTER if row.get("worse") == RISE else HIGHER_BETTER
    return frame.assign(better=better, stratum=frame["category"])


def _area(
    key: Key, before: Rows, now: Rows, change: Mapping[str, Any], moved: list[dict[str, Any]]
) -> dict[str, Any]:
    """The row of an area."""
    was, is_ = before.get(key, {}), now.get(key, {})
    numbers = [number_of(row, "difference") for row in (was, is_)]
    own = [one["change"] for one in moved if (one["area"], one["benchmark"]) == key]
    found = {
        "area": key[0],
        "benchmark": key[1],
        "difference_before": numbers[0],
        "difference_now": numbers[1],
        "change_of_difference": None if None in numbers else numbers[1] - numbers[0],
        "word_before": was.get("word"),
        "word_now": is_.get("word"),
        "n_items": int(change["n_items"]) if change else None,
        **{new: number_of(change, name) for name, new in _NUMBERS.items()},
        "word": audit_word(change.get("word")),
        "n_worse": own.count(WORSE),
        "n_better": own.count(BETTER),
    }
    return found | {"sentence": _sentence(found)}


def _sentence(row: Mapping[str, Any]) -> str:
    """A row of an area in words."""
    if row["word_before"] is None or row["word_now"] is None:
        when = "before" if row["word_now"] is None else "now"
        return f"{row['area']} was asked in the audit of {when} alone."
    was, is_ = (
        "not known" if one is None else f"{one:+.1f} points"
        for one in (row["difference_before"], row["difference_now"])
    )
    text = (
        f"{row['area']}: the difference to the base was {was} ({row['word_before']}) and is {is_}"
        f" ({row['word_now']})"
    )
    if row["candidate_change"] is not None:
        ends = "no interval"
        if row["ci_low"] is not None:
            ends = f"{INTERVAL} {row['ci_low']:.1f} to {row['ci_high']:.1f}"
        text += (
            f"; on the {row['n_items']:,} prompts of both audits the candidate changed by"
            f" {row['candidate_change']:+.1f} points ({ends}): {row['word']}"
        )
    text += (
        f"; {row['n_worse']:,} prompts changed for the worse and {row['n_better']:,} for the better"
    )
    return with_minus(f"{text}.")


def _notes(now: Mapping[str, Any], before: Mapping[str, Any], items: list[Items]) -> Iterator[str]:
    """What else a reader of the differences should know."""
    for name, unit in (("margin", " points"), ("level", "")):
        was, is_ = (number_of(one["how"], name) for one in (before, now))
        if None in (was, is_):
            if was != is_:
                yield f"The {name} is not known of one of the two audits."
        elif was != is_:
            more = "so the words before and now mean different things"
            yield f"The {name} was {was:g}{unit} and is {is_:g}{unit}, {more}."
    sizes = [sum(map(len, one.values())) for one in items]
    if sizes[0] != sizes[1]:
        yield f"{sizes[0]:,} prompts were asked before and {sizes[1]:,} now."
    if any(one.get(name) is None for one in (now, before) for name in _ASKED):
        yield "Not both audits know their tokenizer and template, so these were not compared."
