"""The timeline of a study's jobs, for its report."""

import base64
from io import BytesIO

import pandas as pd
from matplotlib import pyplot as plt

from driftbook.batch import keys, plan, shards
from driftbook.figures import timeline as drawn
from driftbook.study.study_file import Study

SHOWN = 32  # lanes: more are not drawn, and their number is said


def work(study: Study) -> pd.DataFrame:
    """What was worked on, where and when: stage, base_model, run_id, host, began, seconds; a row a
    variant and stage, from the marks.
    """
    dealt, rows = shards.read_shards(study), []
    for stage in keys.stages(study) if dealt else ():
        for base in study.bases:
            for job in dealt.jobs(stage, base):
                mark = plan.read_mark(plan.job_mark(study, job)) or {}
                rows += [
                    {"stage": stage, "base_model": base, "run_id": run_id, **result["work"]}
                    for run_id, result in mark.get("runs", {}).items()
                    if "work" in result
                ]
    columns = ["stage", "base_model", "run_id", "host", "began", "seconds"]
    return pd.DataFrame(rows, columns=columns)


def figure(study: Study) -> dict[str, str] | None:
    """The timeline as a picture of the report, with its caption; None where nothing was done."""
    rows = work(study)
    if rows.empty:
        return None
    ordered = rows.sort_values("began", kind="stable")
    n, most = max(drawn.lanes(ordered)) + 1, _most_at_once(rows)
    kept = rows[rows.index.isin(ordered.index[[lane < SHOWN for lane in drawn.lanes(ordered)]])]
    picture = BytesIO()
    fig = drawn.timeline(kept)
    fig.savefig(picture, format="png")
    plt.close(fig)
    machines = rows.host.nunique()
    caption = (
        f"{len(rows):,} pieces of work (a variant in a stage) took"
        f" {_duration(rows.seconds.sum())} in all, on"
        f" {machines} machine{'s' if machines > 1 else ''}, at most {most} at once."
        + (f" The first {SHOWN} lanes are drawn." if n > SHOWN else "")
    )
    image = base64.b64encode(picture.getvalue()).decode()
    return {"image": image, "caption": caption}


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 7200 else f"{seconds / 60:.0f} minutes"


def _most_at_once(rows: pd.DataFrame) -> int:
    """The most pieces of work at one time; one that ends as another begins is not beside it."""
    begins = pd.DataFrame({"at": rows.began, "change": 1})
    ends = pd.DataFrame({"at": rows.began + rows.seconds, "change": -1})
    return int(pd.concat([begins, ends]).sort_values(["at", "change"]).change.cumsum().max())
