"""`make audit`: what an adapter did to its base model's safety and fairness, as one page and one
exit status: 0 pass, 1 fail, 2 cannot tell, 3 could not run.

GNU make has exit statuses of its own (2 for every failure), so the status also stands in ci.json.
"""

import contextlib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from driftbook.batch import audit_setup
from driftbook.batch.make_study import holding
from driftbook.batch.notebooks import NotebookError, execute
from driftbook.publishing.audit_files import check_gate
from driftbook.publishing.audit_finish import CI_FILE, PAGE, begin, could_not_run, has_not_ended
from driftbook.publishing.audit_formats import ci_json
from driftbook.publishing.audit_gate import COULD_NOT_RUN, MEANINGS, worst
from driftbook.publishing.audit_logs import KEYS
from driftbook.publishing.audit_logs import main as of_logs
from driftbook.publishing.audit_record import read_audit
from driftbook.publishing.audit_several import write_several
from driftbook.study import study_file
from driftbook.study.files import (
    OUTPUTS,
    ROOT,
    check_path,
    check_writable,
    private_folder,
    read_json,
    replacing,
)
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
GIVEN += ("SINCE", "TEMPLATE")
OF_MODELS = ("ADAPTER", "ADAPTERS", "ENDPOINT")  # what is asked, where no logs are read
PLACES = ("ADAPTER", "MODEL", "BASE", "JUDGE", "BENCHMARKS", "SINCE")
PLACES += ("BASE_LOG", "CANDIDATE_LOG", "ALIGNED", "UNALIGNED")  # paths, or names on the hub
COMPARED = "compared"  # the folder of several audits together
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
        if not 0 < found["margin"] < 100:
            raise ValueError(f"MARGIN={margin!r}: give percentage points above 0, such as 3")
    if probes := [one.strip() for one in environment.get("PROBES", "").split(",") if one.strip()]:
        found["probes"] = probes
    audit_setup.budget(found.get("budget", "all"))
    check_gate(found.get("fail_if", ""), found.get("since", ""))
    if not {"adapter", "model", "endpoint"} & set(found):
        found["adapter"] = _usual_adapter()
    named = (found.get(name, "") for name in ("adapter", "model", "endpoint"))
    one = audit_setup.candidate(*named)
    return {"name": one.place, **found}


def _usual_adapter() -> str:
    """A LoRA that a study here trained: of real weights where there is one."""
    for name in USUAL_STUDIES:
        study = study_file.load(name)
        for folder in _loras(study).values():
            if (folder / audit_setup.WEIGHTS).is_file():
                return as_printed(folder.parent)
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
    private_folder(work)
    asked = {"study": name, "base_model": base, "run_ids": [variant.run_id]}
    steps = {"01_prepare": {"study": name, "models": [base]}, "02_train": asked}
    for notebook, given in steps.items():
        try:
            with _quiet():
                execute(ROOT / "notebooks" / f"{notebook}.ipynb", work / f"{notebook}.ipynb", given)
        except NotebookError as error:
            raise ValueError(_plain(error)) from None
    return as_printed(folder.parent)


def main() -> int:
    """Audit what the environment names; the exit status."""
    if os.environ.get("BASE_LOG") or os.environ.get("CANDIDATE_LOG"):
        if both := next((name for name in OF_MODELS if os.environ.get(name)), None):
            print(f"driftbook: give {both}= or two logs, not both", file=sys.stderr)
            return COULD_NOT_RUN
        names = (name for name in KEYS if name != "NAME")  # which some systems set for themselves
        return of_logs(*(f"{name}={os.environ[name]}" for name in names if os.environ.get(name)))
    adapters = os.environ.get("ADAPTERS", "").split()
    folders: list[Path] = []
    try:
        check_path(ROOT, "the checkout")
        check_writable(OUTPUTS / "audit")
        folders = _begun(adapters)
        if adapters:
            return _several(adapters)
        given = parameters(os.environ)
        _announce([given])
        found = ran_through(run_audit(given))
    except ValueError as error:
        print(f"driftbook: {error}", file=sys.stderr)
        for folder in filter(has_not_ended, folders):
            could_not_run(folder, str(error))
        return COULD_NOT_RUN
    print(*[row["sentence"] for row in found["verdicts"]], sep="\n")
    if {"fail_if", "since"} & set(given):  # else the words above decide
        print(*found["sentences"], sep="\n")
    print(f"{_ended(found['status'])}; see {as_printed(folder_of(given) / PAGE)}")
    return found["status"]


def _announce(every: list[dict[str, Any]]) -> None:
    """Say what is being done, since nothing is heard of it until it ends."""
    names = " and ".join(audit_setup.without_digits(given["name"]) for given in every)
    how = f"BUDGET={every[0].get('budget') or '10 minutes'}"
    if not how.endswith("all"):
        how += "; BUDGET=all asks everything once, for narrower intervals"
    print(f"asking {names} and the base model the same prompts ({how}) ...", flush=True)


def _ended(status: int) -> str:
    """An exit status in words; make itself ends with 2 whatever it is."""
    return f"{MEANINGS[status]} (status {status} in {CI_FILE})"


def as_printed(path: Path) -> str:
    """A path as it is printed: from the root of the checkout where it is inside."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _begun(adapters: list[str]) -> list[Path]:
    """The folders of what is to be audited, in which the audits are begun: where one cannot even be
    read, an earlier one would be taken for it.
    """
    others = [os.environ.get(name, "") for name in ("MODEL", "ENDPOINT")]
    asked = [[one, *others] for one in adapters or [os.environ.get("ADAPTER", "")]]
    names = [audit_setup.place_of(*one) for one in asked if any(one)]
    folders = [folder_of({"name": name}) for name in [*names, *[COMPARED] * bool(adapters)]]
    for folder in folders:
        begin(folder)
    return folders


def _several(adapters: list[str]) -> int:
    """Audit adapters of one base model, and compare them."""
    every = [parameters({**os.environ, "ADAPTER": one}) for one in adapters]
    _announce(every)
    names = [given["name"] for given in every]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"ADAPTERS names {twice[0]!r} twice; name each adapter once")
    short = [audit_setup.without_digits(name) for name in names]
    names = names if len(set(short)) < len(short) else short
    asked = dict(zip(names, every, strict=True))
    found = {name: ran_through(run_audit(given), name) for name, given in asked.items()}
    records = {name: read_audit(folder_of(given) / "audit.json") for name, given in asked.items()}
    folder = folder_of({"name": COMPARED})
    private_folder(folder)
    margin = records[names[0]]["how"]["margin"]
    status, *tables = write_several(records, margin, folder)
    for table in tables:
        print(table.to_string())
    if any("fail_if" in given for given in every):  # then not the words decide, but what was said
        status = worst(one["status"] for one in found.values())
    said = [f"{name}: {sentence}" for name, one in found.items() for sentence in one["sentences"]]
    print(*said, sep="\n")
    with replacing(folder / CI_FILE) as new:
        new.write_text(ci_json(None, status, said), encoding="utf-8")
    print(f"{_ended(status)}; see {as_printed(folder)}")
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
    """Run notebook 21 with these parameters; what ci.json then holds.

    Raises:
        ValueError: another process runs or purges this audit.
    """
    folder = folder_of(given)
    output = folder / f"{NOTEBOOK}.ipynb"
    with holding(folder, f"the audit {folder} is in use by another make audit or make purge"):
        begin(folder)
        try:
            with _quiet():
                execute(ROOT / "notebooks" / output.name, output, given)
        except Exception as error:  # a killed kernel too: no kind of it is a model that failed
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
    if not isinstance(error, ValueError | NotebookError):
        return f"the audit could not run: {type(error).__name__}: {str(error).strip()}"
    text = str(error)
    stopped = _STOPPED.fullmatch(text)
    if stopped is None:
        return text
    return stopped["said"] if stopped["kind"] in SENTENCES else stopped["all"]


# what NotebookError says; of errors that are a ValueError the sentence alone
_STOPPED = re.compile(
    r"(?P<all>\S+ stopped in cell \d+: (?P<kind>\w+): (?P<said>.*)); see .*", re.DOTALL
)
SENTENCES = ("ValueError", "EndpointError", "StatusError", "ValidationError")


def _too_long(environment: Mapping[str, str]) -> str | None:
    """In words which of what is given is longer than any path or name; None where nothing is."""
    every = {name: [environment.get(name, "")] for name in PLACES}
    every["ADAPTERS"] = environment.get("ADAPTERS", "").split()
    for name, value in ((name, one) for name, given in every.items() for one in given):
        try:
            os.stat(ROOT / value)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return f"{name} has {len(value):,} characters, and no path or name has so many"
    return None


def exit_status(work: Callable[[], int]) -> int:
    """The status of some work, COULD_NOT_RUN where it breaks: Python itself would exit with 1,
    which is read as a model that failed.
    """
    if said := _too_long(os.environ):
        print(f"driftbook: {said}", file=sys.stderr)
        return COULD_NOT_RUN
    try:
        return work()
    except Exception as error:
        traceback.print_exc()
        print(f"driftbook: the audit could not run ({type(error).__name__})", file=sys.stderr)
        return COULD_NOT_RUN


if __name__ == "__main__":
    sys.exit(exit_status(main))
