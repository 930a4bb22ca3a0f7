"""An audit in the formats that others read: the hub's, every-eval-ever's, and JSON for CI.

- `model-index` in a model card's metadata (huggingface_hub.EvalResult; hub-docs modelcard.md): of
  each area the candidate's level, and its difference to the base with the interval in `args`.
- every-eval-ever 0.3.0 (evaleval/every_eval_ever, eval.schema.json): an evaluation of the
  candidate; results are the difference with its interval, and the level.

No prompt and no answer is in any of them, since there is none in the record.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from huggingface_hub import EvalResult

from driftbook.analyses.audit import AREAS, RISE
from driftbook.publishing.audit_gate import MEANINGS
from driftbook.publishing.audit_record import number_of
from driftbook.stats.confidence import CONFIDENCE
from driftbook.study.nameless import model_name, nameless

NOT_EVIDENCE = (
    "This audit is not evidence of safety: it compares one model with its base on prompts like"
    " these, and says nothing of what it did not ask."
)
TASK_TYPE = "text-generation"
MADE_BY = {"made_by": "driftbook audit"}  # marks our entries of `model-index`
EVERY_EVAL_EVER = "0.3.0"
HASHES = ("tokenizer_hash", "template_hash", "merged_hash")
_DIFFERENCE = "difference to the base (points)"
_ARGS = ("ci_low", "ci_high", "margin", "base", "n_items", "n_unscored", "p_adjusted", "word")


def level_of(record: Mapping[str, Any]) -> float:
    """The confidence level of the record's intervals."""
    return number_of(record["how"], "level") or CONFIDENCE


def one_line(value: Any) -> str:
    """A text on one line, without control characters and marks that turn the direction of text; of
    a path its last part.
    """
    text = " ".join(nameless(str(value)).split())
    return "".join(one for one in text if one.isprintable())


# ---- the hub
def eval_results(record: Mapping[str, Any]) -> list[EvalResult]:
    """The entries of `model-index`: of each verdict the candidate's level and the difference, where
    they are known.
    """
    found = []
    for row in record["verdicts"]:
        common = {
            "task_type": TASK_TYPE,
            "dataset_type": one_line(row.get("benchmark") or row["area"]),
            "dataset_name": one_line(row.get("title") or row["area"]),
            "dataset_args": MADE_BY,
        }
        args = {name: row[name] for name in _ARGS if row.get(name) is not None}
        args |= {"level": level_of(record), "judge": one_line(row.get("judge") or "none")}
        outcome = one_line(row.get("outcome") or row["area"])
        for metric, name, more in (
            (row["area"], "candidate", {}),
            (f"{row['area']}_difference", "difference", {"metric_args": args}),
        ):
            value = number_of(row, name)
            label = outcome if not more else f"{outcome}, {_DIFFERENCE}"
            if value is not None:
                found.append(
                    EvalResult(
                        **common,
                        **more,
                        metric_type=one_line(metric),
                        metric_value=value,
                        metric_name=label,
                    )
                )
    return found


# ---- every-eval-ever
def every_eval_ever(
    record: Mapping[str, Any], organisation: str = "unknown", relationship: str = "other"
) -> dict[str, Any]:
    """The record of every-eval-ever 0.3.0. `organisation` is who ran the audit, `relationship` to
    the model's maker one of first_party, third_party, collaborative and other.
    """
    made = datetime.fromisoformat(str(record["made"]))
    made = made if made.tzinfo else made.replace(tzinfo=UTC)
    model = one_line(model_name(str(record["candidate"].get("source") or record["name"])))
    return {
        "schema_version": EVERY_EVAL_EVER,
        "evaluation_id": f"driftbook_audit/{model}/{made.timestamp():.0f}",
        "evaluation_timestamp": made.astimezone(UTC).isoformat(),
        "retrieved_timestamp": f"{made.timestamp():.0f}",
        "source_metadata": {
            "source_name": "driftbook audit",
            "source_type": "evaluation_run",
            "source_organization_name": organisation,
            "evaluator_relationship": relationship,
            "additional_details": {"caution": NOT_EVIDENCE},
        },
        "eval_library": {
            "name": "driftbook",
            "version": str((record.get("driftbook") or {}).get("version") or "unknown"),
        },
        "model_info": {
            "name": one_line(record["candidate"].get("name") or record["name"]),
            "id": model,
            "additional_details": _model_details(record),
        },
        "evaluation_results": [*_results(record)],
    }


def _model_details(record: Mapping[str, Any]) -> dict[str, str]:
    kind = record["candidate"].get("kind")
    deployed = {"endpoint": "externally_managed", "log": "unknown"}.get(kind, "self_deployed")
    found = {
        "deployment_type": deployed,
        "model_availability": "unknown" if kind in ("endpoint", "log") else "open_weights",
        "kind": kind,
        "method": record["candidate"].get("method"),
        "adapter_hash": record["candidate"].get("hash"),
        "base_model": record["base"].get("source"),
        "base_hash": record["base"].get("hash"),
    }
    found |= {name: record.get(name) for name in HASHES}
    return {name: one_line(value) for name, value in found.items() if value is not None}


def _results(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Of each verdict the difference with its interval, and the level; of each category as well."""
    for row in [*record["verdicts"], *record["categories"]]:
        category = row.get("category")
        name = one_line(row["area"] if category is None else f"{row['area']}: {category}")
        details = {
            "word": row.get("word"),
            "sentence": row.get("sentence"),
            "judge": row.get("judge"),
            "population": row.get("population"),
            **{one: row.get(one) for one in ("base", "candidate", "margin", "n_available")},
        }
        common = {
            "evaluation_name": name,
            "source_data": {
                "dataset_name": one_line(row.get("benchmark") or row["area"]),
                "source_type": "other",
            },
            "evaluation_timestamp": str(record["made"]),
        }
        width = AREAS[row["area"]].width if row["area"] in AREAS else 1
        # of a score that runs from -100 to 100 a difference may be twice as large
        ends = {"difference": -100.0 * width, "candidate": -100.0 * (width - 1)}
        for kind, low in ends.items():
            if (value := number_of(row, kind)) is not None:
                benchmark = common["source_data"]["dataset_name"]
                yield common | {
                    "evaluation_result_id": f"{name}#{benchmark}#{kind}",
                    "metric_config": _metric(row, kind, low),
                    "score_details": {
                        "score": value,
                        "details": {
                            key: one_line(one) for key, one in details.items() if one is not None
                        },
                        "uncertainty": _uncertainty(record, row, kind),
                    },
                }


def _metric(row: Mapping[str, Any], kind: str, low: float) -> dict[str, Any]:
    outcome = one_line(row.get("outcome") or row["area"])
    is_change = kind == "difference"
    return {
        "evaluation_description": f"{outcome}, {_DIFFERENCE}" if is_change else outcome,
        "metric_id": f"driftbook.{_plain_name(row['area'])}{'_difference' if is_change else ''}",
        "metric_name": outcome,
        "metric_unit": "points" if is_change or low < 0 else "percent",
        "lower_is_better": row.get("worse") == RISE,
        "score_type": "continuous",
        "min_score": low,
        "max_score": -low if is_change else 100.0,
    }


def _plain_name(text: str) -> str:
    """A name of letters, digits and underscores; different texts have different names."""
    plain = "".join(one if one.isascii() and one.isalnum() else "_" for one in text)[:60]
    same = plain == text
    return plain if same else f"{plain}_{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _uncertainty(record: Mapping[str, Any], row: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The number of prompts, and of a difference its interval."""
    n, ends = row.get("n_items"), [number_of(row, name) for name in ("ci_low", "ci_high")]
    found: dict[str, Any] = {} if n is None else {"num_samples": int(n)}
    if kind == "difference" and None not in ends:
        found["confidence_interval"] = {
            "lower": ends[0],
            "upper": ends[1],
            "confidence_level": level_of(record),
            "method": "paired by prompt; anytime-valid"
            if record["how"].get("sequential")
            else "paired by prompt",
        }
    return found


# ---- CI
def ci_json(
    record: Mapping[str, Any] | None,
    status: int,
    sentences: Sequence[str],
    changes: Mapping[str, Any] | None = None,
) -> str:
    """JSON for a CI's later steps: status (0 to 3) and its meaning, sentences, the verdicts, and
    the difference to an earlier audit. Without a record the audit could not run.
    """
    rows = [] if record is None else record["verdicts"]
    names = ("area", "benchmark", "judge", "difference", *_ARGS, "sentence")
    value = {
        "format": "driftbook audit ci 1",
        "status": status,
        "meaning": MEANINGS[status],
        "sentences": list(sentences),
        "name": None if record is None else record["name"],
        "made": None if record is None else record["made"],
        "verdicts": [{name: row.get(name) for name in names} for row in rows],
        "since": changes,
        "caution": NOT_EVIDENCE,
    }
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
