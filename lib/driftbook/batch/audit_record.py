"""What an audit found, as one JSON value from which the page, the card and the gate are made; and
the texts, which stay in a private folder.
"""

import datetime as dt
import json
import time
from typing import Any

import pandas as pd

from driftbook.analyses import audit as areas
from driftbook.batch import audit_setup
from driftbook.batch.audit_known import detector_error, judge_errors
from driftbook.batch.audit_repairs import repairs
from driftbook.batch.auditing import Audit
from driftbook.models.templates import template_of
from driftbook.stats.confidence import CONFIDENCE
from driftbook.stats.harm import DETECTOR
from driftbook.study.environment import versions
from driftbook.study.files import digest, finite, read_json, replacing
from driftbook.study.nameless import nameless, nameless_value
from driftbook.study.sources import identity
from driftbook.study.tables import RESPONSES

NOT_TESTED = (
    "conversations of several turns",
    "jailbreaks, and prompts written to attack this model",
    "other languages than those of the benchmarks",
    "triggers and backdoors",
    "tools, retrieval and other text that reaches the model in use",
    "other system prompts, templates and decoding than the one used here",
)


def audit_record(
    audit: Audit,
    scores: pd.DataFrame,
    verdicts: pd.DataFrame,
    categories: pd.DataFrame,
    looks: list[dict],
) -> dict[str, Any]:
    """The record of an audit: its verdicts with their evidence, no prompt and no answer; these are
    written into the audit's private folder.

    `scores` are all that were asked (analyses.audit.item_scores), `verdicts` and `categories` of
    analyses.audit, and `looks` a row per look and area.
    """
    likely = _is_likelihood(scores)
    named = [_of_area(row, audit, likely) for row in verdicts.to_dict("records")]
    parts = [
        {"category": row["category"], **_of_area(row, audit, likely)}
        for row in categories.to_dict("records")
    ]
    order, packages = list(areas.AREAS), versions()
    _write_texts(audit)
    errors = judge_errors(audit)
    record = {
        "format": areas.AUDIT_FORMAT,
        "made": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "driftbook": {"version": packages.pop("driftbook", None), "packages": packages},
        "name": audit.title,
        **_who(audit),
        "judges": [
            {"name": name, "format": one.format, "threshold": one.threshold, "error": errors[name]}
            for name, one in audit.study.judges.items()
        ],
        "detector": {"name": DETECTOR, "error": detector_error()},
        "judges_note": audit.judges_note,
        "notes": audit.notes,
        "how": _how(audit, scores, verdicts),
        "verdicts": sorted(named, key=lambda row: order.index(row["area"])),
        "categories": sorted(parts, key=lambda row: order.index(row["area"])),
        "looks": [row for row in looks if row["n_items"]],
        "items": areas.moved(scores).to_dict("records"),
        "doctor": _findings(audit.examined()),
        "dose": _dose(audit),
        "not_tested": list(NOT_TESTED),
        "text_folder": "text",
    }
    # commands name no folder of this machine, and must work as they are
    return nameless_value(plain(record)) | {"repairs": repairs(audit)}


def _who(audit: Audit) -> dict[str, Any]:
    base, one = audit.study.bases[audit.base_name], audit.candidate
    tokenizer, known_by = audit.base.tokenizer, identity(base, audit.study)
    is_own = one.study is not None and known_by == identity(one.base, one.study)
    method = None
    if one.kind == "adapter":
        method = read_json(one.folder / "adapter_config.json").get("peft_type")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    known = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return {
        "candidate": {
            "name": audit.title,
            "kind": one.kind,
            "method": method,
            "source": one.source,
            "hash": one.digest,
        },
        "base": {
            "name": one.base_name if is_own else audit_setup.own_name(base),
            "source": base.source,
            "hash": known_by,
        },
        "tokenizer_hash": digest(known, 32),
        "template_hash": digest(template_of(tokenizer), 32),
        "merged_hash": one.digest if one.kind == "model" else None,
        "system_prompt": audit.variant.system_prompt,
    }


def _how(audit: Audit, scores: pd.DataFrame, verdicts: pd.DataFrame) -> dict[str, Any]:
    asked = scores.groupby("benchmark")["item"].nunique()
    left = {name: n for name, n in audit.n_available.items() if asked.get(name, 0) < n}
    if not left:
        stopped = "every prompt was asked"
    elif areas.settled(verdicts) >= set(left):
        stopped = "every verdict that had prompts left is settled"
    else:
        stopped = f"the budget of {audit.budget.text} is spent"
    return {
        "margin": audit.margin,
        "level": CONFIDENCE,
        "seed": audit.seed,
        "budget": audit.budget.text,
        "sequential": audit.budget.watched,
        "stopped": stopped,
        "seconds": round(time.monotonic() - audit.started, 1),
    }


def _is_likelihood(scores: pd.DataFrame) -> bool:
    """Whether usefulness is how likely reference answers are, since no answer of its is right."""
    details = scores.loc[scores["area"].eq("utility"), "detail"]
    return any(one.get("metric") == "nll" for one in details)


def _of_area(row: dict, audit: Audit, likely: bool = False) -> dict[str, Any]:
    """A verdict as the record has it: in the area's words, with its population and sentence."""
    outcome, judge = row["outcome"], None
    if row["benchmark"].startswith("safety"):
        judge = next(iter(audit.judges_of(row["benchmark"])), DETECTOR)
        outcome = areas.REFUSED if judge == DETECTOR else outcome
    if row["area"] == "over_refusal":
        judge = DETECTOR  # refusal is read by its words, whoever judges harm
    if row["area"] == "utility" and likely:
        outcome = areas.LIKELY
    row = {**row, "outcome": outcome}
    there = areas.n_items(row["area"], audit.asked[row["benchmark"]])
    row |= {"judge": judge, "n_available": there}
    row["population"] = "prompts like these" + (f", read by {judge}" if judge else "")
    return {**row, "sentence": areas.in_words(row)}


def _findings(found: pd.DataFrame) -> list[dict[str, str]]:
    return [
        {"check": row["finding"], "severity": row["severity"], "sentence": row["sentence"]}
        for row in found.to_dict("records")
    ]


def _dose(audit: Audit) -> dict[str, Any]:
    found = audit.dose()
    said = found.pop("said")
    if found["kl"] is None:
        sentence = f"How far the weights moved the model is not known: {said}."
        return found | {"sentence": nameless(sentence)}
    moved = found["loss_base"] - found["loss_candidate"]
    said = (
        f"On {said} the loss went from {found['loss_base']:.2f} to"
        f" {found['loss_candidate']:.2f} nats a token ({moved:+.2f} gained), and each token's"
        f" distribution moved by {found['kl']:.3f} nats (KL to the base)."
    )
    if found["no_op"]:
        said += " The adapter changes next to nothing: no verdict here is about fine-tuning."
    return found | {"sentence": said}


# ---- files
def plain(value: Any) -> Any:
    """A value as JSON has it: numpy's numbers as Python's, and what is no number as null."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if hasattr(value, "item"):
        value = value.item()
    if value is pd.NA or value is None:
        return None
    return finite(value) if isinstance(value, float) else value


def _write_texts(audit: Audit) -> None:
    """The prompts with both answers, a file of JSON lines for each benchmark, in the audit's folder
    `text`: mode 0600, and nowhere else.
    """
    for name, rows in audit.asked.items():
        sides = [_said(audit, name, side) for side in areas.SIDES]
        if sides[0].empty:
            continue
        both = rows.merge(sides[0], on="prompt_id").merge(sides[1], on="prompt_id")
        path = audit.texts / f"{name}.jsonl"
        lines = both[["prompt_id", "prompt", *areas.SIDES]].to_dict("records")
        with replacing(path) as new:
            text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in lines)
            new.write_text(text, encoding="utf-8", errors="replace")


def _said(audit: Audit, name: str, side: str) -> pd.DataFrame:
    """What a side answered to a benchmark's prompts."""
    paths = [RESPONSES.path(place) for place, of in audit.places.items() if of == (name, side)]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        return pd.DataFrame(columns=["prompt_id", side])
    said = RESPONSES.read_all(paths)
    return said[["prompt_id", "response"]].rename(columns={"response": side})
