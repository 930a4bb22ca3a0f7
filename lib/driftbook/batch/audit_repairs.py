"""The repairs of a finished adapter that an audit offers, each with its command as it is typed in
the root of the checkout.
"""

import os
import shlex
from pathlib import Path

from driftbook.batch.auditing import Audit
from driftbook.study.files import OUTPUTS, ROOT, read_json
from driftbook.training.mitigations import pair

OF_WEIGHTS = ("LORA", "IA3")  # PEFT's types whose update of weights these repairs read
REPAIRS = {
    "rescale": "makes the whole update smaller, which is what every other repair has to beat",
    "safe_lora": "projects the update onto what alignment changed: the difference of ALIGNED= and"
    " UNALIGNED=, two checkpoints of the base model",
}
CHECKPOINTS = ("ALIGNED", "UNALIGNED")


def repairs(audit: Audit) -> list[dict[str, str]]:
    """The repairs that apply to the audited adapter: kind, command and sentence.

    A command names no folder outside of the checkout: what lies there is named by a link in the
    audit's folder.
    """
    if audit.candidate.kind != "adapter":
        return []
    kind = read_json(audit.candidate.folder / "adapter_config.json").get("peft_type")
    if kind not in OF_WEIGHTS:
        return []
    given = {"ADAPTER": audit.candidate.source, **audit.given}
    words = [f"{name}={_typed(audit, name, text)}" for name, text in given.items()]
    more = {"rescale": [], "safe_lora": _checkpoints(audit)}
    return [
        {
            "kind": name,
            "command": " ".join(["make repair", *words, f"WITH={name}", *more[name]]),
            "sentence": sentence,
        }
        for name, sentence in REPAIRS.items()
    ]


def _checkpoints(audit: Audit) -> list[str]:
    """The two checkpoints of the base model's first pair, or words in their place."""
    base = audit.study.bases[audit.base_name]
    try:
        found = pair(audit.study, audit.base_name, next(iter(base.pairs)))
    except (StopIteration, ValueError):  # it has none, or they are not here
        return [f"{name}=A-CHECKPOINT" for name in CHECKPOINTS]
    return [f"{name}={_typed(audit, name, str(found[name.lower()]))}" for name in CHECKPOINTS]


def _typed(audit: Audit, name: str, text: str) -> str:
    """A variable's value as it is typed in a shell; of a path one that begins in the checkout, or
    in the folder of outputs.
    """
    if name == "SYSTEM" or "{{" in text:  # a prompt, or a template itself
        return shlex.quote(text)
    form, sign, place = text.rpartition("=") if name == "JUDGE" else ("", "", text)
    path = Path(os.path.normpath(ROOT / Path(place).expanduser()))
    if not path.exists():  # a name on the hub or of a study
        return shlex.quote(text)
    if not (path.is_relative_to(ROOT) or path.is_relative_to(OUTPUTS)):
        link = audit.folder / f"{name.lower()}{path.suffix if path.is_file() else ''}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(path)
        path = link
    if "DRIFTBOOK_OUTPUTS" not in os.environ and path.is_relative_to(OUTPUTS):
        path = ROOT / "outputs" / path.relative_to(OUTPUTS)  # which may be a link
    if path.is_relative_to(ROOT):
        return shlex.quote(f"{form}{sign}{path.relative_to(ROOT)}")
    own = shlex.quote(str(path.relative_to(OUTPUTS)))
    return f'{shlex.quote(form + sign) if form else ""}"$DRIFTBOOK_OUTPUTS"/{own}'
