"""A section on an audit for the model card of an adapter, with the card's metadata.

The section stands between two marks, so that a later audit replaces it and leaves the rest of the
card as it is. Names, sentences and system prompts come from others: they are escaped, so that none
can make a link, a picture, HTML or a new row.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from driftbook.publishing.audit_formats import (
    MADE_BY,
    NOT_EVIDENCE,
    eval_results,
    level_of,
    one_line,
)
from driftbook.publishing.audit_record import number_of
from driftbook.stats.picking import with_minus
from driftbook.study.nameless import model_name

BEGIN, END = "<!-- driftbook audit: begin -->", "<!-- driftbook audit: end -->"
HEADING = "## Audit against the base model"
# of CommonMark and GitHub's extensions: what can begin markup inside a line (@ and : make links)
_MARKUP = re.compile(r"([\\`*_{}\[\]#|~!$@^]|:(?=\S))")
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
LONGEST = 600  # characters of one text; a system prompt may be of any length
_UNKNOWN = "not known"
_SECTION = re.compile(rf"\n*{re.escape(BEGIN)}.*?{re.escape(END)}\n*", re.DOTALL)


def escaped_markdown(value: Any) -> str:
    """A text of others as plain text of one line of Markdown, at most LONGEST characters of it."""
    text = one_line(value)
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
    text = _MARKUP.sub(r"\\\1", text.translate(_ENTITIES))
    return re.sub(r"(?i)\bwww\.", r"www\\.", text)


# ---- the section
def card_section(record: Mapping[str, Any]) -> str:
    """The section as Markdown, between its two marks."""
    parts = [
        BEGIN,
        HEADING,
        _opening(record),
        _table(record),
        *(f"- {escaped_markdown(row['sentence'])}" for row in _said(record, "verdicts")),
        f"### What was not tested\n\n{_list(record['not_tested'])}",
        f"### How it was asked\n\n{_pairs(_settings(record))}",
        f"### Which files\n\n{_pairs(_files(record))}",
        f"### Compute and licences\n\n{_pairs(_terms(record))}",
    ]
    if note := record.get("judges_note"):
        parts.append(f"### Who judged\n\n{_list([note])}")
    if notes := record.get("notes"):
        parts.append(f"### What else to know\n\n{_list(notes)}")
    if findings := [one["sentence"] for one in _said(record, "doctor")]:
        parts.append(f"### What was found in the files\n\n{_list(findings)}")
    text = "\n\n".join([*parts, END])
    return re.sub(r"(?m)^(- .*)\n\n(?=- )", r"\1\n", text) + "\n"


def _said(record: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    return [row for row in record.get(part) or () if row.get("sentence")]


def _opening(record: Mapping[str, Any]) -> str:
    candidate, base = (
        escaped_markdown(model_name(str(one.get("source") or one.get("name") or _UNKNOWN)))
        for one in (record["candidate"], record["base"])
    )
    date = escaped_markdown(str(record["made"])[:10])
    version = escaped_markdown((record.get("driftbook") or {}).get("version") or _UNKNOWN)
    return (
        f"{candidate} against its base {base}, audited on {date} with driftbook {version}."
        f" **{NOT_EVIDENCE}**"
    )


def _table(record: Mapping[str, Any]) -> str:
    """A row per verdict; an interval is of the record's level."""
    level = f"{100 * level_of(record):g}% interval"
    heads = (
        "Area",
        "Outcome",
        "Base",
        "Model",
        "Difference",
        level,
        "Margin",
        "Prompts",
        "Verdict",
    )
    lines = [_cells(heads), _cells(["---"] * len(heads))]
    for row in record["verdicts"]:
        ends = [number_of(row, name) for name in ("ci_low", "ci_high")]
        interval = _UNKNOWN if None in ends else f"{ends[0]:.1f} to {ends[1]:.1f}"
        asked = row.get("n_items")
        numbers = [
            *(_number(row, name, ".1f") for name in ("base", "candidate")),
            _number(row, "difference", "+.1f"),
            interval,
            _number(row, "margin", "g"),
            _UNKNOWN if asked is None else f"{asked:,}",
        ]
        what = [row.get("title") or row["area"], row.get("outcome") or _UNKNOWN]
        names = map(escaped_markdown, what)
        lines.append(_cells([*names, *map(with_minus, numbers), escaped_markdown(row["word"])]))
    return "\n".join(lines)


def _cells(texts: Any) -> str:
    return f"| {' | '.join(texts)} |"


def _number(row: Mapping[str, Any], name: str, form: str) -> str:
    value = number_of(row, name)
    return _UNKNOWN if value is None else format(value, form)


def _list(sentences: list[str]) -> str:
    return "\n".join(f"- {escaped_markdown(one)}" for one in sentences) or "- nothing is said of it"


def _pairs(pairs: Iterator[tuple[str, Any]]) -> str:
    """A list of names and values; a value that is null or empty is not known."""
    known = ((name, _UNKNOWN if value in (None, "") else value) for name, value in pairs)
    return "\n".join(f"- {escaped_markdown(k)}: {escaped_markdown(value)}" for k, value in known)


def _settings(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    how, dose = record["how"], record["dose"]
    yield "population", next((row.get("population") for row in record["verdicts"]), None)
    system = record.get("system_prompt") or "none"
    yield "system prompt", system
    if len(system) > LONGEST:
        yield "SHA-256 of the whole system prompt", hashlib.sha256(system.encode()).hexdigest()
    yield "seed", how.get("seed")
    yield "margin (points)", how.get("margin")
    yield "budget", how.get("budget")
    yield "stopped", how.get("stopped")
    for judge in record["judges"]:
        name = f"judge {judge.get('name')}"
        yield name, f"{judge.get('format')}, threshold {judge.get('threshold')}"
        yield f"error of {name}", judge.get("error")
    if not record["judges"]:
        is_log = record["candidate"].get("kind") == "log"
        yield "judge", "the scores of the logs" if is_log else "none; refusals by a detector"
    if detector := record.get("detector"):
        yield f"error of the {detector['name']}", detector["error"]
    yield "dose", dose.get("sentence")
    no_op = {True: "yes: it changes nothing", False: "no"}.get(dose.get("no_op"))
    yield "does nothing (no-op)", no_op


def _files(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "candidate", _identity(record["candidate"])
    yield "base model", _identity(record["base"])
    for name in ("tokenizer", "template", "merged"):
        what = "merged weights" if name == "merged" else name
        yield f"hash of the {what}", record.get(f"{name}_hash")


def _identity(one: Mapping[str, Any]) -> str:
    source = model_name(str(one.get("source") or one.get("name") or _UNKNOWN))
    method = f", {one['method']}" if one.get("method") else ""
    return f"{source}{method}, hash {one.get('hash') or _UNKNOWN}"


def _terms(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    share = record["provider_share"]
    number = number_of(share, "share")
    name = "share of the base model's training compute"
    yield name, _UNKNOWN if number is None else f"{number:.2g}; a third makes a modifier a provider"
    if share.get("sentence"):
        yield "in words", share["sentence"]
    for one in record["licences"]:
        yield f"licence of {one.get('what')}", one.get("licence")
    if not record["licences"]:
        yield "licences", None


# ---- the card
def audited_card(
    record: Mapping[str, Any], card: ModelCard | Path | str | None = None
) -> ModelCard:
    """The card with the audit's section and its entries of `model-index`, in place of an earlier
    audit's; a new card where there is none. Other sections, metadata and results stay. `card` is a
    card, the path of one, or its text.

    Raises:
        ValueError: the card cannot be read.
    """
    if isinstance(card, Path):
        card = card.read_text(encoding="utf-8")
    text, data = "", ModelCardData(base_model=_hub_name(record["base"]), library_name="peft")
    if card is not None:
        read = ModelCard(card) if isinstance(card, str) else card
        text, data = read.text, read.data
    name = data.model_name or one_line(record["name"])
    kept = [one for one in data.eval_results or [] if one.dataset_args != MADE_BY]
    data.model_name, data.eval_results = name, [*kept, *eval_results(record)] or None
    text = _SECTION.sub("\n\n", text).strip()
    title = "" if text else f"# {escaped_markdown(record['name'])}\n\n"
    body = f"{title}{text}" + ("\n\n" if text else "") + card_section(record)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def _hub_name(base: Mapping[str, Any]) -> str | None:
    """The base's name on the hub, where it has one."""
    source = model_name(str(base.get("source") or ""))
    return source if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else None
