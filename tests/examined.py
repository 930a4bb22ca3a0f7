"""Healthy adapters, copies of them with one sickness, and what the adapter doctor says of each."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from conftest import PEFT_METHODS, one_sentence
from driftbook.doctors.adapter import examine, finding_summary
from driftbook.models.loading import Loaded

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


EXTRA = {
    "dora": LoraConfig(
        r=4, use_dora=True, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    ),
    "rslora": LoraConfig(
        r=4,
        use_rslora=True,
        target_modules=["q_proj"],
        rank_pattern={"0.self_attn.q_proj": 2},
        alpha_pattern={"1.self_attn.q_proj": 3},
        task_type="CAUSAL_LM",
    ),
    "embedding": LoraConfig(r=4, target_modules=["embed_tokens", "v_proj"], task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


def make(base: Loaded, config, folder: Path, scale: float = 0.05) -> Path:
    """An adapter made by PEFT on a copy of the base, its trained numbers moved by noise."""
    generator = torch.Generator().manual_seed(0)
    model = get_peft_model(copy.deepcopy(base.model), copy.deepcopy(config))
    for value in (v for v in model.parameters() if v.requires_grad):
        value.data += scale * torch.randn(value.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(bases) -> Loaded:
    return bases["llama"]


@pytest.fixture(scope="session")
def folders(adapter_folders, llama, tmp_path_factory) -> dict[str, Path]:
    """A healthy adapter of each method on the Llama."""
    made = {method: adapter_folders["llama", method] for method in PEFT_METHODS}
    place = tmp_path_factory.mktemp("extra")
    return made | {name: make(llama, config, place / name) for name, config in EXTRA.items()}


@pytest.fixture(scope="session")
def local(llama, tmp_path_factory) -> Path:
    """The Llama's folder."""
    return saved(llama, tmp_path_factory.mktemp("base") / "random-llama")


def saved(base: Loaded, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    copy.deepcopy(base.model).to(dtype).save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def edited(folders, tmp_path):
    """Copies a healthy adapter and changes its tensors or settings."""

    def edit(method: str, tensors=None, settings=None) -> Path:
        folder = tmp_path / "adapter"
        shutil.copytree(folders[method], folder)
        if tensors:
            state = load_file(folder / WEIGHTS)
            tensors(state)
            save_file(state, folder / WEIGHTS)
        if settings:
            (folder / CONFIG).write_text(
                json.dumps(json.loads((folder / CONFIG).read_text()) | settings)
            )
        return folder

    return edit


def complaints(adapter: Path, base=None) -> dict[str, str]:
    """{finding: severity} of the errors and warnings, after checking that the table is fit to be
    published.
    """
    table = examine(adapter, base)
    assert list(table.columns) == ["finding", "severity", "sentence", "module"]
    assert set(table.severity) <= {"error", "warning", "note"}
    for sentence in table.sentence:
        assert str(adapter.parent) not in one_sentence(sentence)
        assert "; " not in sentence
    assert (finding_summary(table) is None) == (not table.severity.isin(["error", "warning"]).any())
    return dict(table[table.severity != "note"][["finding", "severity"]].itertuples(index=False))


def said(adapter: Path, finding: str, base=None) -> str:
    """The sentences of one kind of finding."""
    table = examine(adapter, base)
    return " | ".join(table.sentence[table.finding == finding])
