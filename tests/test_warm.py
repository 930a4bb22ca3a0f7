"""Warm kernels: a job's status and words come back, and a job ends with the one that asked
for it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from conftest import one_sentence
from driftbook.study.files import ROOT

LIGHT = """
import os, time
import driftbook.batch.warm as warm

warm._import_heavy_packages = warm._fresh_randomness = lambda: None
"""


def server_at(path: Path, before: str = "") -> subprocess.Popen:
    """A warm server that has imported nothing heavy; `before` is code that it runs first."""
    serve = f"warm.serve({str(path)!r}, {str(os.getpid())!r})"
    server = subprocess.Popen([sys.executable, "-c", f"{LIGHT}{before}\n{serve}"])
    while not path.exists():
        assert server.poll() is None
        time.sleep(0.05)
    return server


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """The environment to ask a warm server that has imported nothing heavy."""
    path = tmp_path_factory.mktemp("warm") / "socket"
    server = server_at(path)
    given = {"DRIFTBOOK_WARM": str(path), "JPY_PARENT_PID": str(os.getpid())}
    yield os.environ | given
    server.kill()
    server.wait()


def ask(warm, *arguments, **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "driftbook.batch.warm", *arguments],
        env=warm,
        capture_output=True,
        text=True,
        timeout=60,
        **more,
    )


@pytest.mark.slow
def test_a_warm_job_returns_its_status_and_its_words(warm, tmp_path):
    notebook, output = str(ROOT / "notebooks" / "01_prepare.ipynb"), str(tmp_path / "out.ipynb")
    ended = ask(warm, "notebook", notebook, output, json.dumps({"no_such": 1}))
    assert ended.returncode == 1
    assert "no_such" in one_sentence(ended.stderr)


def test_a_warm_kernel_that_cannot_start_returns_a_status_that_is_not_zero(warm, tmp_path):
    (tmp_path / "connection.json").write_text("no JSON")
    ended = ask(warm, "kernel", "-f", str(tmp_path / "connection.json"))
    assert ended.returncode not in (0, None)


def test_a_warm_job_that_is_killed_does_not_pass_for_done(warm, tmp_path):
    job = Asked(warm, tmp_path)
    assert job.runs()
    os.kill(job.pid, signal.SIGKILL)
    assert json.loads(job.answers.readline())["status"] != 0


def test_a_warm_job_ends_with_the_one_that_asked_for_it(warm, tmp_path):
    job = Asked(warm, tmp_path)
    assert job.runs()
    job.answers.close()
    job.connection.close()
    assert ends(job.pid)


LATE = """
handle = warm.Attendant.handle
warm.Attendant.handle = lambda self: (time.sleep(1), handle(self))
"""


def test_a_warm_job_ends_with_a_server_that_died_before_the_job_began(tmp_path):
    server = server_at(tmp_path / "socket", LATE)
    threading.Timer(0.5, server.kill).start()
    job = Asked(os.environ | {"DRIFTBOOK_WARM": str(tmp_path / "socket")}, tmp_path)
    server.wait()
    assert ends(job.pid)


def test_a_server_ends_whose_starter_died_before_it_could_ask(tmp_path):
    starter = subprocess.Popen([sys.executable, "-c", ""])
    starter.wait()
    serve = f"{LIGHT}warm.serve({str(tmp_path / 'socket')!r}, {str(starter.pid)!r})"
    assert subprocess.run([sys.executable, "-c", serve], timeout=20).returncode == 1


def test_the_asker_of_a_kernel_ends_with_the_one_that_wants_the_kernel(tmp_path):
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket"))
    listening.listen()
    start = (
        "import os, subprocess, sys; os.environ['JPY_PARENT_PID'] = str(os.getpid());"
        "asker = [sys.executable, '-m', 'driftbook.batch.warm', 'kernel', '-f', 'x'];"
        "print(subprocess.Popen(asker, stdout=subprocess.DEVNULL).pid)"
    )
    given = os.environ | {"DRIFTBOOK_WARM": str(tmp_path / "socket")}
    wanted = subprocess.run([sys.executable, "-c", start], env=given, stdout=subprocess.PIPE)
    assert ends(int(wanted.stdout))


class Asked:
    """A job of the warm server that waits for a pipe that nobody writes, asked for by this process:
    its pid, and its status when it ends.
    """

    def __init__(self, warm, folder):
        os.mkfifo(folder / "99_pipe.ipynb")
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(warm["DRIFTBOOK_WARM"])
        request = {
            "kind": "notebook",
            "arguments": [str(folder / "99_pipe.ipynb"), str(folder / "out.ipynb"), "{}"],
            "folder": str(folder),
            "environment": warm,
        }
        body = json.dumps(request).encode()
        with open(os.devnull, "r+") as nothing:
            socket.send_fds(self.connection, [len(body).to_bytes(8)], [nothing.fileno()] * 3)
        self.connection.sendall(body)
        self.answers = self.connection.makefile("r")
        self.pid = json.loads(self.answers.readline())["pid"]

    def runs(self) -> bool:
        return runs(self.pid)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ends(pid: int) -> bool:
    """Whether a process ends within 20 seconds."""
    deadline = time.time() + 20
    while runs(pid) and time.time() < deadline:
        time.sleep(0.1)
    return not runs(pid)
