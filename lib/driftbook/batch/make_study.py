"""`make study`: checks a study file, runs the Snakefile on it, and shows how far it is. The batch
itself is defined in the Snakefile.
"""

import contextlib
import ctypes
import fcntl
import getpass
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from driftbook.batch import cluster, gpus, plan, sizes
from driftbook.batch.leases import JOBS, Watch, began, clear_dead, living, own_words
from driftbook.batch.make_status import as_run, failures
from driftbook.batch.shards import Shards, read_shards
from driftbook.batch.warm import DRIVER
from driftbook.batch.watching import Part, clock_of, display, parts
from driftbook.study.files import (
    OUTPUTS,
    ROOT,
    check_path,
    check_writable,
    private_folder,
    write_json,
)
from driftbook.study.study_file import PLANNED, Study, find, load, study_digest

REQUESTS = "requests.json"  # what each job asks of a cluster, as the Snakefile reads it

FEWEST_FILES, OPEN_FILES = 256, 4096  # that a batch or its kernels hold at a time
PR_SET_PDEATHSIG = 1  # of prctl(2)
LONGEST_PLACE = 80  # bytes of the folder of a socket, whose path may have 107


def alone(study: Study) -> contextlib.AbstractContextManager[None]:
    """Holds the study, so that no second batch works on it at the same time; see `holding`."""
    return holding(study.folder, f"the study {study.name} is being run by another make study")


@contextlib.contextmanager
def holding(folder: Path, busy: str) -> Iterator[None]:
    """Holds the folder of a study or an audit.

    Raises:
        ValueError: another process holds it, as `busy` says, or its lock is a link to another file.
    """
    path = private_folder(folder) / ".lock"
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ValueError(f"cannot hold {path} ({error.strerror}); delete it") from None
    with open(lock):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{busy}; wait for it or stop it") from None
        except OSError as error:
            raise ValueError(
                f"cannot lock {path} ({error.strerror}); put the outputs on a file system with"
                " locks (DRIFTBOOK_OUTPUTS)"
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps(own_words()).encode(), 0)  # for make status
        try:
            yield
        finally:
            os.ftruncate(lock, 0)


def clear_unfinished(folder: Path, watch: Watch | None = None) -> bool:
    """Delete what a killed batch was writing; whole files have other names. What a job of a lost
    driver may still be writing on another machine stays: the run that it works on, and beside the
    runs everything while any job lives. Whether any does, as far as `watch` saw of it.
    """
    places = (*folder.glob("runs/*/.lease.*"), *folder.glob(f"{JOBS}/.lease.*"))
    leased = {lease.parent for lease in places}
    alive = {one for one in leased if living(one, watch)}
    for one in leased - alive:
        clear_dead(one)
    for path in _half_written(folder / "runs" if alive else folder):
        if alive.isdisjoint(path.parents):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(True)
    return bool(alive)


def _half_written(folder: Path) -> list[Path]:
    """What is being written below a folder; others may finish it while this is listed."""
    found = []
    for place, folders, files in os.walk(folder):
        found += [Path(place, name) for name in (*folders, *files) if name.startswith(".new-")]
        folders[:] = [name for name in folders if not name.startswith(".new-")]
    return found


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A private folder for a while, whose path is short enough for a socket in it."""
    place = "/tmp" if len(os.fsencode(tempfile.gettempdir())) > LONGEST_PLACE else None
    with tempfile.TemporaryDirectory(prefix="driftbook-", dir=place) as scratch:
        yield Path(scratch)


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
    with scratch_folder() as scratch, log.open("w") as output:
        socket = scratch / "warm"
        spec = scratch.joinpath("kernels", "driftbook-warm", "kernel.json")
        spec.parent.mkdir(parents=True)
        kernel = [sys.executable, "-m", "driftbook.batch.warm", "kernel", "-f", "{connection_file}"]
        spec.write_text(
            json.dumps({"argv": kernel, "display_name": "Driftbook, warm", "language": "python"})
        )
        server = subprocess.Popen(
            [sys.executable, "-m", "driftbook.batch.warm", "serve", str(socket), str(os.getpid())],
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
                "JUPYTER_PATH": str(scratch),
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


def environment(study: Study | None = None, study_file: Path | None = None) -> dict[str, str]:
    """The environment of every job: one thread per process on a CPU (two processes of one thread
    each beat one of two), no telemetry; and what the study file said when the work was planned.
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
        **_named(),
        **os.environ,
        **quiet,
        **threads,
        "PYTHONWARNINGS": "ignore",
        "DRIFTBOOK_ROOT": str(ROOT),
        "DRIFTBOOK_OUTPUTS": str(OUTPUTS),
        **({} if study is None else {PLANNED: f"{study_digest(study)} {study_file}"}),
    }


def snakemake(
    study_file: Path, profile: str, targets: Sequence[str] = (), more: Sequence[str] = ()
) -> list[str]:
    """The command that runs the batch; `more` says what it may use."""
    return [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        str(ROOT / "Snakefile"),
        "--profile",
        str(ROOT / "profiles" / profile),
        "--config",
        # neither a shell nor YAML reads anything else in it, here or on a node
        f"study={quote(str(study_file))}",
        *more,
        "--",
        *targets,
    ]


def open_files() -> None:
    """Let this process and those it starts hold as many files as they need.

    Raises:
        ValueError: the system allows too few.
    """
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if most == resource.RLIM_INFINITY else min(OPEN_FILES, most)
    if wanted < FEWEST_FILES:
        raise ValueError(
            f"a process may hold {most} files here and a batch needs {FEWEST_FILES}; raise the"
            f" limit with ulimit -n {OPEN_FILES}"
        )
    if now != resource.RLIM_INFINITY and now < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _named() -> dict[str, str]:
    """A name for a user without one, which a container may run as and Snakemake asks for."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        return {"USER": f"user-{os.getuid()}"}
    return {}


@contextlib.contextmanager
def _planned(
    study_file: Path, path: Path, profile: str, surroundings: dict[str, str], finished: bool
) -> Iterator[Path]:
    """The file in which the plan of the time left will be, made in a process of its own, forked
    where jobs are: it reads the study's texts and tokenizers, which takes seconds.
    """
    path.unlink(missing_ok=True)
    words = [str(study_file), str(path), profile]
    command = [sys.executable, "-m", "driftbook.batch.warm", "plan", *words]
    quiet = {"env": surroundings, "cwd": ROOT, "stdout": subprocess.DEVNULL}
    process = None if finished else subprocess.Popen(command, stderr=subprocess.DEVNULL, **quiet)
    try:
        yield path
    finally:
        if process is not None:
            process.kill()
            process.wait()


def _gpus() -> int:
    """How many jobs may hold a GPU at a time; without one, models run on the cores and nothing is
    held.
    """
    return len(gpus.numbers()) or 1024


def _place(study: Study, study_file: Path, asked: cluster.Cluster | None, shards: Shards):
    """Where jobs run: what Snakemake may use there, and their environment."""
    here, requests = environment(study, study_file), study.folder / REQUESTS
    requests.unlink(missing_ok=True)
    if asked is None:
        driver = f"{os.getpid()} {began(os.getpid())}"
        return ["--resources", f"gpu={_gpus()}"], here | {DRIVER: driver}
    from driftbook.batch.cluster_jobs import requests as requested  # imports models: seconds

    words = cluster.arguments(asked, study)
    write_json(requests, requested(asked, study, shards))
    return words, cluster.surroundings(asked, here)


def _end_with_this_process() -> None:
    """In a child before it begins: let the system end it with its parent, where it can (Linux), so
    that no Snakemake goes on submitting jobs of a killed `make study`.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _seen(study: Study, shards: Shards) -> Callable[[], tuple[list[Part], float]]:
    """A function that reads the parts of the work, and says how many seconds ago it was made."""
    clock = clock_of(study.folder)
    started = clock()
    return lambda: (parts(study, shards, started, clock()), clock() - started)


def _run_batch(
    study: Study,
    study_file: Path,
    profile: str,
    asked: cluster.Cluster | None,
    targets: tuple[str, ...] = (),
) -> int:
    """Run the planned batch with a live display; Snakemake's exit status. Its own words go to
    snakemake.log in the study's folder.
    """
    parent, shards = os.getppid(), read_shards(study)
    now = _seen(study, shards)
    finished = all(part.done == part.total for part in now()[0])
    for stale in study.folder.glob("notebooks/*.error.txt"):
        stale.unlink()
    more, here = _place(study, study_file, asked, shards)
    log_of_forks = study.folder / "warm.log"
    with (
        warm_kernels(here, log_of_forks, finished or asked is not None) as surroundings,
        (study.folder / "snakemake.log").open("w") as log,
        _planned(
            study_file, study.folder / "plan.json", profile, surroundings, finished
        ) as planned,
    ):
        process = subprocess.Popen(
            snakemake(study_file, profile, targets, more),
            env=surroundings,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=_end_with_this_process,
        )
        try:
            with display(study, planned, shards.workers) as show:
                while process.poll() is None:
                    show(*now())
                    if (
                        os.getppid() != parent
                    ):  # make was killed: end everything that was started for it
                        raise KeyboardInterrupt
                    time.sleep(0.5)
                show(*now())
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if asked:
                cluster.cancel(study)
    return process.returncode


def main(study: str, profile: str = "local", *targets: str) -> int:
    """Run a study; 0, 1 where a variant or a notebook failed, 2 where the study could not begin."""
    try:
        path = find(study)
        named = {"the checkout": ROOT, "the folder of outputs": OUTPUTS, "the study file": path}
        for what, one in named.items():
            check_path(one, what)
        checked = load(path)
        if asked := cluster.read(profile):
            cluster.check_paths({"the checkout": ROOT, "the folder of outputs": OUTPUTS})
        check_writable(checked.folder)
        if memory := asked.memory if asked else gpus.gpu_memory():
            sizes.check_fits(checked, memory)
        open_files()
        with alone(checked):
            watch = Watch()
            others = clear_unfinished(checked.folder, watch)
            if asked:  # a lost driver's jobs: what they finished is kept
                cluster.cancel(checked)
            workers, memory = (asked.jobs, asked.memory) if asked else (gpus.at_once(), None)
            if again := plan.write(checked, workers, memory):
                print(again, flush=True)
            started = time.time()
            status = _run_batch(checked, path, profile, asked, targets)
            if others:  # by now it shows which of them were dead
                clear_unfinished(checked.folder, watch)
    except (Exception, KeyboardInterrupt) as error:
        if _interrupted(error):
            print("stopped; make study goes on from here", file=sys.stderr)
            return 130
        if not isinstance(error, ValueError):
            raise
        print(f"driftbook: {error}", file=sys.stderr)
        return 2
    for line in cluster.stopped(checked) if asked and status else ():
        print(f"driftbook: {line}", file=sys.stderr)
    return conclude(checked, study, status, time.time() - started)


def _interrupted(error: BaseException | None) -> bool:
    """Whether an error is an interrupt, or came up while one was handled: what is interrupted
    between the end of a step and its note of it (shutil.rmtree closing a folder) fails once more.
    """
    while error and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


# how Snakemake tells of a job that failed
_FAILED_JOB = re.compile(
    r"Command '.*? '?notebooks/([^'\s]+)\.ipynb.*?' (died with .*?>|returned .*? status \d+)\.",
    re.DOTALL,
)


def _silent(log: str) -> str:
    """Which jobs ended without a word of their own, as a process does that the system kills."""
    found = dict.fromkeys(f"{job} {how}" for job, how in _FAILED_JOB.findall(log))
    return f": {', '.join(found)}" if found else ""


def conclude(study: Study, name: str, status: int, seconds: float) -> int:
    """Say how it ended: the report, or what failed and where to look; the exit status."""
    said = failures(study, name)
    for line in said:
        print(f"driftbook: {line}", file=sys.stderr)
    if status and not said:
        log = study.folder / "snakemake.log"
        jobs = _silent(log.read_text(encoding="utf-8", errors="replace") if log.exists() else "")
        print(
            f"driftbook: the batch stopped{jobs}; see {log}; {as_run(name)} goes on from there",
            file=sys.stderr,
        )
    if status:
        return 1
    from driftbook.batch.collecting import status as failed_runs

    failed = failed_runs(study)
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
