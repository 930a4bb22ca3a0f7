"""What a model's arithmetic and memory follow from, read from its configuration or GGUF header, or
guessed from its name.
"""

import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

from driftbook.study import sources
from driftbook.study.gguf_files import TABLE, Header, read_header
from driftbook.study.sections import Base, Judge, Rater, Source
from driftbook.study.study_file import Study

WEIGHT_BYTES = {None: {"float32": 4, "bfloat16": 2}, "int8": 1.1, "nf4": 0.56}


@dataclass(frozen=True)
class Size:
    """What a model's arithmetic and memory follow from: weights in its layers, of its embeddings
    and head, layers, width, key/value width, vocabulary.
    """

    body: float
    embeddings: float
    layers: int
    width: int
    kv_width: int
    vocabulary: int
    known: bool = True  # read from its configuration; else guessed from its name

    @property
    def weights(self) -> float:
        return self.body + self.embeddings


BERT = Size(8.5e7, 2.4e7, 12, 768, 768, 30_522, known=False)  # most classifiers are of this size


def size_of(config: dict) -> Size:
    """The size of a decoder (Llama's layers) from its config.json."""
    config = config.get("text_config", config)
    width, layers, vocabulary = (
        config[name] for name in ("hidden_size", "num_hidden_layers", "vocab_size")
    )
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or width // heads
    kv = (config.get("num_key_value_heads") or heads) * head
    attention = 2 * width * heads * head + 2 * width * kv
    body = float(layers * (attention + 3 * width * config["intermediate_size"]))
    tied = config.get("tie_word_embeddings", config.get("model_type", "").startswith("gemma"))
    return Size(body, vocabulary * width * (1.0 if tied else 2.0), layers, width, kv, vocabulary)


def size_of_gguf(header: Header) -> Size:
    """The size of a model from its GGUF file's header, all its weights counted."""
    rows, width = header.tensors[TABLE][0]
    heads = header.own("attention.head_count", 1)
    kv_heads = header.own("attention.head_count_kv", heads)
    kv_heads = max(kv_heads) if isinstance(kv_heads, list) else kv_heads
    kv = kv_heads * header.own("attention.key_length", width // heads)
    tables = [TABLE, *({"output.weight"} & set(header.tensors))]
    embeddings = sum(prod(header.tensors[name][0]) for name in tables)
    body, layers = header.n_weights - embeddings, header.own("block_count", 1)
    return Size(float(body), float(embeddings), layers, width, kv, rows)


MADE = ("miniature", "random", "twin")


def is_made_here(source: Source) -> bool:
    """Whether notebook 01 makes a model."""
    return source.local is None and source.source.partition(":")[0] in MADE


def size(source: Base | Judge | Rater, study: Study) -> Size:
    """The size of a model: from its configuration or GGUF file where it is here or cached; else
    from the billions in its name, as a Llama of that size.
    """
    from huggingface_hub import try_to_load_from_cache

    kind, _, name = source.source.partition(":")
    if kind == "twin" and source.local is None:
        return size(study.bases[study.twins[name].of], study)
    try:
        if file := sources.gguf_file(source, fetch=False):
            return size_of_gguf(read_header(file))
        if source.local is not None or is_made_here(source):
            found = Path(sources.locate(source, study), "config.json")
        else:
            found = try_to_load_from_cache(source.source, "config.json", revision=source.revision)
        return size_of(json.loads(Path(found).read_text()))
    except (ValueError, OSError, TypeError, KeyError):
        is_classifier = getattr(source, "format", None) == "classifier"
        return BERT if is_classifier else guessed_size(source.source)


def weight_bytes(model: Base | Judge | Rater, study: Study) -> float:
    """Bytes of a model's weights as they are held."""
    each = WEIGHT_BYTES[getattr(model, "quantization", None)]
    return size(model, study).weights * (each[model.dtype] if isinstance(each, dict) else each)


def weight_bytes_read(model: Base | Judge | Rater, study: Study) -> float:
    """Bytes of a model's weights as they are read, before they are quantised."""
    return size(model, study).weights * WEIGHT_BYTES[None][model.dtype]


def check_fits(study: Study, memory: float) -> None:
    """Raise a ValueError where one GPU, of so many bytes, cannot hold the weights that a job loads:
    a base model, and all judges together. No model is spread over several GPUs. A model of which
    neither a file nor its name tells the size is let pass.
    """
    needed = {name: [base] for name, base in study.bases.items()}
    needed |= {" and ".join(study.judges): list(study.judges.values())} if study.judges else {}
    for names, models in needed.items():
        told = [one for one in models if size(one, study).known or _named_size(one.source)]
        held = sum(weight_bytes(one, study) for one in told)
        if held > memory:
            raise ValueError(
                f"the weights of {names} take {held / 1e9:.0f} GB and one GPU has"
                f" {memory / 1e9:.0f} GB; models are not spread over several GPUs: take a smaller"
                " model, hold a base model in 4 bits (quantization: nf4), or use a larger GPU"
            )


def _named_size(name: str) -> float | None:
    """The billions of weights in a model's name; None where it names none."""
    billion = re.search(r"(\d+(?:\.\d+)?)\s*[bB](?![a-z])", name)
    million = re.search(r"(\d+)\s*[mM](?![a-zA-Z])", name)
    return float(billion[1]) if billion else float(million[1]) / 1000 if million else None


def guessed_size(name: str) -> Size:
    """The size of a model by the billions or millions in its name; 8 billion, as of most judges,
    where it names none.
    """
    if name.startswith(("miniature:", "random:")):
        return Size(3e5, 1e5, 2, 96, 48, 500, known=False)
    eighths = (_named_size(name) or 8.0) / 8
    layers, *widths = (full * eighths ** (1 / 3) for full in (32, 4096, 1024))
    layers, (width, kv) = max(1, round(layers)), (max(1, round(one / 64)) * 64 for one in widths)
    return Size(7e9 * eighths, 1e9 * eighths, layers, width, kv, 128_000, known=False)
