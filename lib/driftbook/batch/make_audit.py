"""make audit: what an adapter did to its base model's safety and fairness, as one page and one exit
status: 0 pass, 1 fail, 2 cannot tell, 3 could not run.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from driftbook.batch import audit_setup
from driftbook.batch.notebooks import NotebookError, execute
from driftbook.study import study_file
from driftbook.study.files import OUTPUTS, ROOT, check_path, read_json
from driftbook.study.folders import adapter

NOTEBOOK = ROOT / "notebooks" / "21_audit.ipynb"
COULD_NOT_RUN = 3
GIVEN = ("ADAPTER", "MODEL", "BASE", "JUDGE", "BENCHMARKS", "BUDGET", "SYSTEM", "NAME")
GIVEN += ("FAIL_IF", "SINCE", "BASE_LOG", "CANDIDATE_LOG")
USUAL_STUDIES = ("pocket", "miniature")  # where an adapter is taken from if none is named


def parameters(environment: dict[str, str]) -> dict:
    """The parameters of notebook 21, from the variables that make passes on.

    Raises:
        ValueError: the margin or the budget is none, or no adapter is named or to be found.
    """
    found = {name.lower(): environment.get(name, "") for name in GIVEN}
    found = {name: value for name, value in found.items() if value}
    if margin := environment.get("MARGIN"):
        try:
            found["margin"] = float(margin)
        except ValueError:
            raise ValueError(f"MARGIN={margin!r} is no number of percentage points") from None
    audit_setup.budget(found.get("budget", "all"))
    if not {"adapter", "model", "base_log"} & set(found):
        found["adapter"] = _usual_adapter()
    return found


def _usual_adapter() -> str:
    """A LoRA that a study here trained: of real weights where there is one."""
    for name in USUAL_STUDIES:
        study = study_file.load(name)
        for variant in study.variants:
            folder = adapter(study, variant)
            if variant.method == "lora" and folder and (folder / audit_setup.WEIGHTS).is_file():
                return str(folder.parent.relative_to(ROOT))
    raise ValueError(
        "no adapter is named and no study here has trained one; give ADAPTER=, or run make study"
        " first (13 minutes; its LoRA is then audited)"
    )


def main() -> int:
    """Audit what the environment names; the exit status of the gate."""
    try:
        check_path(ROOT, "the checkout")
        given = parameters(dict(os.environ))
        name = given.get("name") or _name(given)
        folder = OUTPUTS / "audit" / name
        folder.mkdir(parents=True, exist_ok=True)
        result = folder / "gate.json"
        result.unlink(missing_ok=True)
        with _quiet():
            execute(NOTEBOOK, folder / "21_audit.ipynb", {**given, "name": name})
        found = read_json(result)
    except (ValueError, NotebookError) as error:
        print(f"driftbook: {_plain(error)}", file=sys.stderr)
        return COULD_NOT_RUN
    for sentence in found["sentences"]:
        print(sentence)
    print(f"see {Path(found['page']).relative_to(ROOT)}")
    return found["status"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What kernels and papermill say on stderr is not said: what went wrong comes as an error."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _name(given: dict) -> str:
    """Of the audit's folder."""
    if "base_log" in given:
        return "logs"
    return audit_setup.candidate(given.get("adapter", ""), given.get("model", "")).name


def _plain(error: Exception) -> str:
    """The sentence itself, where a notebook stopped with one."""
    text = str(error)
    return text.partition(": ValueError: ")[2] or text


if __name__ == "__main__":
    sys.exit(main())
