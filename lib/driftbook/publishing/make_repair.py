"""`make repair`: a repaired copy of an adapter, audited beside the adapter and, where the repair is
more than that, beside the same adapter made smaller by as much.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from driftbook.analyses.audit import AREAS, in_short
from driftbook.batch import audit_setup
from driftbook.batch.audit_setup import Candidate
from driftbook.publishing.audit_gate import COULD_NOT_RUN
from driftbook.publishing.audit_record import read_audit
from driftbook.publishing.make_audit import (
    as_printed,
    exit_status,
    folder_of,
    parameters,
    ran_through,
    run_audit,
)
from driftbook.stats.picking import with_minus
from driftbook.study.files import ROOT, check_path
from driftbook.training import controls
from driftbook.training.mitigations import checkpoint
from driftbook.training.safe_lora import check_adapter, project

KINDS = ("rescale", "safe_lora")
USUAL = {"rescale": 0.5, "safe_lora": 0.35}  # the factor; the published threshold


def repaired(one: Candidate, given: Mapping[str, str], out: Path) -> float:
    """Write the repaired adapter into the new folder `out`; the share of the update's norm that is
    kept.

    Raises:
        ValueError: WITH or VALUE has no meaning, a checkpoint is missing, or the adapter has no
            update of weights.
    """
    kind = checked_kind(given.get("WITH", ""))
    try:
        value = float(given.get("VALUE") or USUAL[kind])
    except ValueError:
        raise ValueError(f"VALUE={given['VALUE']!r} is no number") from None
    if kind == "rescale":
        controls.rescaled(one.folder, out, value)
        return value
    check_adapter(one.folder)  # before a checkpoint is asked for that would not help
    pair = [_checkpoint(given, name) for name in ("ALIGNED", "UNALIGNED")]
    rows = project(one.folder, *pair, out, value=value)
    kept = np.hypot.reduce(rows["share_kept"] * rows["norm_update"])
    return float(kept / np.hypot.reduce(rows["norm_update"]))


def checked_kind(kind: str) -> str:
    """WITH, where it is one of KINDS; a ValueError where it is not."""
    if kind not in KINDS:
        raise ValueError(f"WITH={kind!r}: give {' or '.join(KINDS)}")
    return kind


def _checkpoint(given: Mapping[str, str], name: str) -> Path | str:
    if not given.get(name):
        raise ValueError(
            f"{name}= is not given: Safe LoRA needs ALIGNED= and UNALIGNED=, two checkpoints of the"
            " base model's architecture whose difference says what alignment changed"
        )
    return checkpoint(audit_setup.given_source(given[name], name), None)


def main() -> int:
    """Repair what the environment names and audit before and after; 0, or 3 where it could not."""
    try:
        check_path(ROOT, "the checkout")
        before = parameters(os.environ)
        one = audit_setup.candidate(before.get("adapter", ""), before.get("model", ""))
        if one.kind != "adapter":
            raise ValueError("a repair is made of an adapter; give ADAPTER=")
        kind = checked_kind(os.environ.get("WITH", ""))  # before it names a folder
        compared = {"before": before}
        folder, number = folder_of(before) / "repaired", 1
        while (out := folder / f"{kind}-{number}").exists():
            number += 1
        out.parent.mkdir(parents=True, exist_ok=True)
        kept = repaired(one, os.environ, out)
        compared[kind] = _of(before, one, out)
        if kind != "rescale":
            smaller = folder / f"rescaled-as-{out.name}"
            controls.rescaled(one.folder, smaller, kept)
            compared[f"rescale {kept:.2f}"] = _of(before, one, smaller)
        for name, given in compared.items():
            ran_through(run_audit(given), name)
    except ValueError as error:
        print(f"driftbook: {error}", file=sys.stderr)
        return COULD_NOT_RUN
    found = {name: read_audit(folder_of(given) / "audit.json") for name, given in compared.items()}
    print(table(found).to_string())
    print(f"the repaired adapter: {as_printed(out)}")
    return 0


def _of(before: dict, one: Candidate, out: Path) -> dict:
    """The audit of another adapter on the same base model and prompts."""
    benchmarks = before.get("benchmarks") or (one.study.name if one.study else "")
    given = before | {"adapter": str(out), "name": f"{before['name']}-{out.name}"}
    if before.get("template") == "adapter":  # which a repaired copy does not take with it
        text = audit_setup.template_text("adapter", one)
        (out / "chat_template.jinja").write_text(text, encoding="utf-8")
    return given | ({"benchmarks": benchmarks} if benchmarks else {})


def table(records: Mapping[str, dict]) -> pd.DataFrame:
    """A column per audit, a row per area: the difference to the base model with its interval and
    word; and the gain on held-out answers, which is a repair's price.
    """
    found = {}
    for name, record in records.items():
        rows = {row["area"]: row for row in record["verdicts"]}
        found[name] = {AREAS[area].title: in_short(row) for area, row in rows.items()}
        dose = record["dose"]
        if dose["kl"] is not None:
            gain = dose["loss_base"] - dose["loss_candidate"]
            found[name]["gain (nats a token)"] = with_minus(f"{gain:+.3f}")
    return pd.DataFrame(found)


if __name__ == "__main__":
    sys.exit(exit_status(main))
