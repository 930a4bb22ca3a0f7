"""What Safe LoRA costs: the factored form against the dense one of the public code, and real sizes
streamed from safetensors checkpoints of random weights.
"""

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench.harness import least_seconds, row
from safetensors.torch import save_file

from driftbook.training import safe_lora, updates
from driftbook.training.updates import Update

SIZE, RANK = 4_096, 8
SHAPES = {
    "q_proj": (4_096, 4_096),
    "k_proj": (4_096, 4_096),
    "v_proj": (4_096, 4_096),
    "o_proj": (4_096, 4_096),
    "gate_proj": (11_008, 4_096),
    "up_proj": (11_008, 4_096),
    "down_proj": (4_096, 11_008),
}  # Llama-2-7B
BLOCKS = 32


def dense(v: torch.Tensor, update: Update) -> tuple[torch.Tensor, float]:
    """C B and cos(dW, C dW) as in the public code: C [out, out] is formed, and both updates [out,
    in].
    """
    c = v @ v.T / torch.linalg.vector_norm(v)
    new = c @ update.b
    before, after = update.b @ update.a, new @ update.a
    return new, float(
        torch.nn.functional.cosine_similarity(before.reshape(1, -1), after.reshape(1, -1))
    )


def factored(v: torch.Tensor, update: Update) -> tuple[torch.Tensor, float]:
    """The same, as `project` does it."""
    treated = update.projected(safe_lora.operator_of("approximate", v, None, 0)[0])
    return treated.b, update.cosine(treated)


def speed() -> list[dict]:
    """CPU seconds of both forms for one matrix of a 7B model, and how far apart they are."""
    generator = torch.Generator().manual_seed(0)
    v = 0.01 * torch.randn(SIZE, SIZE, generator=generator)
    update = Update(
        "m",
        torch.randn(RANK, SIZE, generator=generator),
        torch.randn(SIZE, RANK, generator=generator),
        2.0,
    )
    slow, (theirs, _) = least_seconds(dense, v, update, repeats=2)
    fast, (ours, ours_cosine) = least_seconds(factored, v, update, repeats=9)
    apart = float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs))
    exact = Update("m", update.a.double(), update.b.double(), 2.0)
    _, cosine = dense(
        v.double(), exact
    )  # in fp32 the dense form's own cosine is off by a thousandth: it adds 16 million products
    setting = f"{SIZE} x {SIZE}, r {RANK}"
    return [
        row("Safe LoRA, dense over factored", setting, slow / fast, 40.0, "times the CPU seconds"),
        row("Safe LoRA, factored", setting, fast, None, "CPU s"),
        row(
            "Safe LoRA, distance of the two forms",
            setting,
            max(apart, abs(ours_cosine - cosine)),
            1e-6,
            "relative",
            least=False,
        ),
    ]


def sizes() -> list[dict]:
    """Seconds and peak memory of `project`, in a process of its own, on a 7B model's q and v (64
    modules) and on all of its linear layers (224).
    """
    rows = []
    for names, goal in ((("q_proj", "v_proj"), 1.5), (tuple(SHAPES), None)):
        with tempfile.TemporaryDirectory() as scratch:
            made = _made(Path(scratch), names)
            said = subprocess.run(
                [sys.executable, "-W", "ignore", "-m", "bench.safe_lora", scratch],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        found = json.loads(said.stdout.splitlines()[-1])
        setting = f"{made} modules of 7B shape, bf16"
        rows += [
            row(
                "Safe LoRA, peak memory beside the adapter",
                setting,
                found["gb"],
                goal,
                "GB",
                least=False,
            ),
            row("Safe LoRA, whole adapter", setting, found["cpu"], None, "CPU s"),
        ]
    return rows


def _made(folder: Path, names: tuple[str, ...]) -> int:
    """Two checkpoints and an adapter with random weights, a file for each block, and the number of
    modules.
    """
    generator, tensors = torch.Generator().manual_seed(0), {}
    for number, part in enumerate(("aligned", "unaligned")):
        (folder / part).mkdir()
        drawn = {
            name: (
                torch.empty(SHAPES[name], dtype=torch.bfloat16).normal_(
                    0, 0.02 + 0.01 * number, generator=generator
                )
            )
            for name in names
        }
        for block in range(
            BLOCKS
            # drawn once and scaled: 13 billion random numbers would take longer than what is
            # measured
        ):
            save_file(
                {
                    f"model.layers.{block}.{name}.weight": value * (1 + block / BLOCKS)
                    for name, value in drawn.items()
                },
                folder / part / f"model-{block:05d}.safetensors",
            )
    for block in range(BLOCKS):
        for name in names:
            rows, columns = SHAPES[name]
            module = f"{updates.PREFIX}model.layers.{block}.{name}"
            tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = (
                torch.randn(RANK, columns, generator=generator),
                torch.randn(rows, RANK, generator=generator),
            )
    (folder / "adapter").mkdir()
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / updates.CONFIG).write_text(
        json.dumps(
            {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": list(names)}
        )
    )
    return BLOCKS * len(names)


def _measured(folder: Path) -> dict[str, float]:
    """CPU seconds and GB of the process at its peak above what it held before, of projecting the
    adapter of a folder; the adapter itself does not count.
    """
    before, started = _peak(), time.process_time()
    safe_lora.project(folder / "adapter", folder / "aligned", folder / "unaligned", folder / "out")
    own = (
        2 * (folder / "adapter" / "adapter_model.safetensors").stat().st_size / 1e9
    )  # before and after
    return {"cpu": time.process_time() - started, "gb": max(0.0, _peak() - before - own)}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def rows() -> list[dict]:
    """Every line of this benchmark."""
    return [*speed(), *sizes()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(
        json.dumps(
            {
                name: value if math.isfinite(value) else None
                for name, value in _measured(Path(sys.argv[1])).items()
            }
        )
    )
