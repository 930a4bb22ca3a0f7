"""Measured rates of machines: of this one, kept by its fingerprint, and of a GPU from published
runs.
"""

from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from driftbook.batch.sizes import Size, size
from driftbook.study.environment import processor
from driftbook.study.files import OUTPUTS, ROOT, digest, read_json
from driftbook.study.methods import PEFT_METHODS
from driftbook.study.study_file import Study

MEASURED = OUTPUTS / "rates"  # by fingerprint of machine and model shape
PUBLISHED = ROOT / "outputs" / "published" / "peft_results" / "tables"
PUBLISHED_GPU = "NVIDIA L40S"
PEFT_WEIGHTS = 2.8e9  # of Llama-3.2-3B without its embeddings
# Seconds of a CPU, measured on pocket studies: of a variant in a stage (its adapter put on and
# taken off, its files), of a job (its notebook, its model), of an analysis.
OVERHEADS = {"piece": 0.4, "job": 8.0, "analysis": 8.0}
PEFT_TOKENS = 4_198_051  # "train total tokens" in each of PEFT's result files


@dataclass(frozen=True)
class Rates:
    """Measured rates of a machine: arithmetic a second by kind of work (train by method, dpo, read,
    write; stream: weights from memory), seconds of a training and of its step besides, of a piece
    of work (a variant in a stage), of a job and of an analysis; whether its device is a CPU.
    """

    name: str
    flops: dict[str, float]
    fixed: float
    step: float
    how: str
    piece: float = 0.0
    job: float = 0.0
    analysis: float = 0.0
    on_cpu: bool = False

    def of(self, kind: str) -> float:
        """The rate of a kind of work; of a method that was not measured that of LoRA."""
        word = kind.partition(" ")[0]
        if word == "piece":
            return 1 / self.piece if self.piece else float("inf")
        if word == "stream":
            return self.flops.get("stream", float("inf"))
        return self.flops.get(kind) or self.flops.get(word) or self.flops[f"{word} lora"]


# One core of a server, until a machine is measured: only the time left is estimated by it.
USUAL = Rates(
    "a usual core",
    {"train lora": 4e10, "dpo lora": 5e10, "read": 6e10, "write": 6e10, "stream": 2e9},
    fixed=0.4,
    step=0.01,
    how="not measured",
    on_cpu=True,
    **OVERHEADS,
)


# ---- this machine
def largest(study: Study) -> Size:
    """The size of a study's largest base model, by which a machine is measured for it."""
    return max((size(one, study) for one in study.bases.values()), key=lambda one: one.weights)


def measured_path(study: Study) -> Path:
    """Where the rates of this machine are kept for a study."""
    return MEASURED / f"{fingerprint(largest(study), study.methods)}.json"


def here(study: Study) -> Rates | None:
    """The rates of this machine; None where they are not measured."""
    return kept(measured_path(study))


def fingerprint(shape: Size, settings: dict) -> str:
    """What a measurement is of: the machine, torch, a model's shape and the methods' settings."""
    sizes = [shape.layers, shape.width, shape.kv_width, shape.vocabulary, shape.body]
    return digest([processor(), version("torch"), sizes, settings])


def kept(path: Path) -> Rates | None:
    """The rates in a file of measurements; None where there is none that can be read."""
    try:
        found = read_json(path)
        how = f"measured on this machine, {found.pop('when')}, on {found.pop('model')}"
        return Rates(**found, how=how)
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ---- the published GPU
@cache
def published_rates() -> Rates:
    """Rates from the training seconds of PEFT's own runs of Llama-3.2-3B.

    They timed training alone. We take reading at the same rate, since it is the same arithmetic,
    and bound writing by reading the weights once for each token of a batch of 32.
    """
    variants = pd.read_parquet(PUBLISHED / "variants.parquet")
    runs = pd.read_parquet(PUBLISHED / "runs.parquet").merge(variants, on="run_id")
    seconds = runs.groupby("method").seconds.median()
    names = {**{name: name for name in PEFT_METHODS}, "bitfit": "beft"}
    flops = {
        f"train {ours}": 4 * PEFT_WEIGHTS * PEFT_TOKENS / seconds[theirs]
        for ours, theirs in names.items()
        if theirs in seconds
    }
    lora = flops["train lora"]
    how = (
        "PEFT's published runs of a 3B model on one L40S (notebook 22); reading and writing are"
        " inferred from its training"
    )
    flops |= {"dpo lora": lora, "read": lora, "write": lora / 4}
    return Rates(PUBLISHED_GPU, flops, 30.0, 0.0, how, job=60.0)
