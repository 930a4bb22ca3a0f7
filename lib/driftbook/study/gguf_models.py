"""A GGUF file's model as an ordinary checkpoint: dequantised once and kept by the file's hash.

transformers reads GGUF and refuses to save what it read, so a fresh model of the same configuration
takes over the weights. What was saved is then loaded and compared with what was read.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from math import isclose
from pathlib import Path
from typing import Any

from filelock import FileLock

from driftbook.study import code
from driftbook.study.files import check_writable, digest, read_json, replacing_folder
from driftbook.study.gguf_files import INSTALL, OR_FOLDER, TOKENS, Header, check_readable

BYTES = {"float32": 4, "bfloat16": 2}
PROBE = 16  # tokens on which the saved model is compared with the one that was read
WORDS = (
    "What is 12 + 345.6?\n\nIt's  two   spaces, a\ttab & «Ünïcödé» 模型 🙂.",
    " def f(x):\n    return x  # 3,000,000\n",
)
# Settings that shapes or other settings say already, or that change no number.
SAID_ELSEWHERE = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "expert_count",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
    "attention.causal",
    "pooling_type",
    "tensor_data_layout",
    "use_parallel_residual",
)
EPSILONS = ("rms_norm_eps", "norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon")
NAMES = {  # of a setting in transformers, where it is not the same word
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads"),
    "attention.layer_norm_rms_epsilon": EPSILONS,
    "attention.layer_norm_epsilon": EPSILONS,
    "ssm.inner_size": ("intermediate_size",),
    "expert_used_count": ("num_experts_per_tok",),
}


def dequantised(file: Path, dtype: str, folder: Path) -> Path:
    """The folder, below `folder`, of the checkpoint in float32 or bfloat16 that a GGUF file holds:
    made once for each content of the file and each version of what makes it.

    Raises:
        ValueError: the file is none that can be read rightly, or there is no room.
    """
    path = dequantised_folder(file, dtype, folder)
    if not path.exists():
        header = check_readable(file)
        check_writable(folder, header.n_weights * BYTES[dtype])
        with FileLock(folder / f"{path.name}.lock"):
            if not path.exists():
                with replacing_folder(path) as scratch:
                    _write(header, dtype, scratch)
    return path


def dequantised_folder(file: Path, dtype: str, folder: Path) -> Path:
    """Where `dequantised` puts its checkpoint."""
    return folder / f"gguf-{sha256(file)[:16]}-{dtype}-{_recipe()}"


def sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes, 64 hex digits."""
    stat = file.stat()
    return _sha256(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _sha256(file: Path, size: int, changed: int) -> str:
    """Kept while the file is the same: a file of gigabytes takes many seconds."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@cache
def _recipe() -> str:
    """Eight hex digits that change with this code and with the packages that read GGUF."""
    try:
        versions = {name: version(name) for name in ("transformers", "tokenizers", "gguf")}
    except PackageNotFoundError:
        raise ValueError(f"{INSTALL}, or {OR_FOLDER}") from None
    return digest([code.fingerprint(code.of_module(__name__)), versions], 8)


def _write(header: Header, dtype: str, scratch: Path) -> None:
    """Write the model and the tokenizer of a GGUF file, and check what was written."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    kind = getattr(torch, dtype)
    where = {"pretrained_model_name_or_path": header.path.parent, "gguf_file": header.path.name}
    disable_progress_bar()  # bars of loading and saving are noise in a notebook
    with _in_one_sentence(header.path):
        config = AutoConfig.from_pretrained(**where)
    _check_settings(header, config)
    with _in_one_sentence(header.path):
        read, loading = AutoModelForCausalLM.from_pretrained(
            **where,
            config=config,
            dtype=kind,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(**where, config=config)
    read.eval()
    _check_taken(header, read, loading)
    config = read.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(name, None)
    with torch.device("meta"):
        fresh = type(read)(type(read.config)(**config))
    fresh.load_state_dict(read.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = read.generation_config
    fresh.generation_config.eos_token_id = _end_tokens(header)
    fresh.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    _without_added(header.settings[TOKENS], scratch)
    _check_saved(header, read, tokenizer, scratch)


def _without_added(n_tokens: int, folder: Path) -> None:
    """Take out of a saved tokenizer the tokens that the file does not have: transformers' classes
    add their own (`<mask>`, `<|endoftext|>`), which have no row in the model's table.
    """
    path, about = folder / "tokenizer.json", folder / "tokenizer_config.json"
    saved, settings = read_json(path), read_json(about)
    added = {one["content"] for one in saved["added_tokens"] if one["id"] >= n_tokens}
    if not added:
        return
    kept = [one for one in saved["added_tokens"] if one["content"] not in added]
    path.write_text(json.dumps({**saved, "added_tokens": kept}, ensure_ascii=False))
    for name, value in list(settings.items()):
        if isinstance(value, list):
            settings[name] = [one for one in value if one not in added]
        elif isinstance(value, str) and value in added:
            del settings[name]
    settings["tokenizer_class"] = "TokenizersBackend"  # the one that adds nothing
    about.write_text(json.dumps(settings, indent=1))


def _end_tokens(header: Header) -> int | list[int] | None:
    """The ids at which an answer ends: of the text, of a turn, of a message (as llama.cpp has)."""
    names = ("eos", "eot", "eom")
    found = [header.settings.get(f"tokenizer.ggml.{name}_token_id") for name in names]
    ends = list(dict.fromkeys(end for end in found if end is not None))
    return ends if len(ends) > 1 else ends[0] if ends else None


@contextmanager
def _in_one_sentence(path: Path) -> Iterator[None]:
    """Any error of the reader (it raises a dozen kinds) as one sentence."""
    try:
        yield
    except Exception as error:
        why = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{path} cannot be read by transformers ({type(error).__name__}: {why}); {OR_FOLDER}"
        ) from error


# ---- what must hold
def _check_taken(header: Header, read: Any, loading: dict) -> None:
    """Raise a ValueError where a weight of the model is not in the file, or one of the file has
    gone to no place in the model.
    """
    path = header.path
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"{path} lacks {missing[0]} of {len(missing)} weights; {OR_FOLDER}")
    n_model = sum(value.numel() for value in read.parameters())  # a tied one counts once
    n_file = header.n_weights
    if n_model != n_file:
        raise ValueError(
            f"{path} holds {n_file:,} weights and transformers makes a model of {n_model:,} from"
            f" them, so it reads them otherwise than they are meant; {OR_FOLDER}"
        )


def _check_settings(header: Header, config: Any) -> None:
    """Raise a ValueError where a setting of the file is not the model's: transformers leaves out
    those that it does not know.
    """
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

    if header.architecture in GGUF_CONFIG_ARCHS:  # transformers takes these setting by setting
        return
    begin = f"{header.architecture}."
    for name, value in header.settings.items():
        setting = name.removeprefix(begin)
        if setting == name or setting in SAID_ELSEWHERE or setting.startswith("rope.scaling."):
            continue
        values = _values(config, setting)
        if value and not any(_same(value, one) for one in values):
            has = f"{values[0]!r}" if values else "nothing"
            raise ValueError(
                f"{header.path} says {name} = {value!r}, and the model that transformers makes of"
                f" it has {has}: it is not read as it is meant; {OR_FOLDER}"
            )


def _values(config: Any, setting: str) -> list:
    """What the model's configuration says of a setting."""
    heads = getattr(config, "num_attention_heads", None) or 1  # a Mamba has none
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    of_windows = rope.get("sliding_attention", rope)
    rope = rope.get("full_attention", rope)
    share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", 1.0)
    known = {
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": int(head * share),
        "rope.freq_base": rope.get("rope_theta"),
        "rope.freq_base_swa": of_windows.get("rope_theta"),
    }
    if setting in known:
        return [known[setting]]
    names = NAMES.get(setting, (setting.rpartition(".")[2],))
    return [getattr(config, name) for name in names if getattr(config, name, None) is not None]


def _same(value: Any, other: Any) -> bool:
    """Whether two settings are the same, as the file's 32 bits say it."""
    numbers = all(isinstance(one, int | float) for one in (value, other))
    return isclose(value, other, rel_tol=1e-6) if numbers else value == other


def _check_saved(header: Header, read: Any, tokenizer: Any, folder: Path) -> None:
    """Raise a ValueError where the saved model or tokenizer is not the one that was read."""
    import torch
    from transformers import AutoTokenizer

    saved = type(read).from_pretrained(folder, dtype=read.dtype, use_safetensors=True).eval()
    ids = torch.arange(PROBE)[None] * (read.config.vocab_size // PROBE)
    with torch.no_grad():
        apart = (saved(ids).logits - read(ids).logits).abs().max().item()
    again, n_tokens = AutoTokenizer.from_pretrained(folder), header.settings[TOKENS]
    texts = [text for words in WORDS for text in (words, words[1:])]
    same = all(tokenizer(text).input_ids == again(text).input_ids for text in texts)
    if (
        not apart <= 1e-5
        or not same
        or len(again) > n_tokens
        or tokenizer.chat_template != again.chat_template
    ):
        what = "tokenizer" if apart <= 1e-5 else f"model (logits differ by {apart:g})"
        raise ValueError(
            f"{header.path}: transformers does not save the {what} as it read it; {OR_FOLDER}"
        )
