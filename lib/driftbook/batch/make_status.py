"""`make status`: how far a study is, from its folder alone; safe while it runs, from any machine
that sees the folder.
"""

import contextlib
import shlex
import sys
from collections import Counter
from collections.abc import Iterator

from driftbook.batch import gpus, keys, leases, shards
from driftbook.batch.plan import read_mark
from driftbook.batch.watching import (
    Outlook,
    Part,
    clock_of,
    parts,
    progress_words,
    read_plan,
    time_left,
)
from driftbook.study.commands import command
from driftbook.study.study_file import Study, load, study_digest

MOST_NAMED = 10  # failures that are named


def status_lines(study: Study, name: str) -> list[str]:
    """The lines of `make status STUDY=name`."""
    dealt = shards.read_shards(study)
    if dealt is None:
        return [f"{study.name}: not begun; {as_run(name)} begins it"]
    if dealt.study != study_digest(study):
        return [f"{study.name} was edited since it was planned; {as_run(name)} does what changed"]
    now = clock_of(study.folder)()
    found = parts(study, dealt, 0.0, now)
    working = {part.job: how for part in found if (how := _holder(study, part, now))}
    left = [part for part in found if part.done < part.total]
    outlook = read_plan(study.folder / "plan.json")
    outlook = Outlook(outlook, dealt.workers or gpus.at_once()) if outlook else None
    seconds = time_left(outlook.left(found)) if outlook and working else ""
    n, total = sum(part.done for part in found), sum(part.total for part in found)
    lines = [f"{study.name}: {n:,} of {total:,} variants and steps done" + _after(", ", seconds)]
    lines += [
        f"running: {part.stage} {part.about}: {progress_words(part, outlook)}; {working[part.job]}"
        for part in found
        if part.job in working
    ]
    lines += failures(study, name)
    waiting = Counter()
    for part in left:
        if part.job not in working:
            waiting[part.stage] += part.total - part.done
    if waiting:
        lines.append("to do: " + ", ".join(f"{stage} {n}" for stage, n in waiting.items()))
    if left and not working:
        runs = is_held(study)
        lines.append("make study runs" if runs else f"nothing runs; {as_run(name)} goes on")
    elif not left:
        lines.append(f"report: {study.folder / 'report.html'}")
    return lines


def _holder(study: Study, part: Part, now: float) -> str:
    """Where the piece that a job does is worked on, how long, and that it is heard of; empty where
    nobody works on it. How long its holder says by its own clock, and when it last said so the
    folder's, as does `now`: no two clocks are compared.
    """
    run_id = part.told.get("run_id")
    if part.done >= part.total or not run_id:
        return ""
    folder = study.folder / "runs" / run_id
    held = leases.holder(folder, part.stage)
    if not held or not leases.living(folder):
        return ""
    where = held.get("host", "?") + _after(", Slurm job ", held.get("job") or "")
    with contextlib.suppress(OSError):
        signs = [path.stat().st_mtime for path in folder.glob(".lease.*")]
        silent = now - max(signs, default=now)
        if silent > leases.PATIENCE:
            return f"on {where}, which was last heard of {silent / 60:.0f} min ago"
    return f"on {where}, for {held.get('held', 0.0) / 60:.0f} min"


def is_held(study: Study) -> bool:
    """Whether a make study of this machine works on the study now, as its lock says."""
    held = leases.words_of(study.folder / ".lock")
    return held.get("machine") == leases.machine() and leases.is_alive(held)


def failures(study: Study, name: str) -> list[str]:
    """What failed and why, a line each: variants, and notebooks that stopped."""
    found = [*_failed_variants(study), *_stopped(study, name)]
    more = [f"{len(found) - MOST_NAMED:,} more failures"] if len(found) > MOST_NAMED else []
    return [*found[:MOST_NAMED], *more]


def _failed_variants(study: Study) -> Iterator[str]:
    for path in sorted((study.folder / "jobs").glob("*/*/*.json")):
        stage, base, number = path.parts[-3], path.parts[-2], path.stem
        notebook = study.folder / "notebooks" / f"{keys.page(stage)}.{base}.{number}.ipynb"
        for run_id, result in ((read_mark(path) or {}).get("runs") or {}).items():
            if result["status"] == "failed":
                again = "where there is more memory" if "had" in result else "with other settings"
                yield (
                    f"failed: {stage} of {run_id}: {result['failure']}; tried again {again}; see"
                    f" {notebook}"
                )


def _stopped(study: Study, name: str) -> Iterator[str]:
    for trace in sorted(study.folder.glob("notebooks/*.error.txt")):
        yield f"stopped: {trace.read_text(encoding='utf-8').strip()}; {as_run(name)} tries again"


def as_run(name: str) -> str:
    """The command that runs a study, by the name or file that it was called by."""
    return f"make study STUDY={shlex.quote(name)}"


def _after(before: str, text: str) -> str:
    return before + text if text else ""


@command(wrong=2)
def main(name: str) -> None:
    """Print the status of a study."""
    print("\n".join(status_lines(load(name), name)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
