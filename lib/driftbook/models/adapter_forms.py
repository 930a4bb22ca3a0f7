"""What a file or folder is that was given as an adapter and is none in PEFT's form."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from driftbook.study.files import first_bytes, not_the_file
from driftbook.study.limits import too_large, tried

CONFIG = "adapter_config.json"
# bytes: of an adapter of every expert of a large mixture some 15 million are in its header
MOST_SETTINGS, MOST_HEADER = 5_000_000, 25_000_000
PATTERN_SECONDS = 5.0
_PLAIN = re.compile(r"[\w.-]*")  # a name, which no text makes slow
_WEIGHTS = "adapter_model.safetensors"
_ARCHIVES = (
    b"PK\x03\x04",
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ",
    b"7z\xbc\xaf",
    b"Rar!",
    b"\x28\xb5/\xfd",
)
_ARCHIVE_NAMES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")
_WHOLE_MODEL = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)")
_IN_PARTS = re.compile(r"adapter_model(-\d+-of-\d+\.safetensors|\.safetensors\.index\.json)")
_PICKLED = re.compile(r"(.*adapter.*|mp_rank_.*)\.(bin|pt|pth|pkl|ckpt)")
_SHARDED = re.compile(r"global_step\d+|zero_to_fp32\.py|pytorch_model_fsdp.*|.*\.distcp")
_OF_PICTURES = re.compile(  # tensors of diffusers and of kohya's scripts
    r"(base_model\.model\.)?(unet|text_encoder(_2)?|transformer)\.|lora_(unet|te\d?|transformer)_"
    r"|(base_model\.model\.)?(down_blocks|up_blocks|mid_block|(single_)?transformer_blocks)\."
)
DIFFUSION = (
    "it is a LoRA of a diffusion model, which makes pictures and has no answers to score; give the"
    " adapter of a language model"
)
MLX = (
    "it is an adapter of MLX and not in PEFT's form; fuse it with mlx_lm.fuse and give the model"
    " as a base model, or convert it: lora_A and lora_B are its lora_a and lora_b transposed, and"
    " lora_alpha is its scale times the rank"
)
PICKLE = (
    "its weights are a pickle, {}, which can run code when opened and is never loaded; save them as"
    " safetensors where you trust it, with PEFT's save_pretrained"
)


def excess(folder: Path) -> str | None:
    """What of an adapter's folder is larger than that of any adapter, and would be read for hours;
    None where nothing is.
    """
    if said := too_large(folder / CONFIG, MOST_SETTINGS):
        return said
    length = int.from_bytes(first_bytes(folder / _WEIGHTS, 8), "little")
    there = (folder / _WEIGHTS).is_file() and length <= (folder / _WEIGHTS).stat().st_size
    if there and length > MOST_HEADER:
        return (
            f"the header of {_WEIGHTS} has {length:,} bytes, and at most {MOST_HEADER:,} are read"
        )
    return None


def check_patterns(settings: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise a ValueError where a pattern by which settings of PEFT name modules is none, or takes
    too long on these names.
    """
    given = [settings.get(key) for key in ("target_modules", "exclude_modules", "layers_pattern")]
    keys = [settings.get(key) or () for key in ("rank_pattern", "alpha_pattern")]
    patterns = [
        one
        for one in (*given, *(key for part in keys for key in part))
        if isinstance(one, str) and not _PLAIN.fullmatch(one)
    ]
    if not patterns:
        return
    names = list(names)

    def read() -> None:
        for pattern in patterns:
            try:
                form = re.compile(rf"(.*\.)?({pattern})")
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"a pattern of modules cannot be read ({error})") from None
            for name in names:
                form.fullmatch(name)

    tried(PATTERN_SECONDS, "reading the patterns that name its modules", read)


def foreign_form(path: Path) -> str | None:
    """What a file or folder is that is no adapter in PEFT's form, with the way out; None where it
    may be one, or is not there. Reads headers only, and opens no pickle.
    """
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        return None
    return next(filter(None, _folder(path)), None)


def nested_adapters(folder: Path) -> list[str]:
    """The folders in this one, up to two levels down, that hold an adapter; checkpoints by step."""
    found = [path.parent for level in ("*", "*/*") for path in folder.glob(f"{level}/{CONFIG}")]
    names = [path.relative_to(folder).as_posix() for path in found]
    shown = [name for name in names if not name.startswith(".")]
    return sorted(shown, key=lambda name: [int(n) if n.isdigit() else n for n in _split(name)])


def _split(name: str) -> list[str]:
    return re.split(r"(\d+)", name)  # texts and numbers by turns, so that they compare


def _file(path: Path) -> str:
    if (said := not_the_file(path)) or (said := _gguf(path)):
        return said
    if _is_archive(path):
        return f"it is an archive; unpack it and give the folder that holds {CONFIG}"
    return f"it is a file; give the folder that holds {CONFIG} and {_WEIGHTS}"


def _is_archive(path: Path) -> bool:
    return first_bytes(path).startswith(_ARCHIVES) or path.name.lower().endswith(_ARCHIVE_NAMES)


def _gguf(path: Path) -> str | None:
    head = first_bytes(path, 65_536)
    if not head.startswith(b"GGUF"):
        return None
    if re.search(rb"general\.type.{12}adapter", head, re.DOTALL):
        return (
            f"{path.name} is a LoRA in llama.cpp's form, GGUF, which PEFT cannot read; give the"
            " adapter that it was converted from"
        )
    return f"{path.name} is a whole model in GGUF and no adapter; give it as a base model"


def _folder(folder: Path) -> Iterator[str | None]:
    """What the folder is, from the surest sign to the last."""
    yield excess(folder)
    there = {path.name: path for path in folder.iterdir() if not path.name.startswith(".")}
    if not there:
        yield "it is empty; look whether its download or copy was finished"
    for name in (CONFIG, _WEIGHTS):
        yield not_the_file(there[name]) if name in there else None
    settings, files = _settings(folder / CONFIG), there.values()
    weights = [path for path in files if path.suffix == ".safetensors"]
    if any(map(_OF_PICTURES.match, _tensors(weights))):
        yield DIFFUSION
    if _WEIGHTS in there:
        return
    if "adapters.safetensors" in there or {"fine_tune_type", "lora_parameters"} & settings.keys():
        yield MLX
    if _some(there, _IN_PARTS):
        yield f"its weights are in parts, which PEFT does not read; save them as one {_WEIGHTS}"
    if pickled := _some(there, _PICKLED):
        yield PICKLE.format(pickled)
    yield from map(_gguf, (path for path in files if path.suffix == ".gguf"))
    yield _whole_model(there)
    if nested := nested_adapters(folder):
        last = f", such as {nested[-1]}, the last" if nested[1:] else ""
        yield f"it is no adapter itself, but holds some: {_listed(nested)}; give one of them{last}"
    if _some(there, _SHARDED):
        yield (
            "it is a checkpoint in parts, of DeepSpeed or FSDP, and no adapter; gather it with the"
            " trainer that wrote it, and save it with PEFT's save_pretrained"
        )
    if archive := next((path.name for path in files if path.is_file() and _is_archive(path)), None):
        yield f"it holds no adapter but the archive {archive}; unpack it"
    if CONFIG not in there:
        yield (
            f"it holds neither {CONFIG} nor {_WEIGHTS}; give the folder that PEFT's save_pretrained"
            " wrote"
        )


def _whole_model(there: dict[str, Path]) -> str | None:
    if not ("config.json" in there and _some(there, _WHOLE_MODEL)):
        return None
    kinds = _settings(there["config.json"]).get("architectures") or ["of an unknown class"]
    return (
        f"it is a whole model ({kinds[0]}), trained in full or merged with its adapter, and no"
        " adapter; give it as a base model"
    )


def _some(names: Iterable[str], pattern: re.Pattern) -> str | None:
    return next((name for name in sorted(names) if pattern.fullmatch(name)), None)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


def _settings(path: Path) -> dict:
    """What a file of JSON holds; nothing where it cannot be read or is no mapping."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _tensors(files: Iterable[Path]) -> Iterator[str]:
    for path in files:
        try:
            with safe_open(path, "numpy") as file:
                yield from file.keys()
        except (SafetensorError, OSError):  # said elsewhere
            continue
