"""Every PEFT method and every mitigation, declared once: the study file, variants, training, plan,
calibration, labels and colours of figures follow.
"""

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class PeftMethod:
    """A method as a study file names it: its label in figures, its class, PEFT's configuration
    class, its colour, and the settings that the name fixes.
    """

    label: str
    method_class: Literal["adapter", "prompt"]
    config: str
    colour: str
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    inits: tuple[str, ...] = ()  # how a soft prompt may begin
    needs: tuple[str, ...] = ()  # settings without a default that holds for all families
    quantized: bool = False  # trained on a base model in 4 or 8 bits
    objectives: tuple[str, ...] = ("sft", "dpo")


# thirds of a model's layers that alone may have an adapter
LAYER_PARTS = ("early", "middle", "late")
# How a soft prompt may begin. Of those from a text: which of init_texts each takes. Permuted: the
# coordinates of its embeddings, alike for all tokens; frozen: in front of as many trainable tokens;
# dro: optimised for safety before (training/dro.py).
TEXT_INITS = {"task_text": "task"} | dict.fromkeys(
    ("safety_text", "safety_permuted", "safety_frozen", "dro"), "safety"
)
INITS = ("random", "vocabulary", *TEXT_INITS)
# an encoder makes all virtual tokens, so none of them can be frozen
ENCODED_INITS = tuple(init for init in INITS if init != "safety_frozen")
_TOKENS = {"needs": ("num_virtual_tokens",)}
_TARGETS = {"needs": ("target_modules",)}
SUFFIX = "suffix_tuning"  # a soft prompt behind the user's text (models/suffixes.py)
# A method is one entry. Figures draw methods in this order: adapters in blues, prompts in oranges.
# BitFit trains biases, which most bases lack: PEFT's BEFT adds them.
PEFT_METHODS = {
    "lora": PeftMethod("LoRA", "adapter", "LoraConfig", "#0072B2"),
    "ia3": PeftMethod("IA3", "adapter", "IA3Config", "#56B4E9", **_TARGETS),
    "prompt_tuning": PeftMethod(
        "Prompt-Tuning", "prompt", "PromptTuningConfig", "#D55E00", inits=INITS, **_TOKENS
    ),
    "p_tuning": PeftMethod(
        "P-Tuning", "prompt", "PromptEncoderConfig", "#E69F00", inits=ENCODED_INITS, **_TOKENS
    ),
    "qlora": PeftMethod("QLoRA", "adapter", "LoraConfig", "#003D73", quantized=True),
    "dora": PeftMethod("DoRA", "adapter", "LoraConfig", "#009E9E", {"use_dora": True}),
    "rslora": PeftMethod("rsLoRA", "adapter", "LoraConfig", "#6A8FD8", {"use_rslora": True}),
    "bitfit": PeftMethod("bias tuning", "adapter", "BeftConfig", "#4B4BA8", **_TARGETS),
    "ln_tuning": PeftMethod("LayerNorm tuning", "adapter", "LNTuningConfig", "#86C5B5"),
    "prefix_tuning": PeftMethod(
        "prefix tuning", "prompt", "PrefixTuningConfig", "#B5651D", inits=("random",), **_TOKENS
    ),
    SUFFIX: PeftMethod(
        "Prompt-Tuning behind the text",
        "prompt",
        "SuffixConfig",
        "#8C2D04",
        inits=("random", "vocabulary"),
        objectives=("sft",),
        **_TOKENS,
    ),
}
# their ids hold a soft prompt, which no other model reads: no reference, no other part of a product
_SHARING = tuple(name for name, one in PEFT_METHODS.items() if "dpo" in one.objectives)
METHODS = ("none", *PEFT_METHODS)
STUDIED = ("lora", "ia3", "prompt_tuning", "p_tuning")  # by the original study
METHOD_LABELS = {"none": "base model"} | {name: one.label for name, one in PEFT_METHODS.items()}
METHOD_CLASS = {"none": "base"} | {name: one.method_class for name, one in PEFT_METHODS.items()}


@dataclasses.dataclass(frozen=True)
class MitigationKind:
    """A way to repair what fine-tuning did to safety: its label in figures, when it is done, to
    which methods, and what a study file says of it.

    Of the times, `training` trains runs of their own; `after` and `test` make new variants of a
    trained run; `again` goes on training it, whether it was repaired or not.
    """

    label: str
    when: Literal["training", "after", "test", "again"]
    methods: tuple[str, ...] = tuple(PEFT_METHODS)
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    values: tuple[float, float] = (0.0, 1.0)  # least and most, where it has any
    open_ends: tuple[float, ...] = ()  # of these ends, those at which nothing is left
    combines_factors: bool = False  # so that the update must be a product of A and B
    keeps_bias: bool = False  # a trained bias of LoRA's modules is repaired with them, or deleted
    objectives: tuple[str, ...] = ("sft", "dpo")  # by which a run was trained, or is


# the stage that makes a variant by when its mitigation is done, in the order of the stages
MADE_IN = {"training": "train", "after": "mitigate", "test": "mitigate", "again": "retune"}
MAKING_STAGES = tuple(dict.fromkeys(MADE_IN.values()))
_LORA = ("lora", "rslora", "qlora")  # whose update is linear in the factor B
_PLAIN = (*_LORA, "dora", "ia3")
# of a second objective in training: what its value is says sections.Mitigation
_BETA = {"methods": _SHARING, "needs": ("data", "values"), "takes": ("data", "values")}
_BETA |= {"values": (0.0, 1_000.0), "open_ends": (0,)}
_SELECTS = ("operator", "select", "rank", "pair", "values", "controls")
# A mitigation is one entry, and one function of its name in training/mitigations.py (of those in
# training: in training/examples.py and training/objectives.py).
MITIGATION_KINDS = {
    "safe_lora": MitigationKind(
        "Safe LoRA", "after", _PLAIN, ("pair", "values"), _SELECTS, keeps_bias=True
    ),
    "zero": MitigationKind(
        "modules zeroed",
        "after",
        _PLAIN,
        needs=("pair", "values"),
        takes=("select", "pair", "values"),
        keeps_bias=True,
    ),
    "rescale": MitigationKind("rescaling", "after", _PLAIN, ("values",), ("values",)),
    "average": MitigationKind(
        "weight averaging",
        "after",
        _LORA,
        needs=("values",),
        takes=("values", "snapshots"),
        open_ends=(0,),
        combines_factors=True,
    ),
    "resta": MitigationKind(
        "RESTA",
        "after",
        _LORA,
        needs=("safety", "values"),
        takes=("safety", "values"),
        values=(0.0, 10.0),
        combines_factors=True,
    ),
    "safe_merge": MitigationKind(
        "SafeMERGE",
        "after",
        _LORA,
        needs=("safety", "pair", "values"),
        takes=("safety", "pair", "select", "weight", "values"),
        combines_factors=True,
    ),
    "soup": MitigationKind(
        "soup of two updates",
        "after",
        _LORA,
        needs=("safety", "values"),
        takes=("safety", "values"),
        open_ends=(0, 1),
        combines_factors=True,
    ),
    "reduce_intruders": MitigationKind(
        "intruder dimensions reduced",
        "after",
        ("lora", "rslora"),
        needs=("values",),
        takes=("values",),
        combines_factors=True,
    ),
    "template": MitigationKind(
        "safety template at test time (PTST)",
        "test",
        needs=("system_prompt",),
        takes=("system_prompt",),
    ),
    "mod": MitigationKind(
        "product of distributions at decoding (MOD)",
        "test",
        _SHARING,
        needs=("safety", "values"),
        takes=("safety", "others", "values"),
        open_ends=(0, 1),
    ),
    "mixing": MitigationKind(
        "safety data mixed in",
        "training",
        needs=("data", "values"),
        takes=("data", "values"),
        open_ends=(0, 1),
    ),
    "constrained_sft": MitigationKind(
        "constrained SFT", "training", _SHARING, takes=("betas",), objectives=("sft",)
    ),
    "kl": MitigationKind("KL to the base model", "training", **_BETA),
    "safegrad": MitigationKind("SafeGrad", "training", **_BETA),
    "pcgrad": MitigationKind("PCGrad", "training", _SHARING, ("data",), ("data",)),
    "mgda": MitigationKind("MGDA", "training", _SHARING, ("data",), ("data",)),
    "drift_budget": MitigationKind(
        "drift budget",
        "training",
        _SHARING,
        needs=("data", "values"),
        takes=("data", "values", "eta"),
        values=(0.0, 100.0),
    ),
    "second_tuning": MitigationKind(
        "tuned once more on benign data",
        "again",
        (*_PLAIN, "prompt_tuning"),
        needs=("of", "data", "values"),
        takes=("of", "data", "epochs", "values"),
        open_ends=(0, 1),
    ),
}
# of Safe LoRA
CONTROLS = ("same norm", "same modules zeroed", "random modules zeroed", "random subspace", "noise")
# initialisations of LoRA that change the base model itself
REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")
# of these, the one that writes over the base's weights in place
REWRITING_IN_PLACE = ("olora",)
# initialisations of LoRA that a step of PEFT's own computes from data, which is not done here
FROM_DATA = ("eva", "corda", "lora_ga")
# settings of LoRA with which an adapter cannot be scored as it was trained, and why
UNSCORED_SETTINGS = {
    "alora_invocation_tokens": "by which it acts only behind these tokens, and only in PEFT's own"
    " forward",
    "arrow_config": "by which it mixes other adapters, which its folder does not hold",
}
RANDOM_RESIDUAL = "pissa_niter"
# settings by which an adapter trains more than its factors
BESIDE_FACTORS = ("bias", "lora_bias", "modules_to_save", "trainable_token_indices")


def layers_of(part: str, n: int) -> range:
    """The layers of a third (LAYER_PARTS) of a model of n layers, counted from 0.

    Raises:
        ValueError: a model of fewer than three layers has no thirds.
    """
    if n < len(LAYER_PARTS):
        raise ValueError(f"a model of {n} layers has no {part} third; take one of three or more")
    third = LAYER_PARTS.index(part)
    return range(round(third * n / 3), round((third + 1) * n / 3))


def is_encoded(method: str, init: str | None) -> bool:
    """Whether a prompt comes out of an encoder that is fitted to a start."""
    return method == "p_tuning" and init not in (None, "random")


def unscored_setting(settings: dict[str, Any]) -> str | None:
    """The setting of PEFT with which an adapter could not be scored as it was trained, and why;
    None where there is none.
    """
    for key, why in UNSCORED_SETTINGS.items():
        if settings.get(key):
            return f"{key}, {why}"
    init = str(settings.get("init_lora_weights", "")).lower()
    if init.startswith(RANDOM_RESIDUAL):
        return (
            f"init_lora_weights = {init}, by which it belongs to a base that random numbers made"
            " and no file holds; take pissa, or save it with PEFT's"
            " path_initial_model_for_weight_conversion"
        )
    return None
