"""What is wrong with a PEFT adapter, found from its files before anything is scored; no model is
run and no pickle is opened.

An **error** means that the adapter cannot be attached, or that what would be scored is not this
adapter. A **warning** means that it can be scored, and that the scores may not mean what they seem
to. A **note** is a number measured, or what could not be looked at.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from pandas import DataFrame
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor

from driftbook.doctors.adapter_files import AdapterFiles, BaseFiles, module_of, open_base, reason_of
from driftbook.doctors.adapter_fit import (
    base_match,
    config_settings,
    rewrites_base,
    tensor_shapes,
    tokenizer,
    vocabulary,
)
from driftbook.doctors.adapter_weights import ia3_scales, lora_updates, soft_prompt
from driftbook.doctors.findings import Finding, error, named, note, plain_sentence
from driftbook.models.adapter_forms import CONFIG, check_patterns, foreign_form, nested_adapters
from driftbook.models.adapters import WEIGHTS
from driftbook.models.loading import Loaded
from driftbook.study.files import check_safetensors, read_object

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
TRAINERS = {  # files of trainers by stem
    "training_args": "the trainer's arguments",
    "optimizer": "the optimiser's state",
    "scheduler": "the schedule's state",
    "rng_state": "the random numbers' state",
    "scaler": "the loss scale's state",
    "adapter_model": "weights, of which the safetensors are read",
    "value_head": "a reward or value head",
}
WAYS = {  # prefix tuning's tensors are keys and values, no token embeddings
    "LORA": lora_updates,
    "IA3": ia3_scales,
    "PROMPT_TUNING": soft_prompt,
    "P_TUNING": soft_prompt,
    "SUFFIX_TUNING": soft_prompt,
}
OTHER_UPDATES = """
    kasa_config use_qalora use_bdlora velora_config monteclora_config arrow_config
    target_parameters
""".split()  # LoRA whose update is not scale B A of one matrix


def examine(adapter: Path | str, base: Loaded | Path | str | None = None) -> DataFrame:
    """One row per finding about an adapter's folder: finding, severity (error, warning, note),
    sentence, module (null for the whole).

    In order: files (form, which is all where it is no adapter of PEFT; pickle, config, peft_type,
    weights), numbers (non_finite), fit (base, shapes,
    vocabulary, tokenizer, chat_template, settings), and what the weights do (untrained, exploded,
    no_op, distance, soft_prompt); not_examined is what could not be looked at.

    - shapes: what PEFT itself would save for this configuration on a base of this shape, against
    the names and shapes in the file. PEFT fills what is missing with its init and ignores what is
    superfluous, both in silence.
    - distance: LoRA ||scale BA||_F / ||W||_F (Hu et al. 2021, arXiv 2106.09685, table 7: 0.06 to
    0.11 for GPT-3); DoRA ||m (W + scale BA) / ||W + scale BA|| - W||_F / ||W||_F (Liu et al. 2024,
    arXiv 2402.09353, eq. 5); IA3 |w - 1|, its init being 1.
    - exploded: the change of a module is larger than what it changes: that ratio, or for IA3 the
    root mean square of w - 1, is above 1. Without base weights a LoRA module is judged against the
    adapter's others: modified z-score of log ||scale BA|| (per entry, root mean square) above 3.5
    (Iglewicz and Hoaglin 1993), and 10 times their median; modules that all explode alike cannot be
    seen then.
    - no_op: IA3 of which every w is 1 in the base's dtype: |w - 1| up to half a unit in the last
    place, eps/2 above 1 and eps/4 below it, eps of torch.finfo being the spacing above 1 (bfloat16:
    2^-7). Up to eps/4 no activation moves either where w stays in float32. LoRA: no sampled entry
    of W changes when W + scale BA is rounded to the dtype of W; that is about the merged weights,
    since unmerged the update is added to activations.
    - soft_prompt: median norm of the virtual tokens over the median norm of what the embedding
    table gives; a warning from 10 times or down to a tenth. PEFT's default init is N(0, 1) per
    entry, a norm of about sqrt(width).

    Args:
        adapter: the folder with adapter_config.json and adapter_model.safetensors.
        base: the base model, loaded, or its local folder; without it only the adapter is examined.

    Raises:
        ValueError: there is no such folder, or it is a file. A sick adapter never raises.
    """
    adapter, base = Path(adapter), Path(base) if isinstance(base, str) else base
    if not adapter.exists():
        raise ValueError(
            f"the adapter folder {adapter} does not exist; give the folder that holds {CONFIG}"
        )
    form = foreign_form(adapter)
    if form and adapter.is_file():
        raise ValueError(f"the adapter {adapter}: {form}")
    found = [error("form", form)] if form else [*_beside(adapter), *_own_files(adapter)]
    if not any(f.severity == "error" for f in found):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's; the findings have sentences about these
            found += _readable(AdapterFiles(adapter), base)
    return _table(found)


def _table(found: list[Finding]) -> DataFrame:
    rows = [  # "; " separates the sentences of finding_summary
        (f.finding, f.severity, plain_sentence(f.sentence).replace("; ", ", "), f.module)
        for f in found
    ]
    return DataFrame(rows, columns=["finding", "severity", "sentence", "module"], dtype=object)


def finding_summary(findings: DataFrame) -> str | None:
    """The sentences of the errors and warnings, separated by "; "; None where there are none."""
    return "; ".join(findings.sentence[findings.severity.isin(["error", "warning"])]) or None


# ---- files
def _beside(folder: Path) -> Iterator[Finding]:
    """What stands beside an adapter's own two files and is not looked at."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if names:
        told = [
            f"{name} ({TRAINERS[key]})" if (key := _stem(name)) in TRAINERS else name
            for name in names
        ]
        text = f"""beside its weights it holds pickles, which nothing here needs or opens:
            {named(told, 8)}"""
        yield note("pickle", text)
    if nested := nested_adapters(folder):
        text = f"it holds adapters of their own, which were not looked at: {named(nested)}"
        yield note("form", text)


def _stem(name: str) -> str:
    """A file's name without its ending and the number of a process."""
    return re.sub(r"(_\d+)?\.\w+$", "", name)


def _own_files(folder: Path) -> Iterator[Finding]:
    yield from _configuration(folder)
    yield from _weights(folder)


def _configuration(folder: Path) -> Iterator[Finding]:
    try:
        kind = read_object(folder / CONFIG).get("peft_type")
        if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
            yield error("peft_type", f"its peft_type {kind!r} is unknown to the installed PEFT")
        else:
            PeftConfig.from_pretrained(str(folder))
        check_patterns(read_object(folder / CONFIG), _modules(folder))
    except FileNotFoundError:
        text = f"it has no {CONFIG}, so neither its method nor its base model is known"
        yield error("config", text)
    except Exception as failure:  # whatever PEFT raises, this configuration cannot be used
        yield error("config", f"its {CONFIG} cannot be used: {reason_of(failure, folder)}")


def _modules(folder: Path) -> list[str]:
    """The modules that an adapter's file names; none where it cannot be read, as is said of it."""
    try:
        return list(filter(None, map(module_of, AdapterFiles(folder).shapes)))
    except Exception:
        return []


def _weights(folder: Path) -> Iterator[Finding]:
    path = folder / WEIGHTS
    try:
        if path.is_file():
            check_safetensors(path, "save or copy it again")
        else:
            yield error("weights", f"it has no {WEIGHTS}")
    except ValueError as failure:
        yield error("weights", reason_of(failure, folder))


# ---- everything that needs no more than a readable adapter
def _readable(adapter: AdapterFiles, given: Loaded | Path | None) -> Iterator[Finding]:
    sick, base = _tried(non_finite, adapter), None
    yield from sick
    if given is not None:
        try:
            base = open_base(given)
        except Exception as failure:  # the loaders raise a dozen kinds
            place = given if isinstance(given, Path) else Path(given.name)
            why = reason_of(failure, place)
            yield error("base", f"the base model given cannot be read: {why}")
    checks = (base_match, tensor_shapes, vocabulary, tokenizer, config_settings)
    checks = checks if base else (vocabulary, config_settings)
    for check in checks if sick else (*checks, weight_changes):
        yield from _tried(check, adapter, base)
    if given is None:
        text = """no base model was given, so names, shapes, tokenizer and the size of its
            change against the base's weights were not examined"""
        yield note("not_examined", text)


def _tried(check: Callable[..., Iterator[Finding]], *args) -> list[Finding]:
    """What a check finds; a stranger's file that breaks it is a finding too."""
    found = []
    try:
        found.extend(check(*args))
    except Exception as failure:
        name = check.__name__.replace("_", " ")
        what = f"{name}: {type(failure).__name__}, {reason_of(failure, args[0].folder)}"
        found.append(error("not_examined", f"its files broke the check of {what}"))
    return found


def non_finite(adapter: AdapterFiles) -> Iterator[Finding]:
    """Tensors that hold NaN or infinity."""
    counts = {name: _n_not_finite(adapter.tensor(name)) for name in adapter.shapes}
    sick = [name for name, count in counts.items() if count]
    if sick:
        first = f"{sick[0]} ({counts[sick[0]]} of {int(np.prod(adapter.shapes[sick[0]]))})"
        text = f"""NaN or infinity in {len(sick)} of its {len(counts)} tensors,
            {sum(counts.values())} numbers in all, the first in {first}"""
        yield error("non_finite", text, module_of(sick[0]))


def _n_not_finite(value: Tensor) -> int:
    value = value.float() if value.itemsize == 1 else value  # 8-bit floats have no isfinite
    return int((~torch.isfinite(value)).sum())


def weight_changes(adapter: AdapterFiles, base: BaseFiles | None) -> Iterator[Finding]:
    """What the weights do, by the adapter's method."""
    method, shapes = adapter.settings["peft_type"], adapter.shapes
    empty = [name for name, shape in shapes.items() if 0 in shape]
    other = [name for name in OTHER_UPDATES if adapter.settings.get(name)]
    other += ["init_lora_weights"] * rewrites_base(adapter)
    if empty or not shapes:
        which = f"{len(empty)} of its tensors are empty, first {empty[0]}" if empty else ""
        text = f"{which or 'its file holds no tensor'}, as when a sharded model is saved"
        yield error("shapes", f"{text} without being gathered")
    elif method in WAYS and not (method == "LORA" and other):
        yield from WAYS[method](adapter, base)
    else:
        name = f"{method} with its {other[0]}" if other else method
        text = f"how far {name} is from its init, and whether it exploded, is not known here"
        yield note("not_examined", text)
