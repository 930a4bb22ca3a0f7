"""Code in a process that nothing of the library is imported in, though the packages that take
seconds to import are: a fork of one that imported them once.
"""

import contextlib
import io
import multiprocessing
import os
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

HEAVY = [
    "bitsandbytes",
    "datasets",
    "peft",
    "scipy.stats",
    "statsmodels.formula.api",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mistral.modeling_mistral",
    "trl.trainer.dpo_trainer",
    "trl.trainer.sft_trainer",
]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(HEAVY)


def run(code: str, folder: Path, paths: list[Path], **environment: str) -> list[str]:
    """The lines that code prints, run in a folder with modules from `paths` first.

    Raises:
        AssertionError: it raised, with its traceback, or it ended in another way.
    """
    mine, its = FORKS.Pipe()
    known = os.environ | {"PYTEST_XDIST_WORKER": "forked"} | environment
    process = FORKS.Process(target=_run, args=(its, code, folder, list(map(str, paths)), known))
    process.start()
    its.close()
    try:
        said, error = mine.recv()
    except EOFError:
        said, error = "", "it ended without a word"
    process.join()
    assert not error, error
    return said.splitlines()


def _run(
    answers: Connection, code: str, folder: Path, paths: list[str], environment: dict[str, str]
) -> None:
    assert not [name for name in sys.modules if name.partition(".")[0] in ("driftbook", "bench")]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = paths
    error = ""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            exec(compile(code, "the code", "exec"), {"__name__": "__main__"})
        except SystemExit as stop:
            error = f"it ended with {stop.code}" if stop.code else ""
        except BaseException:
            error = traceback.format_exc()[-2000:]
    answers.send((said.getvalue(), error))
