"""Running a notebook as a job: unknown parameters refused, the executed notebook whole or not
there, errors in one sentence.
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from driftbook.batch import gpus
from driftbook.study.files import ROOT, replacing

ON_A_GPU = ("01_prepare", "02_train", "04_respond", "05_judge", "06_answer", "07_utility")
KERNEL = "DRIFTBOOK_KERNEL"  # name of the kernel that make study offers; python3 where it is unset


class NotebookError(Exception):
    """A notebook stopped; the sentence names it, its work, and where its executed form is."""


def execute(notebook: Path, output: Path, parameters: dict[str, Any]) -> None:
    """Execute a notebook by papermill and keep the executed form at `output`, also where it
    stopped.

    Raises:
        ValueError: a parameter that the notebook does not have (papermill itself would only warn).
        NotebookError: a cell raised.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    check_parameters(notebook, parameters)
    with replacing(output) as new:
        try:
            papermill.execute_notebook(
                _as_written(notebook),
                _as_written(new),
                parameters=parameters,
                kernel_name=os.environ.get(KERNEL, "python3"),
                progress_bar=False,
                log_output=False,
                cwd=str(ROOT),
            )
            error = None
        except PapermillExecutionError as stopped:
            error = NotebookError(
                f"{notebook.stem} stopped in cell {stopped.exec_count}: {stopped.ename}:"
                f" {stopped.evalue}; see {output}"
            )
    if error:
        raise error


def check_parameters(notebook: Path, parameters: dict[str, Any]) -> None:
    """Raise a ValueError where a notebook has no such parameter."""
    from papermill import inspect_notebook

    known = inspect_notebook(_as_written(notebook))
    unknown = [name for name in parameters if name not in known]
    if unknown:
        raise ValueError(
            f"{notebook.stem} has no parameter {unknown[0]!r}; it takes {', '.join(known)}"
        )


def _as_written(path: Path) -> str:
    """The path for papermill, which would fill in what stands in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def run_notebook(notebook: str, output: str, parameters: str, key: str = "", mark: str = "") -> int:
    """Execute with parameters in JSON, and write the mark with the key that it had at its start;
    0, or 1 with one sentence on stderr and in a file beside the output.
    """
    trace = Path(output).with_suffix(".error.txt")
    trace.unlink(missing_ok=True)
    try:
        made_of = Path(key).read_text(encoding="utf-8") if key else ""
        with gpus.held() if Path(notebook).stem in ON_A_GPU else contextlib.nullcontext():
            execute(Path(notebook), Path(output), json.loads(parameters))
        if mark:
            with replacing(Path(mark)) as new:
                new.write_text(made_of)
    except (NotebookError, ValueError) as error:
        trace.write_text(f"{error}\n")
        print(error, file=sys.stderr)
        return 1
    return 0
