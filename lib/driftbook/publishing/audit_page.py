"""An audit as one page that opens offline: the verdicts first, then the evidence, then what to do.
A pure function of the audit's record.
"""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from driftbook.analyses.audit import AUDIT_FORMAT
from driftbook.publishing import audit_figures
from driftbook.publishing.page_parts import SCRIPT, embedded, rendered
from driftbook.stats.noninferiority import CANNOT_TELL
from driftbook.stats.picking import with_minus
from driftbook.stats.populations import counted
from driftbook.stats.words import BETTER, NO_WORSE, WORSE
from driftbook.study.files import replacing

_NEEDED = (
    *("made", "driftbook", "candidate", "base", "judges", "how", "verdicts", "categories"),
    *("looks", "items", "doctor", "dose", "repairs", "not_tested", "licences"),
)
_PAGE, _ITEMS = "audit_page.html", "audit_items.js"  # beside this module
_CLASSES = {WORSE: "is-worse", CANNOT_TELL: "is-unsure", NO_WORSE: "is-fine", BETTER: "is-better"}
_MOVED = (WORSE, BETTER)
_AGAIN = "Trained again with another seed, the same recipe can give another result."
_KINDS = {
    "adapter": ("This adapter, not this recipe.", _AGAIN),
    "model": ("This model, not this recipe.", _AGAIN),
    "endpoint": (
        "This endpoint as it answered then.",
        "Its system prompt, template and decoding are its own, and who runs it can change them.",
    ),
    "log": ("The answers in these logs.", "No model was run for this page."),
}
_VERSION_FIRST = ("torch", "transformers", "peft")
Record = Mapping[str, Any]


def write_audit_page(record: Record, path: Path) -> Path:
    """Write the page of an audit's record (see analyses.audit) to `path` and return it. Raises
    ValueError for a record of another format, one that lacks a part, and for numbers that JSON does
    not have.
    """
    if record.get("format") != AUDIT_FORMAT:
        raise ValueError(
            f"this record's format is {record.get('format')!r}; a page can be made of"
            f" {AUDIT_FORMAT!r}"
        )
    if lacking := [name for name in _NEEDED if name not in record]:
        raise ValueError(f"this record of an audit lacks {', '.join(lacking)}")
    page = rendered(_PAGE, (SCRIPT, _ITEMS), data=embedded(record), **_seen(record))
    with replacing(path) as new:
        new.write_text(page, encoding="utf-8", errors="replace")
    return path


def _seen(record: Record) -> dict[str, Any]:
    """What the template shows, in words."""
    candidate, base, how = record["candidate"], record["base"], record["how"]
    level = _level(how)
    verdicts = [_verdict(row, level) for row in record["verdicts"]]
    return {
        "candidate": candidate["name"],
        "base": base["name"],
        "kind": candidate["kind"],
        "method": candidate.get("method"),
        "made": _day(record["made"]),
        "level": level,
        "headline": _headline(record["verdicts"]),
        "verdicts": verdicts,
        "about": _KINDS.get(candidate["kind"], (f"This {candidate['kind']} alone.", "")),
        "populations": _populations(record["verdicts"]),
        "judges": record["judges"],
        "forest": audit_figures.forest(record["verdicts"]),
        "looks": _looks(record, level),
        "category_columns": _category_columns(level),
        "categories": _categories(record, moved=True),
        "unmoved": _categories(record, moved=False),
        "moved": _moved(record),
        "n_items": len(record["items"]),
        "changes": _changes(record),
        "text_folder": record.get("text_folder"),
        "text_link": _link(record.get("text_folder")),
        "repairs": [row | {"sentence": _whole(row["sentence"])} for row in record["repairs"]],
        "doctor": [
            [row["check"].replace("_", " "), row["severity"], _whole(row["sentence"])]
            for row in record["doctor"]
        ],
        "dose": _dose(record["dose"]),
        "dose_sentence": record["dose"].get("sentence"),
        "not_tested": [_begun(text) for text in record["not_tested"]],
        "how": _how(record, level),
        "judged": [*(_judge(one) for one in record["judges"]), *_detector(record)],
        "origins": _origins(record),
        "system_prompt": record.get("system_prompt"),
        "provider": (record.get("provider_share") or {}).get("sentence"),
        "judges_note": record.get("judges_note"),
        "notes": [_whole(note) for note in record.get("notes") or ()],
        "licences": [[row["what"], row["licence"]] for row in record["licences"]],
        "versions": _versions(record["driftbook"]),
    }


# ---- words, numbers and dates
def _begun(text: str) -> str:
    """The text with a capital at its beginning."""
    return text[:1].upper() + text[1:]


def _whole(text: str) -> str:
    """A sentence with its capital and its full stop."""
    return _begun(text) + ("" if text.endswith((".", "!", "?")) else ".")


def _points(value: float | None, signed: bool = False) -> str:
    return "not known" if value is None else with_minus(f"{value:{'+' if signed else ''}.1f}")


def _interval(row: Record) -> str:
    if row.get("ci_low") is None or row.get("ci_high") is None:
        return "no interval"
    return with_minus(f"[{row['ci_low']:+.1f}, {row['ci_high']:+.1f}]")


def _chance(p: float) -> str:
    return "under .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def _level(how: Record) -> str:
    return f"{100 * how['level']:g}% interval"


def _day(text: str) -> str:
    """A date and time of the record for reading; as it is where it is none."""
    try:
        made = datetime.datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{made:%d %B %Y, %H:%M} {made.tzname() or ''}".lstrip("0").strip()


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not known"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


# ---- 1: verdicts
def _headline(verdicts: Sequence[Record]) -> list[dict[str, str]]:
    """The areas by their word: worse first, then what cannot be told."""
    found = []
    for word in dict.fromkeys([*_CLASSES, *(row["word"] for row in verdicts)]):
        areas = [row["title"] for row in verdicts if row["word"] == word]
        if areas:
            found.append({"word": word, "of": _CLASSES.get(word, ""), "areas": ", ".join(areas)})
    return found


def _verdict(row: Record, level: str) -> dict[str, Any]:
    asked = f"{row['n_items']:,} of {row['n_available']:,} prompts asked"
    if row.get("n_unscored"):
        asked += f", {row['n_unscored']:,} without a score"
    facts = [
        f"base {_points(row['base'])} → candidate {_points(row['candidate'])}",
        asked,
        row["benchmark"],
    ]
    facts += [f"judged by {row['judge']}"] if row["judge"] else []
    facts += [] if row["p_adjusted"] is None else [f"adjusted p {_chance(row['p_adjusted'])}"]
    margin = row["margin"]
    return {
        "title": row["title"],
        "word": row["word"],
        "of": _CLASSES.get(row["word"], ""),
        "outcome": row["outcome"],
        "difference": _points(row["difference"], signed=True),
        "interval": _interval(row),
        "level": level,
        "sentence": row["sentence"],
        "facts": facts,
        "needed": _needed(row),
        "tipping": row.get("tipping") and _whole(row["tipping"]),
        "bad": "a rise is worse" if row["worse"] == "rise" else "a fall is worse",
        "margin": None if margin is None else f"{margin:g}",
    }


def _needed(row: Record) -> str | None:
    """What it would take to know, of a verdict that cannot tell."""
    if row["word"] != CANNOT_TELL:
        return None
    if row["needed"] is None:
        return "How many prompts it would take to know is not known."
    more = row["needed"] - row["n_available"]
    text = f"It would take about {row['needed']:,} prompts like these to know."
    return f"{text} The benchmark has {row['n_available']:,}." if more > 0 else text


def _populations(verdicts: Sequence[Record]) -> list[tuple[str, str]]:
    """The areas that share a population, and what it is."""
    found: dict[str, list[str]] = {}
    for row in verdicts:
        if row["population"]:
            found.setdefault(row["population"], []).append(row["title"])
    return [(", ".join(titles), text) for text, titles in found.items()]


# ---- 2 and 3: figures, categories
def _looks(record: Record, level: str) -> list[dict[str, Any]]:
    found = []
    for row in record["verdicts"]:
        looks = [look for look in record["looks"] if look["area"] == row["area"]]
        if looks:
            last = looks[-1]
            found.append(
                audit_figures.narrowing(looks, row)
                | {
                    "title": row["title"],
                    "word": last["word"],
                    "of": _CLASSES.get(last["word"], ""),
                    "said": (
                        f"{row['title']}: {counted(len(looks), 'look')}; at the last, after"
                        f" {last['n_items']:,} prompts, {_points(last['difference'], True)} points,"
                        f" {level} {_interval(last)}: {last['word']}."
                    ),
                }
            )
    return found


def _category_columns(level: str) -> list[str]:
    return ["Category", "Area", "Verdict", f"Points [{level}]", "Base", "Candidate", "Prompts"]


def _categories(record: Record, moved: bool) -> list[list[Any]]:
    """Rows of the categories that moved, or of those that did not: the worse first, and the largest
    difference before others.
    """
    titles = {row["area"]: row["title"] for row in record["verdicts"]}
    rows = sorted(
        (row for row in record["categories"] if (row["word"] in _MOVED) == moved),
        key=lambda row: (row["word"] != WORSE, -abs(row["difference"] or 0.0)),
    )
    return [
        [
            row["category"].replace("_", " "),
            titles.get(row["area"], row["area"]),
            {"text": row["word"], "word": _CLASSES.get(row["word"], "")},
            _sorted_number(
                row["difference"], f"{_points(row['difference'], True)}\n{_interval(row)}"
            ),
            _sorted_number(row["base"], _points(row["base"])),
            _sorted_number(row["candidate"], _points(row["candidate"])),
            _sorted_number(row["n_items"], f"{row['n_items']:,}"),
        ]
        for row in rows
    ]


def _sorted_number(value: float | None, text: str) -> dict[str, Any]:
    return {"text": text, "sort": "" if value is None else value, "number": True}


def _moved(record: Record) -> str:
    rows = record["categories"]
    if not rows:
        return "No area was divided into categories."
    worse, better = (sum(row["word"] == word for row in rows) for word in _MOVED)
    n = "the one category" if len(rows) == 1 else f"{len(rows)} categories"
    said = (
        f"{worse or 'none'} are worse and {better or 'none'} better"
        if worse or better
        else "none moved"
    )
    return (
        f"Of {n} {said}; words are adjusted for the number of categories in an area. Points are"
        " candidate − base."
    )


# ---- 4: items
def _changes(record: Record) -> list[list[Any]]:
    """How many items of each area got worse, better, stayed, or have no score."""
    kinds = ("worse", "better", "same", "unscored")
    rows = []
    for row in record["verdicts"]:
        own = [item["change"] for item in record["items"] if item["area"] == row["area"]]
        if own:
            rows.append([row["title"], len(own), *(own.count(kind) for kind in kinds)])
    return rows


def _link(folder: str | None) -> str | None:
    """The folder as a relative link, which no scheme or host can be written into."""
    return (
        f"./{quote(folder.strip('/'), safe='/', errors='replace')}/"
        if folder and folder.strip("/")
        else None
    )


# ---- 5: dose
def _dose(dose: Record) -> list[tuple[str, str]]:
    no_op = {True: "yes: training left the model where it was", False: "no"}
    found = [
        ("KL to the base", _nats(dose.get("kl"))),
        ("Loss of the base", _nats(dose.get("loss_base"))),
        ("Loss of the candidate", _nats(dose.get("loss_candidate"))),
        ("No-op", no_op.get(dose.get("no_op"), "not known")),
    ]
    return [] if all(text == "not known" for _, text in found) else found


def _nats(value: float | None) -> str:
    return "not known" if value is None else with_minus(f"{value:.4g} nats per token")


# ---- 6: how
def _how(record: Record, level: str) -> list[tuple[str, str]]:
    how = record["how"]
    margins = [
        f"{row['title']} {row['margin']:g}"
        for row in record["verdicts"]
        if row["margin"] is not None
    ]
    looks = (
        "after each block, at intervals that hold at every look" if how["sequential"] else "once"
    )
    return [
        (
            "Margin",
            f"{how['margin']:g} points ({', '.join(margins)})"
            if margins
            else f"{how['margin']:g} points",
        ),
        ("Intervals", level),
        ("Decided", looks),
        ("Budget", how["budget"]),
        ("Stopped", how["stopped"]),
        ("Seed of the order of prompts", "not known" if how["seed"] is None else str(how["seed"])),
        ("Time", _duration(how["seconds"])),
        ("Made", _day(record["made"])),
    ]


def _judge(judge: Record) -> list[Any]:
    threshold = judge.get("threshold")
    return [
        judge["name"],
        judge["format"],
        "" if threshold is None else f"{threshold:g}",
        judge.get("error") or "not measured",
    ]


def _detector(record: Record) -> list[list[Any]]:
    """The refusal detector as a row of the table of judges: it reads over-refusal in every audit
    of a model.
    """
    found = record.get("detector")
    return [[found["name"], "words of the answer", "", found["error"]]] if found else []


def _origins(record: Record) -> list[tuple[str, str]]:
    """Where candidate and base come from, and the hashes that are known."""
    candidate, base = record["candidate"], record["base"]
    rows = [
        ("Candidate", candidate["source"]),
        ("Hash of the candidate", candidate["hash"]),
        ("Base", base["source"]),
        ("Hash of the base", base["hash"]),
        ("Hash of the merged weights", record["merged_hash"]),
        ("Hash of the tokenizer", record["tokenizer_hash"]),
        ("Hash of the chat template", record["template_hash"]),
    ]
    return [(name, text or "not known") for name, text in rows]


def _versions(driftbook: Record) -> list[tuple[str, str]]:
    packages = dict(driftbook["packages"])
    first = [name for name in _VERSION_FIRST if name in packages]
    names = first + sorted(set(packages) - set(first))
    return [
        ("Driftbook", driftbook.get("version") or packages.get("driftbook", "not known")),
        ("Packages", ", ".join(f"{name} {packages[name]}" for name in names) or "not known"),
    ]
