"""`make audit BASE_LOG=... CANDIDATE_LOG=...`: an audit of logs that exist; no model is run.

Logs are lm-evaluation-harness's (with --log_samples) or inspect_ai's, read and compared by
driftbook.stats.compare: an area is a task, its items are paired by document, words are adjusted
over the tasks. What logs do not say (weights, doses, judges) is null in the record.

The exit status is 0 pass, 1 fail, 2 cannot tell, 3 could not run. GNU make has exit statuses of its
own (2 for every failure), so `make audit` cannot pass them on: the status stands in ci.json.
"""

import math
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from driftbook.analyses.audit import AUDIT_FORMAT, FALL, RISE, item_change, needed
from driftbook.publishing.audit_finish import PAGE, begin, could_not_run, finish_audit
from driftbook.publishing.audit_gate import COULD_NOT_RUN, MEANINGS
from driftbook.publishing.audit_page import write_audit_page
from driftbook.stats.confidence import CONFIDENCE
from driftbook.stats.lm_eval_logs import LOWER_BETTER, RESULTS
from driftbook.stats.paired_logs import PairedTable, paired_tables
from driftbook.stats.two_models import compare
from driftbook.stats.words import audit_word
from driftbook.study.environment import versions
from driftbook.study.files import OUTPUTS, finite, strange_mark
from driftbook.study.nameless import model_name, nameless
from driftbook.study.reading import json_value

_UNTESTED = (
    "Only logs were read: no model was run, and what the logs do not say is not known here.",
    "Whether the two logs are of the models that they name was not checked.",
    "Jailbreaks, several turns, other languages, triggers and tools were not tested, unless a task"
    " of the logs does.",
)
_NOT_LOGGED = "Logs do not say it."
KEYS = ("BASE_LOG", "CANDIDATE_LOG", "MARGIN", "METRIC", "CLUSTER", "STRATUM", "BETTER")
KEYS += ("FAIL_IF", "SINCE", "NAME")


def from_logs(
    base_log: str | Path | list[str | Path],
    candidate_log: str | Path | list[str | Path],
    margin: float = 3.0,
    metric: str | Mapping[str, str] | None = None,
    cluster: str | None = None,
    stratum: str | None = None,
    higher_is_better: bool | None = None,
    name: str = "logs",
) -> dict[str, Any]:
    """The record of an audit, from the logs of a base model and of a candidate. Arguments are those
    of driftbook.stats.compare; rates are in percent, differences in points of the task's metric.

    Raises:
        ValueError: logs that cannot be read or paired, or that are of different prompts.
    """
    start = time.monotonic()
    chosen = {"metric": metric, "cluster": cluster, "stratum": stratum}
    found = compare(
        base_log, candidate_log, margin=margin, higher_is_better=higher_is_better, **chosen
    )
    tables = {one.task: one for one in paired_tables(base_log, candidate_log, **chosen)}
    rows = found.to_dict("records")
    worse = {row["task"]: _worse(tables[row["task"]], higher_is_better) for row in rows}
    said = [_described(one) for one in (base_log, candidate_log)]
    shared = {key: said[0][key] if said[0][key] == said[1][key] else None for key in said[0]}
    packages = versions()
    record = {
        "format": AUDIT_FORMAT,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "driftbook": {"version": packages.pop("driftbook", None), "packages": packages},
        "name": name,
        "candidate": _model(said[1], candidate_log) | {"kind": "log", "method": None},
        "base": _model(said[0], base_log),
        "template_hash": shared["template"],
        "system_prompt": shared["system"],
        "verdicts": [_verdict(row, worse[row["task"]]) for row in rows],
        "items": [item for task in worse for item in _items(tables[task], worse[task])],
    }
    return record | _unknown() | {"how": _how(margin, time.monotonic() - start)}


def _how(margin: float, seconds: float) -> dict[str, Any]:
    return {
        "margin": margin,
        "level": CONFIDENCE,
        "seed": None,
        "budget": "all",
        "sequential": False,
        "stopped": "the logs have no more items",
        "seconds": round(seconds, 1),
    }


def _unknown() -> dict[str, Any]:
    """The parts of a record that logs do not have."""
    dose = dict.fromkeys(("kl", "loss_base", "loss_candidate", "no_op"))
    return {
        "tokenizer_hash": None,
        "merged_hash": None,
        "judges": [],
        "categories": [],
        "looks": [],
        "doctor": [],
        "repairs": [],
        "licences": [],
        "text_folder": None,
        "not_tested": list(_UNTESTED),
        "dose": dose | {"sentence": _NOT_LOGGED},
        "provider_share": {"share": None, "sentence": _NOT_LOGGED},
    }


# ---- who was asked
def _described(log: Any) -> dict[str, str | None]:
    """What a log says of its model: name, hash of the template, system prompt; null where not."""
    path = Path(log[0] if isinstance(log, list) else log)
    nothing = dict.fromkeys(("model", "template", "system"))
    files = [path] if path.suffix == ".json" else []
    if path.is_dir():
        files = sorted([*path.glob(RESULTS), *path.glob(f"*/{RESULTS}")])
    elif path.suffix == ".jsonl":
        files = list(path.parent.glob(f"results_{path.stem.rpartition('_')[2]}.json"))
    values = [value for file in files[:1] if isinstance(value := json_value(file), dict)]
    if values and "results" in values[0] and "eval" not in values[0]:
        keys = {"model": "model_name", "template": "chat_template_sha"}
        keys |= {"system": "system_instruction"}
        return {ours: values[0].get(theirs) for ours, theirs in keys.items()}
    logs = [path] if path.suffix in (".eval", ".json") else []
    logs = sorted([*path.glob("*.eval"), *path.glob("*.json")]) if path.is_dir() else logs
    if not logs:
        return nothing
    from inspect_ai.log import read_eval_log

    return nothing | {"model": read_eval_log(str(logs[0]), header_only=True).eval.model}


def _model(said: Mapping[str, str | None], log: Any) -> dict[str, Any]:
    """The name and the source of a model: as its log names it, else by the log's own name."""
    path = Path(log[0] if isinstance(log, list) else log)
    name = said["model"] or path.stem
    return {"name": nameless(name), "source": model_name(name), "hash": None}


# ---- verdicts and items
def _worse(table: PairedTable, higher_is_better: bool | None) -> str:
    """Which direction is for the worse; where nobody says which is better, higher is."""
    if higher_is_better is not None:
        return FALL if higher_is_better else RISE
    return RISE if table.better == LOWER_BETTER else FALL


def _verdict(row: Mapping[str, Any], worse: str) -> dict[str, Any]:
    """The verdict of a task, from its row of `compare`."""
    numbers = {
        "base": "base_rate",
        "candidate": "candidate_rate",
        "difference": "difference",
        "ci_low": "ci_low",
        "ci_high": "ci_high",
        "margin": "margin",
        "p": "p",
        "p_adjusted": "p_adjusted",
    }
    found = {
        "area": row["task"],
        "title": row["task"],
        "outcome": f"{row['metric']} (percent)",
        "benchmark": row["task"],
        "judge": None,
        "worse": worse,
        **{ours: finite(row[theirs]) for ours, theirs in numbers.items()},
        "n_items": int(row["n_items"]),
        "n_available": int(row["n_items"] + row["n_unscored"]),
        "n_unscored": int(row["n_unscored"]),
        "word": audit_word(row["word"]),
        "tipping": None,
        "population": row["population"],
        "sentence": row["sentence"],
    }
    return found | {"needed": needed(found)}


def _items(table: PairedTable, worse: str) -> Iterator[dict[str, Any]]:
    """A row per item of both, in order; of repeated runs their mean, null where one lacks it."""
    sides = [side.mean(axis=0, skipna=False) for side in (table.base, table.candidate)]
    for (key, base), candidate in zip(sides[0].items(), sides[1], strict=True):
        levels = dict(zip(sides[0].index.names, key, strict=True))
        scores = [None if pd.isna(one) else float(one) for one in (base, candidate)]
        yield {
            "area": table.task,
            "benchmark": table.task,
            "category": None if levels["stratum"] == "all" else str(levels["stratum"]),
            "item": str(levels["prompt_id"]),
            "base": scores[0],
            "candidate": scores[1],
            "change": item_change(*scores, worse),
            "base_detail": {},
            "candidate_detail": {},
        }


# ---- as a command
def audit_logs(
    base_log: str,
    candidate_log: str,
    margin: str = "",
    metric: str = "",
    cluster: str = "",
    stratum: str = "",
    better: str = "",
    fail_if: str = "",
    since: str = "",
    name: str = "",
) -> tuple[int, list[str], Path]:
    """The exit status, sentences and folder of an audit of logs, from what a user writes.

    Every argument is a text, empty where not given: `metric` one name, or TASK=METRIC;TASK=METRIC;
    `better` higher or lower, where the logs do not say; `since` an earlier audit.json.

    Raises:
        ValueError: an argument that cannot be read; see `from_logs` and `finish_audit`.
    """
    folder = _folder(name)
    for what, value in (("BASE_LOG", base_log), ("CANDIDATE_LOG", candidate_log)):
        if not value.strip():
            raise ValueError(f"{what} is not given; name a log or folder of lm-eval or inspect_ai")
    record = from_logs(
        base_log.strip(),
        candidate_log.strip(),
        _points(margin),
        _metrics(metric),
        cluster.strip() or None,
        stratum.strip() or None,
        _direction(better),
        folder.name,
    )
    status, sentences = finish_audit(record, folder, fail_if, since)
    write_audit_page(record, folder / PAGE)
    said = [row["sentence"] for row in record["verdicts"]]
    return status, said + sentences, folder


def _folder(name: str) -> Path:
    name = name.strip() or "logs"
    if Path(name).name != name or name.startswith(".") or strange_mark(name) is not None:
        raise ValueError(f"NAME={name!r}: give the name of one folder, without slashes")
    return OUTPUTS / "audit" / name


def _points(text: str) -> float:
    try:
        value = float(text.strip() or 3.0)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"MARGIN={text!r}: give percentage points above 0, such as 3")
    return value


def _metrics(text: str) -> str | dict[str, str] | None:
    """One metric, or metrics by task; a task's name may have = in it."""
    if "=" not in text:
        return text.strip() or None
    pairs = [one.rpartition("=") for one in text.split(";") if one.strip()]
    return {task.strip(): metric.strip() for task, _, metric in pairs}


def _direction(text: str) -> bool | None:
    words = {"": None, "higher": True, "lower": False}
    if (word := text.strip().lower()) not in words:
        raise ValueError(f"BETTER={text!r}: say higher or lower, or leave it to the logs")
    return words[word]


def main(*pairs: str) -> int:
    """Audit logs, from pairs such as BASE_LOG=... and FAIL_IF=...; print sentences and return the
    exit status.
    """
    given = {key: value for key, _, value in (one.partition("=") for one in pairs)}
    folder = OUTPUTS / "audit" / "logs"
    try:
        if unknown := [key for key in given if key not in KEYS]:
            raise ValueError(f"{unknown[0]!r} is no setting; give {', '.join(KEYS)}")
        folder = _folder(given.get("NAME", ""))
        begin(folder)
        wanted = {"BASE_LOG": "", "CANDIDATE_LOG": ""} | given
        status, sentences, folder = audit_logs(**{k.lower(): v for k, v in wanted.items()})
    except ValueError as error:
        sentence = str(error).strip()
        print(sentence, file=sys.stderr)
        return could_not_run(folder, sentence)
    print(*sentences, f"{MEANINGS[status]}: {folder}", sep="\n")
    return status


if __name__ == "__main__":
    try:
        code = main(*sys.argv[1:])
    except Exception:  # Python would exit with 1, which is read as a model that failed
        traceback.print_exc()
        code = COULD_NOT_RUN
    sys.exit(code)
