"""Adapters and pairs of checkpoints with the same numbers in float64."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from driftbook.models import adapters
from driftbook.training import updates

SHAPES = {
    "square": (48, 48, 4),
    "tall": (64, 24, 4),
    "wide": (24, 64, 4),
    "rank one": (40, 40, 1),
    "rank of the rows": (16, 40, 16),
}


def dense(operator: str, v: np.ndarray, k: int | None = None) -> np.ndarray:
    """C [out, out]."""
    if operator == "approximate":
        return v @ v.T / np.linalg.norm(v)
    u, s, _ = np.linalg.svd(v, full_matrices=False)
    u = u[:, : k or int((s > 1e-9 * s[0]).sum())]
    return u @ u.T


def written(folder, matrices: dict, **dtype):
    folder.mkdir(parents=True)
    save_file(
        {
            name: torch.as_tensor(value).to(dtype.get("dtype", torch.float32)).contiguous()
            for name, value in matrices.items()
        },
        folder / "model.safetensors",
    )
    return folder


def lora_folder(folder, factors: dict, **config):
    folder.mkdir(parents=True)
    tensors = {
        f"{updates.PREFIX}{module}.lora_{part}.weight": (
            torch.as_tensor(value, dtype=torch.float32).contiguous()
        )
        for module, (a, b) in factors.items()
        for part, value in (("A", a), ("B", b))
    }
    save_file(tensors, folder / adapters.WEIGHTS)
    made = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "task_type": "CAUSAL_LM",
        "target_modules": ["q"],
        **config,
    }
    (folder / updates.CONFIG).write_text(json.dumps(made))
    return folder


@pytest.fixture
def case(tmp_path, request):
    """An adapter of two modules and its pair of checkpoints, with the same numbers in float64."""
    rows, columns, r = request.param
    rng = np.random.default_rng(rows)
    modules = ["model.layers.0.q", "model.layers.1.q"]
    unaligned = {m: rng.normal(size=(rows, columns)).astype(np.float32) for m in modules}
    aligned = {
        m: (
            unaligned[m]
            + 0.1
            * rng.normal(size=(rows, columns)).astype(np.float32)
            * rng.gamma(1, size=columns).astype(np.float32)
        )
        for m in modules
    }
    factors = {
        m: (
            rng.normal(size=(r, columns)).astype(np.float32),
            rng.normal(size=(rows, r)).astype(np.float32),
        )
        for m in modules
    }
    return {
        "aligned": written(
            tmp_path / "aligned", {f"{m}.weight": value for m, value in aligned.items()}
        ),
        "unaligned": written(
            tmp_path / "unaligned", {f"{m}.weight": value for m, value in unaligned.items()}
        ),
        "adapter": lora_folder(tmp_path / "adapter", factors, r=r),
        "out": tmp_path / "out",
        "v": {m: aligned[m].astype(float) - unaligned[m].astype(float) for m in modules},
        "dw": {m: (8 / r) * b.astype(float) @ a.astype(float) for m, (a, b) in factors.items()},
    }


one_shape = pytest.mark.parametrize("case", [SHAPES["square"]], indirect=True)


def tiny(kind: str, seed: int = 0):
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = (
        LlamaForCausalLM(LlamaConfig(**shape))
        if kind == "llama"
        else Qwen2ForCausalLM(Qwen2Config(**shape))
    )
    for value in model.parameters():
        if value.ndim == 2:
            value.data.mul_(5)
    return model.eval()
