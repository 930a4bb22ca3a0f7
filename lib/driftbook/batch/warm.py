"""A process that has imported the heavy packages once and forks a kernel, the run of a notebook, or
the plan of the time left, per request (CPU only).

Imports of torch, transformers, peft and trl cost more than ten CPU seconds; a study has some thirty
jobs. Started by `make study`: `warm.py serve SOCKET PID`, its own pid; asked by `warm.py notebook
NOTEBOOK OUTPUT PARAMETERS` (a job), `warm.py kernel -f CONNECTION` (a kernelspec) and `warm.py plan
STUDY PLAN PROFILE`. Nothing may touch CUDA before a fork, so machines with a GPU use ordinary
kernels. This file imports only the standard library at its top, because the askers must start at
once. Every process here ends when the one that started it does.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import socketserver
import sys
import threading
import time

SOCKET = "DRIFTBOOK_WARM"
DRIVER = "DRIFTBOOK_DRIVER"  # of make study on this machine: its pid, and when it began


def ask(kind: str, arguments: list[str]) -> int:
    """Have the server fork `kind` with this process's files, environment and folder; its exit
    status. Signals are passed on.
    """
    if kind == "kernel":  # its starter may be killed; a job's asker ends when the server does
        _end_with_parent(int(os.environ["JPY_PARENT_PID"]))
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ[SOCKET])
    request = {
        "kind": kind,
        "arguments": arguments,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
    }
    socket.send_fds(connection, [len(body := json.dumps(request).encode()).to_bytes(8)], [0, 1, 2])
    connection.sendall(body)
    answers = connection.makefile("r")
    pid = json.loads(answers.readline())["pid"]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: os.kill(pid, received))
    line = answers.readline()
    return json.loads(line)["status"] if line else 1


def serve(path: str, starter: str) -> None:
    """Import, say ready, and fork for each request until the starter, by its pid, is gone."""
    imported = threading.Event()
    watch = _end_with_parent(int(starter), imported)
    _import_heavy_packages()
    imported.set()
    watch.join()  # no thread may run when this process forks

    class Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
        pid = os.getpid()

        def service_actions(self) -> None:
            super().service_actions()  # forgets children that ended
            if os.getppid() != int(starter):
                os._exit(1)

    with Server(path, Attendant) as server:
        server.serve_forever(poll_interval=0.5)


def _import_heavy_packages() -> None:
    """Import what jobs need, and read the library's code as it is imported: a job's key must be of
    the code that it runs, even where a file is edited meanwhile.
    """
    import ipykernel.kernelapp  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import papermill  # noqa: F401
    import seaborn  # noqa: F401
    import statsmodels.formula.api  # noqa: F401
    import torch
    import trl  # noqa: F401
    from transformers import (  # noqa: F401
        GemmaForCausalLM,
        LlamaForCausalLM,
        MistralForCausalLM,
        Qwen2ForCausalLM,
    )

    from driftbook.batch import keys
    from driftbook.study import code

    for module in keys.modules():
        importlib.import_module(module)
        code.source(module)
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # keeps the collector from touching, and so copying, the shared pages in every fork


class Attendant(socketserver.BaseRequestHandler):
    """Forks what was asked for, and tells the asker its pid and its exit status; ends it where the
    asker is gone.
    """

    def handle(self) -> None:
        connection, attendant = self.request, os.getpid()
        head, files, _, _ = socket.recv_fds(connection, 8, 3)
        with connection.makefile("rb") as body:
            request = json.loads(body.read(int.from_bytes(head)))
        pid = os.fork()
        if pid == 0:
            connection.close()
            os._exit(_become(request, files, attendant))
        for file in files:
            os.close(file)
        self.answer(pid=pid)
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            gone = select.select([connection], [], [], 0.05)[0] and not connection.recv(1)
            if gone or os.getppid() != self.server.pid:
                os.kill(pid, signal.SIGKILL)
        self.answer(status=os.waitstatus_to_exitcode(ended[1]))

    def answer(self, **words: int) -> None:
        with contextlib.suppress(OSError):
            self.request.sendall((json.dumps(words) + "\n").encode())


def _become(request: dict, files: list[int], attendant: int) -> int:
    """In the forked child: take over the asker's files, folder and environment, and do what it
    asked for.
    """
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    _end_with_parent(attendant)
    _fresh_randomness()
    try:
        if request["kind"] == "kernel":
            os.environ["JPY_PARENT_PID"] = str(attendant)
            sys.argv = ["ipykernel_launcher", *request["arguments"]]
            from ipykernel.kernelapp import IPKernelApp

            IPKernelApp.launch_instance(argv=request["arguments"])
            return 0
        return _do(request["kind"], request["arguments"])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _do(kind: str, arguments: list[str]) -> int:
    """Run a notebook, or make a plan, in this process; its exit status."""
    if kind == "plan":
        from driftbook.batch import schedule

        return schedule.main(*arguments)
    from driftbook.batch.notebooks import run_notebook

    return run_notebook(*arguments)


def _end_with_parent(parent: int, stop: threading.Event | None = None) -> threading.Thread:
    """A thread that ends this process when its starter has ended, until `stop` is set. The starter
    gives its pid: it may have ended before its child can ask.
    """
    stop = stop or threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            if os.getppid() != parent:
                os._exit(1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def _end_with_driver(pid: str, began: str) -> None:
    """A thread that ends this process, and by that its kernel, when make study has ended."""
    from driftbook.batch import leases

    def watch() -> None:
        while leases.is_alive({"pid": int(pid), "started": float(began)}):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _fresh_randomness() -> None:
    """Forks would share the state of every generator; nothing here may depend on it, and so it is
    drawn anew.
    """
    import random

    import numpy
    import torch

    random.seed()
    numpy.random.seed()
    torch.seed()


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "serve":
        serve(*rest)
    elif os.environ.get(SOCKET):
        sys.exit(ask(command, rest))
    else:
        if driver := os.environ.get(DRIVER):
            _end_with_driver(*driver.split())
        sys.exit(_do(command, rest))
