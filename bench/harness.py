"""What the benches share: random models of a real shape, timed work, and rows of the table of
figures.
"""

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from driftbook.study.files import OUTPUTS
from driftbook.study.methods import PEFT_METHODS, STUDIED
from driftbook.study.study_file import Study, load
from driftbook.study.variants import Variant

LENGTH = 4_096  # tokens: nothing is cut
BATCH = 8  # TRL's own
MOST = 1_024  # tokens: examples longer than TRL's own limit are left out on both sides
# other than PEFT's defaults, as the study of real text has them
SETTINGS = {
    "lora": {"lora_alpha": 16},
    "prompt_tuning": {"init": "vocabulary"},
    "p_tuning": {"encoder_hidden_size": 64},
}
RATES = {"lora": 1e-3, "ia3": 1e-2, "prompt_tuning": 1e-2, "p_tuning": 1e-3}
VIRTUAL_TOKENS = 20
FOLDER = OUTPUTS / "bench"
COLUMNS = ["figure", "setting", "ours", "peer", "unit", "value", "goal", "met"]
# about 5 M parameters each: Llama's vocabulary with small layers, and a small vocabulary with
# larger ones
SHAPES = {
    "vocabulary of 32,000": {
        "vocab_size": 32_000,
        "hidden_size": 128,
        "intermediate_size": 341,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
    "vocabulary of 8,192": {
        "vocab_size": 8_192,
        "hidden_size": 256,
        "intermediate_size": 682,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
    },
}
LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4_096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500_000.0,
}


def settings_of(method: str) -> dict[str, Any]:
    """A method's settings for a Llama: PEFT's own, where it has any for the modules of a Llama or
    where a default is missing, and those of SETTINGS.
    """
    import peft
    from peft.utils import constants

    config = getattr(peft, PEFT_METHODS[method].config)
    fields = {field.name for field in dataclasses.fields(config)}
    kind = config(num_virtual_tokens=1) if "num_virtual_tokens" in fields else config()
    prefix = f"TRANSFORMERS_MODELS_TO_{kind.peft_type.name}_"
    found = {"num_virtual_tokens": VIRTUAL_TOKENS} if "num_virtual_tokens" in fields else {}
    for name in sorted(fields & {"target_modules", "feedforward_modules"}):
        mapping = getattr(constants, f"{prefix}{name.upper()}_MAPPING", {})
        if modules := mapping.get("llama"):
            found[name] = list(modules)
    needed = {name: ["q_proj", "v_proj"] for name in PEFT_METHODS[method].needs}
    return needed | found | SETTINGS.get(method, {})


def study(
    n: int, methods: Sequence[str] = STUDIED, length: int = LENGTH, batch: int = BATCH
) -> Study:
    """The study of real text (studies/real_data.yaml) with n examples, these methods without
    dropout, and TRL's own batch.
    """
    real = load("real_data")
    data = {
        name: one.model_copy(update={"n": n if name != "heldout" else one.n})
        for name, one in real.data.items()
    }
    block = real.grid[0].model_copy(
        update={
            "methods": tuple(methods),
            "learning_rates": {method: (RATES.get(method, 1e-3),) for method in methods},
        }
    )
    training = real.training.model_copy(
        update={"batch_size": batch, "max_length": length, "tokens_per_batch": None}
    )
    made = {method: settings_of(method) for method in methods}
    return Study(
        **{
            **real.model_dump(exclude_unset=True),
            "methods": made,
            "data": data,
            "grid": (block,),
            "training": training,
        }
    )


def texts(this: Study) -> list[str]:
    """What the examples say, to train a tokenizer on."""
    from driftbook.benchmarks.data import training_examples

    return [
        text
        for name in ("sft", "dpo")
        for one in training_examples(name, this)
        for text in (one["prompt"][-1]["content"], one.get("answer") or one["chosen"])
    ]


def fit_once(variant: Variant, base: Any, prepared: Any, this: Study) -> tuple[dict, Any]:
    from driftbook.models import adapters
    from driftbook.training import fit

    model = adapters.create(variant, base.model, base.tokenizer)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            return fit.fit(variant, model, base, prepared, this, Path(scratch, "adapter"))
    finally:
        adapters.detach(model)


def timed(work: Callable, *given: Any) -> tuple[Any, float]:
    """What work(*given) gives, and its seconds: on a GPU wall-clock to the end of what it started
    there, else of the processor.
    """
    import torch

    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    started = clock()
    found = work(*given)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found, clock() - started


def row(
    figure: str,
    setting: str,
    value: float,
    goal: float | None,
    unit: str,
    ours: float | None = None,
    peer: float | None = None,
    least: bool = True,
) -> dict:
    """A line of the result; `least` says whether the goal is the least or the most that the value
    may be.
    """
    met = None if goal is None else bool(value >= goal if least else value <= goal)
    return dict(zip(COLUMNS, (figure, setting, ours, peer, unit, value, goal, met), strict=True))


def least_seconds(work: Callable, *given: object, repeats: int = 3) -> tuple[float, object]:
    """The least CPU seconds of a few repeats of work(*given), and what the last one gave: other
    work on the machine only ever adds.
    """
    seconds, result = [], None
    for _ in range(repeats):
        start = time.process_time()
        result = work(*given)
        seconds.append(time.process_time() - start)
    return min(seconds), result


# ---- models and items
def bbq_items(n: int) -> pd.DataFrame:
    """Real BBQ items, whole question families from the first of each dimension on, about n."""
    from driftbook.benchmarks import bbq

    shared = os.environ.get("DRIFTBOOK_SHARED")
    items = bbq.load(Path(shared) / "data" / "bbq" / "data" if shared else bbq.PUBLIC)
    return pd.concat(
        [part.head(n // items.dimension.nunique()) for _, part in items.groupby("dimension")],
        ignore_index=True,
    )


def tokenizer_of(texts: Sequence[str], n_tokens: int = 8_192):
    """A byte-level tokenizer trained on the texts, with Mistral's chat template: it ends in a token
    and not in a space, which the peer would move.
    """
    from driftbook.batch import random_models
    from driftbook.miniature.families import FAMILY

    return random_models.tokenizer(texts, FAMILY["mistral"], FAMILY["mistral"].template, n_tokens)


def random_llama(shape: dict, tokenizer, dtype: str = "float32", device: str = "cpu"):
    """A Llama of random weights; its answers mean nothing, its cost is that of a trained one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        max_position_embeddings=4_096,
        tie_word_embeddings=shape["hidden_size"] < 4_096,
        initializer_range=0.1,
        **shape,
        **ids,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def texts_of(items: pd.DataFrame) -> list[str]:
    return [
        " ".join(texts)
        for texts in items[["passage", "question", "ans0", "ans1", "ans2"]].to_numpy()
    ]


def _wall(work: Callable[[], object], device: str) -> float:
    import torch

    def done() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    start = done()
    work()
    return done() - start


def _matrix_rate(device: str, dtype: str, size: int = 4_096) -> float:
    """Floating-point operations a second in large matrix products."""
    import torch

    size = size if device == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    _wall(lambda: a @ b, device)
    return 2 * size**3 * 20 / _wall(lambda: [a @ b for _ in range(20)], device)
