"""Running a notebook as a job: unknown parameters refused, the executed notebook whole or not
there, errors in one sentence.
"""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from driftbook.batch import gpus, leases, shards
from driftbook.study.files import ROOT, WRITTEN, file_digest, read_json, replacing, write_json

ON_A_GPU = ("01_prepare", "02_train", "04_respond", "05_judge", "06_answer", "07_utility")
RECORDED = ("tables", "figures", "notebooks", "report.html")  # in a study's folder
KERNEL = "DRIFTBOOK_KERNEL"  # name of the kernel that make study offers; python3 where it is unset


class NotebookError(Exception):
    """A notebook stopped; the sentence names it, its work, and where its executed form is."""


class KernelDied(NotebookError):
    """A notebook's kernel was killed."""


def execute(notebook: Path, output: Path, parameters: dict[str, Any]) -> None:
    """Execute a notebook by papermill and keep the executed form at `output`, also where it
    stopped.

    Raises:
        ValueError: a parameter that the notebook does not have (papermill itself would only warn).
        NotebookError: a cell raised.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
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
        except DeadKernelError:
            error = KernelDied(
                f"{notebook.stem} stopped: its kernel was killed, perhaps because there was too"
                f" little memory; see {output}"
            )
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
    """Execute with parameters in JSON, and write the mark with the key that it had at its start and
    the files that it wrote; 0, or 1 with one sentence on stderr and in a file beside the output.

    The variants of a stage's job stand in its key: its notebook gets their run_ids, and marks.
    """
    trace = Path(output).with_suffix(".error.txt")
    trace.unlink(missing_ok=True)
    try:
        made_of = read_json(Path(key)) if key else {}
        given = json.loads(parameters)
        if "variants" in made_of:
            given["run_ids"] = shards.of_key(Path(key))
        on_a_gpu = gpus.held() if Path(notebook).stem in ON_A_GPU else contextlib.nullcontext()
        place = Path(output)
        with on_a_gpu, leases.shown(place.parent, place.name), recorded() as names:
            execute(Path(notebook), Path(output), given)
            if mark and "variants" not in made_of:
                write_mark(Path(mark), made_of, names())
    except (NotebookError, ValueError) as error:
        if isinstance(error, KernelDied) and "variants" in made_of:
            for run_id, planned in made_of["variants"].items():
                folder = Path(key).absolute().parents[3] / "runs" / run_id
                leases.record_death(folder, made_of["settings"]["stage"], planned)
        trace.write_text(f"{error}\n")
        print(error, file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def recorded() -> Iterator[Callable[[], list[Path]]]:
    """What this process and those that it starts write meanwhile (files.replacing), as a function
    that lists it.
    """
    with tempfile.NamedTemporaryFile(prefix="driftbook-", mode="r", encoding="utf-8") as names:
        os.environ[WRITTEN] = names.name
        try:
            yield lambda: [Path(line) for line in dict.fromkeys(names.read().splitlines())]
        finally:
            del os.environ[WRITTEN]


def write_mark(mark: Path, made_of: dict, written: list[Path]) -> None:
    """Write a job's mark: its key, and the digest of each file that it wrote in the study's folder
    and that nobody is to edit.
    """
    folder = mark.absolute().parent.parent
    files = {
        str(path.relative_to(folder)): file_digest(path)
        for path in written
        if path.is_relative_to(folder) and path.relative_to(folder).parts[0] in RECORDED
    }
    write_json(mark, {**made_of, "files": files})
