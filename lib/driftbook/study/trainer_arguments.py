"""TRL's own training arguments that a study file passes through, checked before any work."""

import dataclasses
import difflib
import re
import textwrap
from functools import cache
from typing import Any

# what TRL's trainer does here with nothing in between: its optimiser, scheduler, noise and dropout
PASSED = re.compile(
    "adam_.*|optim|optim_args|lr_scheduler_kwargs|neftune_noise_alpha|disable_dropout"
)
OWN_KEYS = {
    "learning_rate": "learning_rates of a block of the grid",
    "num_train_epochs": "epochs of a block of the grid",
    "seed": "seeds of a block of the grid",
    "data_seed": "seeds of a block of the grid",
    "per_device_train_batch_size": "training.batch_size",
    "lr_scheduler_type": "training.scheduler",
    "warmup_steps": "training.warmup_ratio",
    "warmup_ratio": "training.warmup_ratio",
    "weight_decay": "training.weight_decay",
    "max_grad_norm": "training.max_grad_norm",
    "max_length": "training.max_length",
    "packing": "training.packed",
    "beta": "training.dpo_beta",
    "bf16": "training.autocast",
}


def of_objective(arguments: dict[str, Any], objective: str) -> dict[str, Any]:
    """Those of the arguments that TRL's trainer of an objective (sft, dpo) has."""
    return {name: value for name, value in arguments.items() if name in _fields()[objective]}


@cache
def _fields() -> dict[str, frozenset[str]]:
    configs = _configs().items()
    return {name: frozenset(one.name for one in dataclasses.fields(of)) for name, of in configs}


@cache
def _configs() -> dict[str, type]:
    from trl import DPOConfig, SFTConfig  # seconds, and few studies pass arguments

    return {"sft": SFTConfig, "dpo": DPOConfig}


def check_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, if TRL has them all and none is Driftbook's to set.

    Raises:
        ValueError: an argument is unknown, set by Driftbook itself, or of a value that TRL refuses.
    """
    if not isinstance(arguments, dict):
        raise ValueError("expected a mapping of TRL's arguments to values")
    for name in arguments:
        _check_name(str(name))
    for objective, config in _configs().items() if arguments else ():
        given = of_objective(arguments, objective)
        try:
            config(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **given)
        except Exception as error:  # of any kind, and of many lines
            said = textwrap.shorten(str(error), 200)
            raise ValueError(f"TRL refuses {given}: {said}") from None
    return arguments


def _check_name(name: str) -> None:
    if name in OWN_KEYS:
        raise ValueError(f"Driftbook sets {name} itself; give {OWN_KEYS[name]}")
    known = set().union(*_fields().values())
    passed = sorted(one for one in known if PASSED.fullmatch(one))
    if name in known and name not in passed:
        ours = "Driftbook makes batches, losses, logs and checkpoints itself"
        raise ValueError(f"{ours}, so {name} cannot be given; expected some of {', '.join(passed)}")
    if name not in known:
        near = difflib.get_close_matches(name, passed, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected some of {', '.join(passed)}"
        raise ValueError(f"TRL has no argument {name!r}; {hint}")
