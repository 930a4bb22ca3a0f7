"""A process that has imported the heavy packages once and forks a kernel, or the run of a notebook,
per request (CPU only).

Imports of torch, transformers, peft and trl cost more than ten CPU seconds; a study has some thirty
jobs. Started by `make study`: `warm.py serve SOCKET`; asked by `warm.py notebook NOTEBOOK OUTPUT
PARAMETERS` (a job) and `warm.py kernel -f CONNECTION` (a kernelspec). Nothing may touch CUDA before
a fork, so machines with a GPU use ordinary kernels. This file imports only the standard library at
its top, because the two askers must start at once. Every process here ends when the one that
started it does.
"""

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import threading

SOCKET = "DRIFTBOOK_WARM"


def ask(kind: str, arguments: list[str]) -> int:
    """Have the server fork `kind` with this process's files, environment and folder; its exit
    status. Signals are passed on.
    """
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


def serve(path: str) -> None:
    """Import, say ready, and fork for each request until the starter is gone."""
    starter, imported = os.getppid(), threading.Event()
    watch = _end_with_parent(imported)
    _import_heavy_packages()
    imported.set()
    watch.join()  # no thread may run when this process forks
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(16)
        while os.getppid() == starter:
            if select.select([listener], [], [], 1)[0]:
                connection, _ = listener.accept()
                if os.fork() == 0:
                    listener.close()
                    os._exit(_attend(connection))
                connection.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def _import_heavy_packages() -> None:
    import ipykernel.kernelapp  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import papermill  # noqa: F401
    import peft  # noqa: F401
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

    import driftbook.training.fit  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # keeps the collector from touching, and so copying, the shared pages in every fork


def _attend(connection: socket.socket) -> int:
    """Fork what was asked for, and tell the asker its pid and its exit status; end it where the
    asker is gone.
    """
    head, files, _, _ = socket.recv_fds(connection, 8, 3)
    body = b""
    while len(body) < int.from_bytes(head):
        body += connection.recv(65536)
    request, parent = json.loads(body), os.getppid()
    pid = os.fork()
    if pid == 0:
        connection.close()
        os._exit(_become(request, files))
    for file in files:
        os.close(file)
    connection.sendall((json.dumps({"pid": pid}) + "\n").encode())
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        gone = select.select([connection], [], [], 0.05)[0] and not connection.recv(1)
        if gone or os.getppid() != parent:
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        connection.sendall(
            (json.dumps({"status": os.waitstatus_to_exitcode(status)}) + "\n").encode()
        )
    return 0


def _become(request: dict, files: list[int]) -> int:
    """In the forked child: take over the asker's files, folder and environment, and do what it
    asked for.
    """
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    _end_with_parent()
    _fresh_randomness()
    try:
        if request["kind"] == "kernel":
            os.environ["JPY_PARENT_PID"] = str(os.getppid())
            sys.argv = ["ipykernel_launcher", *request["arguments"]]
            from ipykernel.kernelapp import IPKernelApp

            IPKernelApp.launch_instance(argv=request["arguments"])
            return 0
        from driftbook.batch.notebooks import main

        return main(*request["arguments"])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _end_with_parent(stop: threading.Event | None = None) -> threading.Thread:
    """A thread that ends this process when its starter has ended, until `stop` is set."""
    parent, stop = os.getppid(), stop or threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            if os.getppid() != parent:
                os._exit(1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


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
        from driftbook.batch.notebooks import main

        sys.exit(main(*rest))
