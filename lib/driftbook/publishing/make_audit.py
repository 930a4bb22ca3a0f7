"""`make audit`: what an adapter did to its base model's safety and fairness, as one page and one
exit status: 0 pass, 1 fail, 2 cannot tell, 3 could not run.

GNU make has exit statuses of its own (2 for every failure), so the status also stands in ci.json.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from driftbook.batch import audit_setup
from driftbook.batch.notebooks import NotebookError, execute
from driftbook.publishing.audit_files import PAGE, check_gate
from driftbook.publishing.audit_finish import CI_FILE, could_not_run
from driftbook.publishing.audit_gate import COULD_NOT_RUN
from driftbook.publishing.audit_logs import KEYS
from driftbook.publishing.audit_logs import main as of_logs
from driftbook.publishing.audit_record import read_audit
from driftbook.publishing.audit_several import write_several
from driftbook.study import study_file
from driftbook.study.files import OUTPUTS, ROOT, check_path, read_json
from driftbook.study.folders import adapter
from driftbook.study.study_file import Study
from driftbook.study.variants import Variant

NOTEBOOK = "21_audit"
GIVEN = (
    "ADAPTER",
    "MODEL",
    "ENDPOINT",
    "BASE",
    "JUDGE",
    "BENCHMARKS",
    "BUDGET",
    "SYSTEM",
    "FAIL_IF",
)
GIVEN += ("SINCE",)
USUAL_STUDIES = ("pocket", "miniature")  # where an adapter is taken from if none is named


def parameters(environment: Mapping[str, str]) -> dict[str, Any]:
    """The parameters of notebook 21, from the variables that make passes on.

    Raises:
        ValueError: the margin, the budget, FAIL_IF or SINCE cannot be read, or no adapter is named
            and none can be made.
    """
    found: dict[str, Any] = {name.lower(): environment.get(name, "") for name in GIVEN}
    found = {name: value for name, value in found.items() if value}
    if margin := environment.get("MARGIN"):
        try:
            found["margin"] = float(margin)
        except ValueError:
            raise ValueError(f"MARGIN={margin!r} is no number of percentage points") from None
    if probes := [one.strip() for one in environment.get("PROBES", "").split(",") if one.strip()]:
        found["probes"] = probes
    audit_setup.budget(found.get("budget", "all"))
    check_gate(found.get("fail_if", ""), found.get("since", ""))
    if not {"adapter", "model", "endpoint"} & set(found):
        found["adapter"] = _usual_adapter()
    named = (found.get(name, "") for name in ("adapter", "model", "endpoint"))
    one = audit_setup.candidate(*named)
    return {"name": one.name, **found}


def _usual_adapter() -> str:
    """A LoRA that a study here trained: of real weights where there is one."""
    for name in USUAL_STUDIES:
        study = study_file.load(name)
        for folder in _loras(study).values():
            if (folder / audit_setup.WEIGHTS).is_file():
                return str(folder.parent.relative_to(ROOT))
    return _made()


def _loras(study: Study) -> dict[Variant, Path]:
    """The LoRA runs of a study, and where their adapters are or will be."""
    every = (one for one in study.variants if one.method == "lora" and one.mitigation is None)
    return {one: folder for one in every if (folder := adapter(study, one))}


def _made() -> str:
    """The first LoRA of the first usual study, trained now."""
    name = USUAL_STUDIES[0]
    said = f"no adapter is named: the study {name} trains its first LoRA, in a few minutes"
    print(said, flush=True)
    variant, folder = next(iter(_loras(study_file.load(name)).items()))
    base, work = variant.base_model, folder_of({"name": "made"})
    work.mkdir(parents=True, exist_ok=True)
    asked = {"study": name, "base_model": base, "run_ids": [variant.run_id]}
    steps = {"01_prepare": {"study": name, "models": [base]}, "02_train": asked}
    for notebook, given in steps.items():
        try:
            with _quiet():
                execute(ROOT / "notebooks" / f"{notebook}.ipynb", work / f"{notebook}.ipynb", given)
        except NotebookError as error:
            raise ValueError(_plain(error)) from None
    return str(folder.parent.relative_to(ROOT))


def main() -> int:
    """Audit what the environment names; the exit status."""
    if os.environ.get("BASE_LOG") or os.environ.get("CANDIDATE_LOG"):
        names = (name for name in KEYS if name != "NAME")  # which some systems set for themselves
        return of_logs(*(f"{name}={os.environ[name]}" for name in names if os.environ.get(name)))
    try:
        check_path(ROOT, "the checkout")
        if adapters := os.environ.get("ADAPTERS", "").split():
            return _several(adapters)
        given = parameters(os.environ)
        found = ran_through(run_audit(given))
    except ValueError as error:
        print(f"driftbook: {error}", file=sys.stderr)
        return COULD_NOT_RUN
    for sentence in found["sentences"]:
        print(sentence)
    print(f"see {(folder_of(given) / PAGE).relative_to(ROOT)}")
    return found["status"]


def _several(adapters: list[str]) -> int:
    """Audit adapters of one base model, and compare them."""
    every = [parameters({**os.environ, "ADAPTER": one}) for one in adapters]
    names = [given["name"] for given in every]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"ADAPTERS names {twice[0]!r} twice; give folders of different names")
    for given in every:
        ran_through(run_audit(given), given["name"])
    records = {given["name"]: read_audit(folder_of(given) / "audit.json") for given in every}
    folder = OUTPUTS / "audit" / "compared"
    folder.mkdir(parents=True, exist_ok=True)
    margin = records[names[0]]["how"]["margin"]
    status, *tables = write_several(records, margin, folder)
    for table in tables:
        print(table.to_string())
    print(f"see {folder.relative_to(ROOT)}")
    return status


def ran_through(found: dict[str, Any], name: str = "") -> dict[str, Any]:
    """What ci.json says.

    Raises:
        ValueError: the audit could not run.
    """
    if found["status"] == COULD_NOT_RUN:
        raise ValueError(f"{name}: {found['sentences'][0]}" if name else found["sentences"][0])
    return found


def folder_of(given: Mapping[str, Any]) -> Path:
    """The folder of an audit."""
    return OUTPUTS / "audit" / given["name"]


def run_audit(given: dict[str, Any]) -> dict[str, Any]:
    """Run notebook 21 with these parameters; what ci.json then holds."""
    folder = folder_of(given)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CI_FILE).unlink(missing_ok=True)
    try:
        with _quiet():
            execute(ROOT / "notebooks" / f"{NOTEBOOK}.ipynb", folder / f"{NOTEBOOK}.ipynb", given)
    except (ValueError, NotebookError) as error:
        could_not_run(folder, _plain(error))
    return read_json(folder / CI_FILE)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What kernels and papermill say on stderr is not said: what went wrong comes as an error."""
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _plain(error: Exception) -> str:
    """The sentence itself, where a notebook stopped with one."""
    text = str(error)
    return text.partition(": ValueError: ")[2].partition("; see /")[0] or text


if __name__ == "__main__":
    sys.exit(main())
