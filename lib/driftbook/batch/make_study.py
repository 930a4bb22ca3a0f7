"""`make study`: checks a study file, runs the Snakefile on it, and shows how far it is. The batch
itself is defined in the Snakefile.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from driftbook.batch import gpus, keys, plan
from driftbook.study.files import OUTPUTS, ROOT, check_path, check_writable
from driftbook.study.study_file import Study, find, load

# Seconds of one core for one unit of each kind of work, measured on the miniature; only the
# estimate of the time left reads them.
COST = {
    "prepare": 40,
    "train": 2.2,
    "mitigate": 0.6,
    "respond": 0.9,
    "judge": 0.5,
    "answer": 0.4,
    "utility": 0.5,
    "rest": 12,
}


@dataclass(frozen=True)
class Part:
    """A part of the work: its stage, what it is about, how many units are done and asked for, and
    whether it is being worked on.
    """

    stage: str
    about: str
    done: int
    total: int
    active: bool

    @property
    def left(self) -> float:
        """Seconds of one core that are left, roughly."""
        return COST.get(self.stage, COST["rest"]) * (self.total - self.done)


def parts(study: Study, started: float) -> list[Part]:
    """All parts of the work, from the marks and progress files in the study's folder; `started`
    tells this batch's files from older ones.
    """
    found = [_job(study, "prepare", name, 1, started) for name in study.models]
    for stage in keys.stages(study):
        found += [
            _job(study, stage, base, len(study.of_stage(stage, base)), started)
            for base in study.bases
        ]
    return found + [
        _job(study, "", stage, 1, started) for stage in ("collect", *keys.analyses(study), "report")
    ]


def _job(study: Study, stage: str, name: str, total: int, started: float) -> Part:
    folder = study.folder
    mark, key = folder / "jobs" / stage / f"{name}.json", folder / "keys" / stage / f"{name}.json"
    progress = folder / "progress" / f"{stage}.{name}.json"
    finished = mark.exists() and not (key.exists() and key.stat().st_mtime > mark.stat().st_mtime)
    if finished:
        return Part(stage or name, name, total, total, False)
    if progress.exists() and progress.stat().st_mtime >= started:
        with contextlib.suppress(json.JSONDecodeError):
            return Part(stage or name, name, json.loads(progress.read_text())["done"], total, True)
    return Part(stage or name, name, 0, total, False)


@contextlib.contextmanager
def alone(study: Study) -> Iterator[None]:
    """Holds the study, so that no second batch works on it at the same time.

    Raises:
        ValueError: another batch holds it.
    """
    with (study.folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"the study {study.name} is being run by another make study; wait for it or stop it"
            ) from None
        yield


def clear_unfinished(folder: Path) -> None:
    """Delete what a killed batch was writing; whole files have other names."""
    for path in list(folder.rglob(".new-*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def warm_kernels(
    environment: dict[str, str], log: Path, finished: bool = False
) -> Iterator[dict[str, str]]:
    """The environment in which jobs and kernels are forked from a process with the heavy imports
    done; unchanged on a GPU machine, and where all is finished and so nothing will be forked.
    """
    if finished or gpus.numbers():
        yield environment
        return
    with tempfile.TemporaryDirectory(prefix="driftbook-") as scratch, log.open("w") as output:
        socket = Path(scratch, "warm")
        spec = Path(scratch, "kernels", "driftbook-warm", "kernel.json")
        spec.parent.mkdir(parents=True)
        kernel = [sys.executable, "-m", "driftbook.batch.warm", "kernel", "-f", "{connection_file}"]
        spec.write_text(
            json.dumps({"argv": kernel, "display_name": "Driftbook, warm", "language": "python"})
        )
        server = subprocess.Popen(
            [sys.executable, "-m", "driftbook.batch.warm", "serve", str(socket)],
            env=environment,
            stdout=output,
            stderr=output,
            cwd=ROOT,
        )
        try:
            _wait_for(socket, server)
            yield environment | {
                "DRIFTBOOK_WARM": str(socket),
                "DRIFTBOOK_KERNEL": "driftbook-warm",
                "JUPYTER_PATH": scratch,
            }
        finally:
            server.kill()
            server.wait()


def _wait_for(socket: Path, server: subprocess.Popen) -> None:
    while not socket.exists():
        if server.poll() is not None:
            raise RuntimeError(
                "the process that forks kernels did not start; see warm.log in the study's folder"
            )
        time.sleep(0.1)


def environment() -> dict[str, str]:
    """The environment of every job: one thread per process on a CPU (two processes of one thread
    each beat one of two), no telemetry.
    """
    quiet = {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
    }
    threads = (
        {}
        if gpus.numbers()
        else dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    )
    return {
        **os.environ,
        **quiet,
        **threads,
        "PYTHONWARNINGS": "ignore",
        "DRIFTBOOK_ROOT": str(ROOT),
        "DRIFTBOOK_OUTPUTS": str(OUTPUTS),
    }


def snakemake(study_file: Path, profile: str, targets: list[str]) -> list[str]:
    """The command that runs the batch."""
    return [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        str(ROOT / "Snakefile"),
        "--profile",
        str(ROOT / "profiles" / profile),
        "--config",
        # Snakemake strips quotation marks at the ends, and then reads the value as YAML
        f"study= {json.dumps(str(study_file), ensure_ascii=False)} ",
        "--resources",
        f"gpu={_gpus()}",
        "--",
        *targets,
    ]


def _gpus() -> int:
    """How many jobs may hold a GPU at a time; without one, models run on the cores and nothing is
    held.
    """
    return len(gpus.numbers()) or 1024


def _run_batch(
    study: Study, study_file: Path, profile: str = "local", targets: tuple[str, ...] = ()
) -> int:
    """Run the batch with a live display; Snakemake's exit status. Its own words go to snakemake.log
    in the study's folder.
    """
    started, parent = time.time(), os.getppid()
    finished = all(part.done == part.total for part in parts(study, started))
    for stale in study.folder.glob("notebooks/*.error.txt"):
        stale.unlink()
    with (
        warm_kernels(environment(), study.folder / "warm.log", finished) as surroundings,
        (study.folder / "snakemake.log").open("w") as log,
    ):
        process = subprocess.Popen(
            snakemake(study_file, profile, list(targets)),
            env=surroundings,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            with display(study) as show:
                while process.poll() is None:
                    show(parts(study, started), started)
                    if (
                        os.getppid() != parent
                    ):  # make was killed: end everything that was started for it
                        raise KeyboardInterrupt
                    time.sleep(0.5)
                show(parts(study, started), started)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode


@contextlib.contextmanager
def display(study: Study) -> Iterator:
    """A function that shows the state of the work: a live bar on a terminal, elsewhere a line when
    the stage changes.
    """
    console = Console()
    columns = (
        TextColumn("{task.description}", justify="left"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True
    ) as progress:
        task = progress.add_task(study.name, total=None, left="")
        last = [""]

        def show(found: list[Part], started: float) -> None:
            text, done, total, left = summary(found, started)
            progress.update(task, description=text, completed=done, total=total, left=left)
            stage = text.partition(" ")[0]
            if not console.is_terminal and stage != last[0]:
                console.print(
                    f"{time.time() - started:5.0f} s  {text}  ({done} of {total}"
                    f" done{', ' + left if left else ''})",
                    highlight=False,
                )
            last[0] = stage

        yield show


def summary(found: list[Part], started: float) -> tuple[str, int, int, str]:
    """What is being done in words, variants and steps done, all of them, and the time left."""
    active = [part for part in found if part.active] or [
        part for part in found if part.done < part.total
    ][:1]
    text = (
        f"{active[0].stage}"
        f" {', '.join(part.about for part in active if part.stage == active[0].stage)}"
        if active
        else "finished"
    )
    seconds = sum(part.left for part in found) / min(os.cpu_count() or 1, len(found))
    left = (
        f"about {seconds / 60:.0f} min left"
        if seconds > 90
        else f"about {seconds:.0f} s left"
        if seconds
        else ""
    )
    return text, sum(part.done for part in found), sum(part.total for part in found), left


def main(study: str, profile: str = "local", *targets: str) -> int:
    """Run a study; 0, 1 where a variant or a notebook failed, 2 where the study could not begin."""
    try:
        path = find(study)
        named = {"the checkout": ROOT, "the folder of outputs": OUTPUTS, "the study file": path}
        for what, one in named.items():
            check_path(one, what)
        checked = load(path)
        if not (ROOT / "profiles" / profile).is_dir():
            raise ValueError(
                f"there is no profile {profile!r}; profiles/ has"
                f" {', '.join(sorted(path.name for path in (ROOT / 'profiles').iterdir()))}"
            )
        check_writable(checked.folder)
        with alone(checked):
            clear_unfinished(checked.folder)
            if again := plan.write(checked):  # the Snakefile plans too; what is wrong is said here
                print(again, flush=True)
            started = time.time()
            status = _run_batch(checked, path, profile, targets)
    except ValueError as error:
        print(f"driftbook: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; make study goes on from here", file=sys.stderr)
        return 130
    return conclude(checked, status, time.time() - started)


def conclude(study: Study, status: int, seconds: float) -> int:
    """Say how it ended: the report, or what failed and where to look; the exit status."""
    stopped = sorted(study.folder.glob("notebooks/*.error.txt"))
    for trace in stopped:
        print(f"driftbook: {trace.read_text().strip()}", file=sys.stderr)
    if status and not stopped:
        print(
            f"driftbook: the batch stopped; see {study.folder / 'snakemake.log'}", file=sys.stderr
        )
    if status:
        return 1
    from driftbook.batch.collecting import status as failures

    failed = failures(study)
    print(
        f"{study.name}: {len(study.variants)} variants in {seconds / 60:.1f} min"
        + (f", {failed} failed" if failed else "")
    )
    print(f"report: {study.folder / 'report.html'}")
    return 1 if failed else 0


if __name__ == "__main__":
    # a shell that starts it in the background has SIGINT ignored; the others would end it at once,
    # and leave Snakemake behind
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    sys.exit(main(*sys.argv[1:]))
