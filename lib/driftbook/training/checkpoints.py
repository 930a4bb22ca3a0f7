"""A model's weight matrices read from its safetensors files, one at a time and by name: no model is
built.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from driftbook.study.files import check_safetensors

QUANTIZED = (
    ".absmax",
    ".quant_map",
    ".qweight",
    ".qzeros",
    ".weight_scale",
    ".SCB",
    "quant_state.bitsandbytes__nf4",
    "quant_state.bitsandbytes__fp4",
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder of safetensors: the file of each, by name."""

    folder: Path
    files: dict[str, Path]

    def matrix(self, module: str) -> torch.Tensor:
        """The weight [out, in] of a module, in the dtype it is stored in.

        Raises:
            ValueError: there is none of this name, or it is no matrix of floating-point numbers.
        """
        name = self.name(f"{module}.weight")
        if name is None:
            raise ValueError(
                f"the checkpoint {self.folder} has no weight of the module {module}; it is of"
                " another architecture, or the adapter of another base model"
            )
        value = self.tensor(name)
        if value.ndim != 2 or value.dtype not in FLOATS:
            raise ValueError(
                f"{name} in {self.folder} is a tensor of {value.ndim} dimensions in {value.dtype};"
                " a matrix in fp32, bf16 or fp16 is needed, so give the checkpoint that is not"
                " quantised"
            )
        return value

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor by its own name; the file is opened for it alone, to let go of its pages."""
        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)

    def name(self, wanted: str) -> str | None:
        """The stored name of a tensor: its own, or the only one that ends in it or that it ends in
        (some files lack `model.`, some have more before it), or that of what it is tied to.
        """
        if wanted in self.files:
            return wanted
        ends = [one for one in self.files if one.endswith(f".{wanted}")]
        ends += [one for one in self.files if wanted.endswith(f".{one}")]
        if not ends and wanted in self.tied:
            return self.name(self.tied[wanted])
        return ends[0] if len(ends) == 1 else None

    @cached_property
    def tied(self) -> dict[str, str]:
        """The stored name of each tensor that the model's configuration ties to another and that is
        not stored itself, as the head that is the embedding table.
        """
        try:
            options = {"local_files_only": True, "trust_remote_code": False}
            config = AutoConfig.from_pretrained(self.folder, **options)
            with torch.device("meta"):
                shell = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except Exception:  # transformers raises a dozen kinds; without a model nothing is tied
            return {}
        first = {id(value): name for name, value in shell.named_parameters()}
        named = shell.named_parameters(remove_duplicate=False)
        return {name: first[id(value)] for name, value in named if first[id(value)] != name}


def open_checkpoint(where: Path | str, what: str) -> Checkpoint:
    """The checkpoint of a local folder, or of a hub name (with @ and a commit), fetched without its
    pickles. `what` names it in errors: aligned, unaligned, base.

    Raises:
        ValueError: it is not there, holds no safetensors, is torn, or is quantised.
    """
    folder = _fetched(where, what)
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        hint = "give the folder of a whole model"
        if any(folder.glob("*.bin")):
            hint = "it has pickles, which are never loaded; save it as safetensors"
        raise ValueError(f"the {what} checkpoint {folder} has no safetensors: {hint}")
    files: dict[str, Path] = {}
    for path in paths:
        check_safetensors(path, "fetch it again")
        with safe_open(path, "pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    if quantized := next((name for name in files if name.endswith(QUANTIZED)), None):
        raise ValueError(
            f"the {what} checkpoint {folder} is quantised (it holds {quantized}); give the one in"
            " fp32, bf16 or fp16"
        )
    return Checkpoint(folder, files)


def _fetched(where: Path | str, what: str) -> Path:
    if Path(where).is_dir():
        return Path(where)
    name, _, revision = str(where).partition("@")
    if isinstance(where, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(
            f"there is no {what} checkpoint {where}; give the folder of its safetensors, or a name"
            " on the hub"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json"]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # the hub raises a dozen kinds; each means that it cannot be had
        raise ValueError(
            f"the {what} checkpoint {where} cannot be fetched ({type(error).__name__}); check its"
            " name and your access, or give a local folder"
        ) from None
