"""Every PEFT method and every mitigation, declared once."""

import dataclasses
from typing import Any, Literal

FAMILIES = (
    "llama",
    "qwen2",
    "mistral",
    "gemma",
)  # of the miniature and of random models; a study's base model may be of any other


@dataclasses.dataclass(frozen=True)
class PeftMethod:
    """A method as a study file names it: how figures write it, its class, PEFT's configuration
    class, and what of that is fixed by the name.
    """

    label: str
    method_class: Literal["adapter", "prompt"]
    config: str
    colour: str
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    inits: tuple[str, ...] = ()  # how a soft prompt may begin
    needs: tuple[str, ...] = ()  # settings without a default that holds for all families
    quantized: bool = False  # trained on a base model in 4 or 8 bits


# A method of PEFT is one entry here; figures draw them in this order, adapters in blues and prompts
# in oranges.
PEFT_METHODS = {
    "lora": PeftMethod("LoRA", "adapter", "LoraConfig", "#0072B2"),
    "ia3": PeftMethod("IA3", "adapter", "IA3Config", "#56B4E9", needs=("target_modules",)),
    "prompt_tuning": PeftMethod(
        "Prompt-Tuning",
        "prompt",
        "PromptTuningConfig",
        "#D55E00",
        inits=("random", "vocabulary", "task_text", "safety_text"),
    ),
    "p_tuning": PeftMethod(
        "P-Tuning", "prompt", "PromptEncoderConfig", "#E69F00", inits=("random",)
    ),
    "qlora": PeftMethod("QLoRA", "adapter", "LoraConfig", "#003D73", quantized=True),
    "dora": PeftMethod("DoRA", "adapter", "LoraConfig", "#009E9E", {"use_dora": True}),
    "rslora": PeftMethod("rsLoRA", "adapter", "LoraConfig", "#6A8FD8", {"use_rslora": True}),
    "bitfit": PeftMethod(
        "bias tuning", "adapter", "BeftConfig", "#4B4BA8", needs=("target_modules",)
    ),  # BitFit where the base has no biases: PEFT's BEFT adds them
    "ln_tuning": PeftMethod("LayerNorm tuning", "adapter", "LNTuningConfig", "#86C5B5"),
    "prefix_tuning": PeftMethod(
        "prefix tuning", "prompt", "PrefixTuningConfig", "#B5651D", inits=("random",)
    ),
}
METHODS = ("none", *PEFT_METHODS)
STUDIED = ("lora", "ia3", "prompt_tuning", "p_tuning")  # by the original study
METHOD_LABELS = {"none": "base model"} | {
    name: method.label for name, method in PEFT_METHODS.items()
}
METHOD_CLASS = {"none": "base"} | {
    name: method.method_class for name, method in PEFT_METHODS.items()
}
INITS = ("random", "vocabulary", "task_text", "safety_text")


@dataclasses.dataclass(frozen=True)
class MitigationKind:
    """A way to repair what fine-tuning did to safety: how figures write it, when it is done, to
    which methods, and what a study file says of it.
    """

    label: str
    when: Literal[
        "training", "after", "test"
    ]  # of these, `training` makes runs of their own; the others make new variants of a trained one
    methods: tuple[str, ...] = tuple(PEFT_METHODS)
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    limits: tuple[float, float] = (0.0, 1.0)  # of its values, where it has any


_LORA = ("lora", "rslora", "qlora")  # whose update is linear in the factor B
_SELECTS = ("operator", "select", "rank", "pair", "values", "controls")
# A mitigation is one entry here and one function of its name in training/mitigations.py; those done
# while training are in training/examples.py and training/steps.py.
MITIGATION_KINDS = {
    "safe_lora": MitigationKind(
        "Safe LoRA", "after", (*_LORA, "dora", "ia3"), ("pair", "values"), _SELECTS
    ),
    "zero": MitigationKind(
        "modules zeroed",
        "after",
        (*_LORA, "dora", "ia3"),
        ("pair", "values"),
        ("select", "pair", "values"),
    ),
    "rescale": MitigationKind(
        "rescaling", "after", (*_LORA, "dora", "ia3"), ("values",), ("values",)
    ),
    "average": MitigationKind(
        "weight averaging", "after", _LORA, ("values",), ("values", "snapshots")
    ),
    "resta": MitigationKind(
        "RESTA", "after", _LORA, ("safety", "values"), ("safety", "values"), (0.0, 10.0)
    ),
    "safe_merge": MitigationKind(
        "SafeMERGE",
        "after",
        _LORA,
        ("safety", "pair", "values"),
        ("safety", "pair", "select", "weight", "values"),
    ),
    "reduce_intruders": MitigationKind(
        "intruder dimensions reduced", "after", ("lora", "rslora"), ("values",), ("values",)
    ),
    "template": MitigationKind(
        "safety template at test time (PTST)",
        "test",
        needs=("system_prompt",),
        takes=("system_prompt",),
    ),
    "mixing": MitigationKind(
        "safety data mixed in", "training", needs=("data", "values"), takes=("data", "values")
    ),
    "constrained_sft": MitigationKind("constrained SFT", "training", takes=("betas",)),
}
LINEAR = (
    "average",
    "resta",
    "safe_merge",
    "reduce_intruders",
)  # repairs of LoRA that combine the factors A and B
REWRITING = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
)  # inits of LoRA that change the base model itself
BESIDE_FACTORS = (
    "bias",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
)  # settings by which an adapter trains more than these
CONTROLS = (
    "same norm",
    "same modules zeroed",
    "random modules zeroed",
    "random subspace",
    "noise",
)  # of Safe LoRA
