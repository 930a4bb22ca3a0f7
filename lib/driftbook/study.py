"""A study file: what it may say, checked, and the variants that it asks for."""

import dataclasses
import difflib
import itertools
import json
import math
import os
import re
import string
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from driftbook.files import OUTPUTS, ROOT, digest

FAMILIES = ("llama", "qwen2", "mistral", "gemma")  # of the miniature and of random models; a study's base model may be of any other


@dataclasses.dataclass(frozen=True)
class PeftMethod:
    """A method as a study file names it: how figures write it, its class, PEFT's configuration class, and what of that is fixed by the name."""

    label: str
    method_class: Literal["adapter", "prompt"]
    config: str
    colour: str
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    inits: tuple[str, ...] = ()  # how a soft prompt may begin
    needs: tuple[str, ...] = ()  # settings without a default that holds for all families
    quantized: bool = False  # trained on a base model in 4 or 8 bits


# A method of PEFT is one entry here; figures draw them in this order, adapters in blues and prompts in oranges.
PEFT_METHODS = {
    "lora": PeftMethod("LoRA", "adapter", "LoraConfig", "#0072B2"),
    "ia3": PeftMethod("IA3", "adapter", "IA3Config", "#56B4E9", needs=("target_modules",)),
    "prompt_tuning": PeftMethod("Prompt-Tuning", "prompt", "PromptTuningConfig", "#D55E00", inits=("random", "vocabulary", "task_text", "safety_text")),
    "p_tuning": PeftMethod("P-Tuning", "prompt", "PromptEncoderConfig", "#E69F00", inits=("random",)),
    "qlora": PeftMethod("QLoRA", "adapter", "LoraConfig", "#003D73", quantized=True),
    "dora": PeftMethod("DoRA", "adapter", "LoraConfig", "#009E9E", {"use_dora": True}),
    "rslora": PeftMethod("rsLoRA", "adapter", "LoraConfig", "#6A8FD8", {"use_rslora": True}),
    "bitfit": PeftMethod("bias tuning", "adapter", "BeftConfig", "#4B4BA8", needs=("target_modules",)),  # BitFit where the base has no biases: PEFT's BEFT adds them
    "ln_tuning": PeftMethod("LayerNorm tuning", "adapter", "LNTuningConfig", "#86C5B5"),
    "prefix_tuning": PeftMethod("prefix tuning", "prompt", "PrefixTuningConfig", "#B5651D", inits=("random",)),
}
METHODS = ("none", *PEFT_METHODS)
STUDIED = ("lora", "ia3", "prompt_tuning", "p_tuning")  # by the original study
METHOD_CLASS = {"none": "base"} | {name: method.method_class for name, method in PEFT_METHODS.items()}
INITS = ("random", "vocabulary", "task_text", "safety_text")


@dataclasses.dataclass(frozen=True)
class MitigationKind:
    """A way to repair what fine-tuning did to safety: how figures write it, when it is done, to which methods, and what a study file says of it."""

    label: str
    when: Literal["training", "after", "test"]  # of these, `training` makes runs of their own; the others make new variants of a trained one
    methods: tuple[str, ...] = tuple(PEFT_METHODS)
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    limits: tuple[float, float] = (0.0, 1.0)  # of its values, where it has any


_LORA = ("lora", "rslora", "qlora")  # whose update is linear in the factor B
_SELECTS = ("operator", "select", "rank", "pair", "values", "controls")
# A mitigation is one entry here, and its function in mitigating.py (or, of those in training, training.py).
MITIGATION_KINDS = {
    "safe_lora": MitigationKind("Safe LoRA", "after", (*_LORA, "dora", "ia3"), ("pair", "values"), _SELECTS),
    "zero": MitigationKind("modules zeroed", "after", (*_LORA, "dora", "ia3"), ("pair", "values"), ("select", "pair", "values")),
    "rescale": MitigationKind("rescaling", "after", (*_LORA, "dora", "ia3"), ("values",), ("values",)),
    "average": MitigationKind("weight averaging", "after", _LORA, ("values",), ("values", "snapshots")),
    "resta": MitigationKind("RESTA", "after", _LORA, ("safety", "values"), ("safety", "values"), (0.0, 10.0)),
    "safe_merge": MitigationKind("SafeMERGE", "after", _LORA, ("safety", "pair", "values"), ("safety", "pair", "select", "weight", "values")),
    "reduce_intruders": MitigationKind("intruder dimensions reduced", "after", ("lora", "rslora"), ("values",), ("values",)),
    "template": MitigationKind("safety template at test time (PTST)", "test", needs=("system_prompt",), takes=("system_prompt",)),
    "mixing": MitigationKind("safety data mixed in", "training", needs=("data", "values"), takes=("data", "values")),
    "constrained_sft": MitigationKind("constrained SFT", "training", takes=("betas",)),
}
LINEAR = ("average", "resta", "safe_merge", "reduce_intruders")  # repairs of LoRA that combine the factors A and B
REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")  # inits of LoRA that change the base model itself
BESIDE_FACTORS = ("bias", "lora_bias", "modules_to_save", "trainable_token_indices")  # settings by which an adapter trains more than these
NAMED = ("parent", "base alone")  # what notebook 14 calls runs that are no repairs
CONTROLS = ("same norm", "same modules zeroed", "random modules zeroed", "random subspace", "noise")  # of Safe LoRA
REREAD = ("original_study", "peft_results")  # folders of outputs/ that notebooks 20 and 22 write, from what others published
RESERVED = ("models", "published", "bench", "cache", *REREAD)  # folders of outputs/ that are no study
OUTCOMES = ("unsafe", "over_refusal", "refused", "accuracy_ambiguous", "accuracy_disambiguated", "bias_ambiguous", "bias_disambiguated", "loss", "correct")
ANALYSES = {
    "safety": "09_safety", "fairness": "10_fairness", "mixed_effects": "11_mixed_effects", "tradeoffs": "12_tradeoffs", "dose": "15_dose", "power": "16_power",
    "labels": "17_labels", "primary": "19_primary",
}  # fmt: skip
OF_REPAIRS = {"safe_lora": "14_safe_lora"}  # made where a study has mitigations
HARMS = ("unsafe", "over_refusal", "correct")  # of which a margin in percentage points can be fixed

Method = Literal[METHODS[1:]]


def _number(value: Any) -> float:
    if isinstance(value, str):
        raise ValueError(f"{value!r} is text to YAML; write it with a point and a sign, as 1.0e-3")
    return value


Rate = Annotated[float, BeforeValidator(_number), Field(gt=0, lt=1)]
Count = Annotated[int, Strict(), Field(ge=1)]
Text = Annotated[str, Strict(), Field(min_length=1)]


class Part(BaseModel):
    """A section of a study file: every key is declared, and nothing is changed after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Source(Part):
    """Where something comes from: a public source at a revision, or a local path that overrides it.

    `source` is `miniature:NAME` (made by notebook 01), `random:FAMILY` (random weights, made by notebook 01),
    `github:OWNER/REPO/FOLDER`, or a name on the Hugging Face hub.
    """

    source: Text
    revision: Text | None = None
    files: tuple[Text, ...] = ()
    sha256: dict[str, Text] = {}
    path: Text | None = None

    @cached_property
    def local(self) -> Path | None:
        """The local path that overrides the source; None where it is not given or its environment variable is not set."""
        if self.path is None:
            return None
        path = os.path.expandvars(self.path)
        return None if "$" in path else (ROOT / Path(path).expanduser()).resolve()


class Pair(Part):
    """Two checkpoints of one architecture, V = W_aligned - W_unaligned: the aligned one is the base model itself where not given."""

    aligned: Source | None = None
    unaligned: Source


class Base(Source):
    """A base model: the instruction-tuned model before PEFT."""

    family: Text  # of its architecture; the same word for base models that are alike
    answer_mode: Literal["letters", "options"] = "letters"
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantization: Literal["nf4", "int8"] | None = None  # the weights as they are loaded, by bitsandbytes: such a base model is scored as such too
    system_prompt: str | None = None
    pairs: dict[Text, Pair] = {}  # checkpoints whose difference says what alignment changed: see safe_lora.py

    @property
    def checkpoints(self) -> dict[str, Source]:
        """The checkpoints of its pairs, beside itself."""
        named = {f"{name}, {part}": getattr(pair, part) for name, pair in self.pairs.items() for part in ("aligned", "unaligned")}
        return {name: source for name, source in named.items() if source is not None}


class Judge(Source):
    """A judge model and how its reply is read (judging.FORMATS); a verdict with less than `min_mass` on its words together is null."""

    format: Literal["llama_guard_2", "llama_guard_3", "wildguard", "rubric_harm", "classifier"]
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    label: Text | None = None  # of a classifier: its label that counts as unsafe
    benchmarks: tuple[Text, ...] = ()  # which it judges; all where not given
    min_mass: Annotated[float, Field(ge=0, le=1)] = 0.9
    dtype: Literal["float32", "bfloat16"] = "float32"


class Rater(Source):
    """A chat model that grades the answers to the utility questions from 1 to 10 (rubrics.UTILITY)."""

    min_mass: Annotated[float, Field(ge=0, le=1)] = 0.9
    dtype: Literal["float32", "bfloat16"] = "float32"


# ---- data
COLUMNS = {  # what a row's columns are in the public sets' own forms; `data.examples` reads any of them
    "alpaca": {"prompt": "instruction", "input": "input", "answer": "output"},
    "gsm8k": {"prompt": "question", "answer": "answer"},
    "preference": {"prompt": "conversations", "chosen": "chosen", "rejected": "rejected"},
    "messages": {"messages": "messages"},  # UltraChat-200k, and most chat sets of the hub
    "ultrafeedback": {"chosen": "chosen", "rejected": "rejected"},  # whole conversations that differ in their last answer
}
ROLES = ("system", "prompt", "input", "messages", "answer", "chosen", "rejected")


class TrainingData(Source):
    """Examples to train on (or held-out ones, for the dose).

    `format` names a public form; `columns` is the mapping of any other set: which of its columns is the prompt (a text, or a list of turns), the
    answer, or a whole conversation (`messages`), and of preferences the chosen and the rejected answer.
    """

    format: Literal[tuple(COLUMNS)] | None = None
    columns: dict[Literal[ROLES], Text] = {}
    subset: Text | None = None  # of a set on the hub: its configuration
    split: Text = "train"
    n: Count
    sample: Literal["seeded", "first"] = "seeded"  # drawn with the study's seed, or the first n rows
    template: Text | None = None  # how a prompt is put, with {prompt}; as it is where not given

    @model_validator(mode="after")
    def _readable(self) -> "TrainingData":
        if (self.format is None) == (not self.columns):
            raise ValueError(f"give either format ({', '.join(COLUMNS)}) or columns, a mapping of {', '.join(ROLES)} to the set's own columns")
        if self.template and "{prompt}" not in self.template:
            raise ValueError("a template of data needs {prompt}, where the prompt stands")
        have = set(self.mapping)
        if not ({"messages"} <= have or {"chosen", "rejected"} <= have or {"prompt", "answer"} <= have):
            raise ValueError("columns needs messages, or prompt and answer, or chosen and rejected (with a prompt where these are the answers alone)")
        return self

    @property
    def mapping(self) -> dict[str, str]:
        """The set's own column for each role."""
        return dict(self.columns) or COLUMNS[self.format]

    @property
    def is_preference(self) -> bool:
        """Whether a row has a chosen and a rejected answer."""
        return "chosen" in self.mapping


# ---- benchmarks: which stage asks a format, and what
PROMPT_FORMATS = ("hex_phi", "ailuminate", "xstest", "csv", "strongreject", "simple_safety_tests", "real_toxicity_prompts")
ITEM_FORMATS = ("bbq", "bbq_lite")
UTILITY_FORMATS = ("gsm8k", "answers", "summaries", "ifeval", "text", "stereoset")
CORE = ("safety", "over_refusal", "bbq", "utility")  # what every study asks; others stand beside them under names of their own
ASKED_BY = {"safety": PROMPT_FORMATS, "over_refusal": PROMPT_FORMATS, "bbq": ITEM_FORMATS, "utility": ("gsm8k", "answers", "summaries")}


class Wording(Part):
    """Another way to ask: under another system prompt, or in another wording (of a prompt with {prompt}, of BBQ with its own fields)."""

    system_prompt: str | None = None
    template: Text | None = None
    n: Count | None = None  # a seeded sample of this size of what is asked

    @model_validator(mode="after")
    def _says_something(self) -> "Wording":
        if self.system_prompt is None and self.template is None:
            raise ValueError("a wording needs a system_prompt or a template")
        return self


ITEM_FIELDS = ("context", "question", "ans0", "ans1", "ans2")


def _check_item_template(text: str, needed: tuple[str, ...]) -> None:
    """Raise a ValueError where a wording of a BBQ item has a field that items lack, or lacks one that it needs."""
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise ValueError(f"the template {text!r} cannot be filled in ({error}); write a brace itself twice") from None
    if strange := [name for name in fields if name not in ITEM_FIELDS]:
        raise ValueError(f"a template of BBQ has the field {{{strange[0]}}}; items have {', '.join(ITEM_FIELDS)}")
    if missing := [name for name in needed if name not in fields]:
        raise ValueError(f"a template of BBQ does not show {{{missing[0]}}}, so that what it asks cannot be answered")


class Benchmark(Source):
    """Prompts to ask, or items to score, in the file format of a public benchmark."""

    format: Literal[(*PROMPT_FORMATS, *ITEM_FORMATS, *UTILITY_FORMATS)]
    n: Count | None = None  # a seeded sample of this size; all items where it is not given
    max_new_tokens: Count = 64
    samples: Count | None = None  # so many answers to each prompt are also drawn, at `temperature` from the nucleus of `top_p`
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    template: Text | None = None  # wording of a BBQ item, with {context} {question} {ans0} {ans1} {ans2}; of a prompt, with {prompt}
    stem: str = ""  # of BBQ: how the answer begins before the option, with the same fields
    min_mass: Annotated[float, Field(ge=0, le=1)] = 0.0  # of BBQ: where the options have less probability together, the answer is null
    permuted: Count | None = None  # of BBQ: so many items are also asked with their options in the two other cyclic orders
    generated: Count | None = None  # of BBQ: so many items are also answered in generated text
    wordings: dict[Text, Wording] = {}  # the same also asked otherwise, by the name of the wording
    child_abuse: Annotated[Literal["off", "refusal probability", "fictional"], BeforeValidator(lambda value: "off" if value is False else value)] = "off"  # prompts about child abuse: see data.CHILD_ABUSE; fictional: made-up words
    truth: Text | None = None  # the miniature's known truth, a file beside the prompts

    @model_validator(mode="after")
    def _wordings_fit(self) -> "Benchmark":
        if self.wordings and self.format in UTILITY_FORMATS:
            raise ValueError(f"wordings are for prompts and BBQ; the format {self.format!r} has one")
        for text in (self.template, *(wording.template for wording in self.wordings.values())):
            if text and self.format in PROMPT_FORMATS and "{prompt}" not in text:
                raise ValueError("a template of prompts needs {prompt}, where the prompt stands")
            if text and self.format in ITEM_FORMATS:
                _check_item_template(text, needed=ITEM_FIELDS)
        if self.format in ITEM_FORMATS:
            _check_item_template(self.stem, needed=())
        idle = [name for name in ("samples", "child_abuse") if name in self.model_fields_set and self.format not in PROMPT_FORMATS]
        idle += [name for name in ("permuted", "generated", "stem", "min_mass") if name in self.model_fields_set and self.format not in ITEM_FORMATS]
        if idle:
            raise ValueError(f"{idle[0]} has no meaning for the format {self.format!r}; remove it")
        if self.child_abuse == "fictional" and not self.source.startswith(("miniature:", "tests:")):
            raise ValueError("child_abuse: fictional is for the miniature's made-up words; of a real set say off, or refusal probability")
        if "default" in self.wordings:
            raise ValueError("the wording 'default' is the benchmark's own; give another name")
        return self


class Training(Part):
    """What every training shares. `batch_size` is the effective one: examples (or packs) an optimiser step."""

    batch_size: Count
    max_length: Count
    loss: Literal["answers", "whole"] = "answers"  # tokens that count: the assistant's, or all of the conversation
    packed: bool = False  # of SFT: examples are put together into rows of max_length, and batch_size counts those; no example sees another
    autocast: bool = False  # LoRA's own products too in bf16 (mixed precision); else in fp32. What IA3 scales is rounded to the base's dtype either way
    tokens_per_batch: Count | None = None  # of a forward pass; found by the device's memory where not given
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    dpo_beta: Annotated[float, Field(gt=0)] = 0.1


class Drift(Part):
    """A small fixed sample that is asked again and again while a variant trains: see drift.DriftCallback."""

    every: Annotated[float, Field(gt=0, le=1)] = 0.25  # share of the training's steps between two looks
    n: Count = 24  # prompts of each benchmark
    max_new_tokens: Count = 32
    stop_unsafe: Annotated[float, Field(gt=0, le=100)] | None = None  # percentage points above the base model at which training ends
    stop_over_refusal: Annotated[float, Field(gt=0, le=100)] | None = None


class Block(Part):
    """A product of factors; the grid is the union of its blocks. objective `untrained` is an adapter as it was initialised."""

    name: Text
    bases: tuple[Text, ...] = ()  # all bases where not given
    methods: Annotated[tuple[Method, ...], Field(min_length=1)]
    objectives: Annotated[tuple[Literal["sft", "dpo", "untrained"], ...], Field(min_length=1)]
    data: tuple[Text, ...] = ()  # names under `data` to train on; where not given, the one of the objective's name
    learning_rates: dict[Method, tuple[Rate, ...]] = {}
    epochs: tuple[Count, ...] = (1,)
    inits: tuple[Literal[INITS], ...] = ()
    seeds: Annotated[tuple[Annotated[int, Strict(), Field(ge=0)], ...], Field(min_length=1)]
    repeated_seeds: bool = False  # True: these repetitions share a seed, so their spread says nothing about seeds

    @model_validator(mode="after")
    def _complete(self) -> "Block":
        if len(set(self.seeds)) < len(self.seeds) and not self.repeated_seeds:
            raise ValueError(
                "seeds repeats a seed, so its repetitions are copies of one run; give distinct seeds, or say repeated_seeds: true"
            )
        trained = [objective for objective in self.objectives if objective != "untrained"]
        missing = [method for method in self.methods if trained and not self.learning_rates.get(method)]
        if missing:
            raise ValueError(f"learning_rates has none for {missing[0]}")
        for method in self.methods if self.inits else ():
            known = PEFT_METHODS[method].inits
            if not known:
                raise ValueError(f"inits apply to {' and '.join(name for name, one in PEFT_METHODS.items() if one.inits)} only")
            if strange := [init for init in self.inits if init not in known]:
                raise ValueError(f"{method}'s prompt comes out of an encoder: its only init is {known[0]}" if len(known) == 1 else f"{method} has no init {strange[0]!r}")
        return self


@dataclass(frozen=True)
class Variant:
    """A base model x method x settings x repetition; method `none` is the base model itself. One row of `variants`."""

    base_model: str
    family: str
    method: Literal[METHODS]
    objective: Literal["none", "sft", "dpo", "untrained"]
    dataset: str | None
    n_train: int | None
    learning_rate: float | None
    epochs: int | None
    seed: int | None
    repetition: int
    init: str | None
    settings: str  # JSON: all that shapes the weights and is not in the columns
    mitigation: str | None = None
    parent_run_id: str | None = None
    template: str = "chat"
    system_prompt: str | None = None

    @cached_property
    def repair(self) -> dict[str, Any] | None:
        """What its mitigation is: name, kind, value, control and the settings of its kind; None where there is none."""
        return json.loads(self.settings).get("mitigation")

    @property
    def is_repaired(self) -> bool:
        """Whether it is made from a trained variant (stage mitigate), and not trained itself."""
        return self.repair is not None and MITIGATION_KINDS[self.repair["kind"]].when != "training"

    @property
    def method_class(self) -> str:
        """adapter, prompt, or base."""
        return METHOD_CLASS[self.method]

    @cached_property
    def run_id(self) -> str:
        """Readable settings and a short hash of all of them and of the repetition."""
        if self.method == "none":
            words = [self.base_model, "none"]
        else:
            named = self.dataset if self.dataset not in (None, self.objective) else ""
            rate = "" if self.learning_rate is None else f"lr{self.learning_rate:.0e}".replace("e-0", "e-")
            epochs = "" if self.epochs is None else f"e{self.epochs}"
            words = [self.base_model, self.method, self.init or "", self.objective, named, rate, epochs, f"s{self.seed}"]
        if self.mitigation:
            words.append(re.sub(r"[^\w-]+", "_", self.mitigation.replace(".", "-")))
        return ".".join(word for word in words if word) + "." + digest(self.fields(), 8)

    def fields(self) -> dict[str, Any]:
        """The variant's own fields, by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def row(self) -> dict[str, Any]:
        """The variant as a row of the table `variants`."""
        return {"run_id": self.run_id, **self.fields(), "method_class": self.method_class}


class Mitigation(Part):
    """A repair of the runs of some blocks of the grid; each of its values, and each control of each value, is a variant of its own.

    A value is: of safe_lora, zero and safe_merge the threshold of the score below which a module is touched, or the number of modules (select: top); of
    rescale the factor of the update; of average the share of the training, from its end, over which updates are averaged; of resta the factor of the
    safety update; of reduce_intruders the share that an intruder dimension loses; of mixing the share of safety data among all examples.
    """

    kind: Literal[tuple(MITIGATION_KINDS)]
    blocks: Annotated[tuple[Text, ...], Field(min_length=1)]  # of the grid, whose runs are repaired
    values: tuple[Annotated[float, BeforeValidator(_number)], ...] = ()
    pair: Text | None = None  # a name under `pairs` of the base models
    operator: Literal["approximate", "exact", "subspace"] = "approximate"
    rank: Count | None = None  # of the subspace
    select: Literal["threshold", "top"] = "threshold"
    controls: tuple[Literal[CONTROLS], ...] = ()
    safety: Text | None = None  # a block of the grid, whose runs were trained on safety data
    weight: Annotated[float, Field(gt=0, le=1)] = 0.5  # of the safety update, where it is merged
    snapshots: Annotated[int, Strict(), Field(ge=2)] = 10  # taken along a training, for averaging
    system_prompt: Text | None = None
    data: Text | None = None  # safety data, by its name under `data`
    betas: tuple[Annotated[float, Field(gt=0)], ...] = (0.5, 2.0, 2.0, 2.0, 2.0, 0.1)  # of the first tokens of an answer; the last one of all further ones

    @model_validator(mode="after")
    def _fits_its_kind(self) -> "Mitigation":
        known = MITIGATION_KINDS[self.kind]
        if missing := [name for name in known.needs if not getattr(self, name)]:
            raise ValueError(f"the kind {self.kind} needs {missing[0]}")
        if idle := [name for name in self.model_fields_set if name not in (*known.takes, "kind", "blocks")]:
            raise ValueError(f"the kind {self.kind} has no {idle[0]}; it takes {', '.join(known.takes) or 'nothing more'}")
        if (self.operator == "subspace") != (self.rank is not None):
            raise ValueError("the operator subspace, and no other, needs rank, the number of V's left singular vectors")
        if "random subspace" in self.controls and self.operator == "exact":
            raise ValueError("the control random subspace has no meaning for the exact operator, which keeps all or nearly all of the space")
        low, high = known.limits
        for value in self.values:
            if self.select == "top" and (value < 1 or value != int(value)):
                raise ValueError(f"value {value:g} with select: top is a number of modules, a whole one from 1")
            if self.select != "top" and not low <= value <= high:
                raise ValueError(f"value {value:g} of the kind {self.kind} is outside {low:g} to {high:g}" + ("; for a number of modules say select: top" if "select" in known.takes and value > high else ""))
            if self.kind in ("mixing", "average") and value in (0, *((1,) if self.kind == "mixing" else ())):
                raise ValueError(f"value {value:g} of the kind {self.kind} leaves nothing; give a share above 0" + (" and below 1" if self.kind == "mixing" else ""))
            if self.kind == "average" and value * self.snapshots <= 1:
                raise ValueError(f"value {value:g} of {self.snapshots} snapshots is the last one alone, the run itself; give a larger share, or more snapshots")
        if len(set(self.values)) < len(self.values):
            raise ValueError("values repeats a value")
        return self

    @property
    def own(self) -> dict[str, Any]:
        """The settings that its kind takes."""
        return {name: getattr(self, name) for name in MITIGATION_KINDS[self.kind].takes if name not in ("values", "controls")}


class Family(Part):
    """A family of primary tests, declared before any answer is scored; within it p values are adjusted by Holm's method.

    test `change`: each method against its base model; `difference`: each pair of methods; `preserves`: each method is not worse than its base
    model by more than `margin` percentage points, on all the outcomes jointly.
    """

    test: Literal["change", "difference", "preserves"]
    outcomes: Annotated[tuple[Literal[OUTCOMES], ...], Field(min_length=1)]
    methods: tuple[Method, ...] = ()  # all methods of the grid where not given
    bases: Literal["all together", "each"] = "all together"
    group: Literal["as configured", "trained"] = "as configured"  # trained: without the no-ops
    margin: Annotated[float, Field(gt=0, lt=100)] | None = None

    @model_validator(mode="after")
    def _margin_where_needed(self) -> "Family":
        if (self.test == "preserves") != (self.margin is not None):
            raise ValueError("a family of the test 'preserves' needs a margin, in percentage points" if self.margin is None else f"the test {self.test!r} has no margin; remove it")
        if self.test == "preserves" and (wrong := [name for name in self.outcomes if name not in HARMS]):
            raise ValueError(f"{wrong[0]!r} is not counted in percentage points of harm, so it has no margin; expected some of {', '.join(HARMS)}")
        return self


class Study(Part):
    """A study file, checked."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    note: Text  # what the numbers mean, printed on every figure
    seed: Annotated[int, Strict(), Field(ge=0)] = 0
    bases: Annotated[dict[Text, Base], Field(min_length=1)]
    judges: Annotated[dict[Text, Judge], Field(min_length=1)]
    raters: dict[Text, Rater] = {}
    methods: dict[Method, dict[str, Any]]
    init_texts: Source | None = None
    data: dict[Text, TrainingData]
    training: Training
    grid: tuple[Block, ...]
    base_repetitions: Count = 1  # times that every base model itself is run: with drawn answers, each has random numbers of its own
    benchmarks: dict[Text, Benchmark]
    primary: dict[Text, Family] = {}  # families of tests, by name: registered with their hash before any answer is scored
    drift: Drift | None = None
    mitigations: dict[Text, Mitigation] = {}
    analyses: tuple[Literal[(*ANALYSES, *OF_REPAIRS)], ...] = ()  # only these; all where not given
    licences: dict[Text, Text] = {}  # of sources that the register does not know, as the user states them: see licences.py

    @model_validator(mode="after")
    def _consistent(self) -> "Study":
        if self.name in RESERVED:
            raise ValueError(f"name={self.name!r} is taken by a folder of outputs/; choose another")
        for name in self.bases:
            if "." in name or "/" in name:
                raise ValueError(f"base {name!r}: a name may hold neither '.' nor '/', since it is part of run_ids and paths")
        if len(self.models) < len(self.bases) + len(self.judges) + len(self.raters):
            raise ValueError("a base model, a judge and a rater share a name; give each its own")
        for block in self.grid:
            self._check_block(block)
        if twice := [name for name, n in Counter(block.name for block in self.grid).items() if n > 1]:
            raise ValueError(f"the grid has two blocks of the name {twice[0]!r}; give each a name of its own")
        if len({one.snapshots for one in self.mitigations.values() if one.kind == "average"}) > 1:
            raise ValueError("two mitigations average over different numbers of snapshots; a training takes one number of them, so give both the same")
        used = {method for block in self.grid for method in block.methods}
        if self.primary and not used:
            raise ValueError("primary declares tests of what training does, and the grid trains nothing; remove it")
        for name, mitigation in self.mitigations.items():
            self._check_mitigation(name, mitigation)
        if "safe_lora" in self.analyses and not self.mitigations:
            raise ValueError("analyses names safe_lora, and the study has no mitigations; give some, or remove it")
        if self.base_repetitions > 1 and not any(one.samples for one in self.benchmarks.values()):
            raise ValueError("base_repetitions repeats base models for their drawn answers, and no benchmark has samples; add samples, or remove it")
        for name, family in self.primary.items():
            if strange := [method for method in family.methods if method not in used]:
                raise ValueError(f"primary family {name!r} tests {strange[0]}, which no block of the grid runs")
            if family.test == "difference" and len(set(family.methods or used)) < 2:
                raise ValueError(f"primary family {name!r} compares methods with each other and has only one; name two, or test its change")
        for method, settings in self.methods.items():
            known = PEFT_METHODS[method]
            if "init" in settings and settings["init"] not in known.inits:
                raise ValueError(f"methods.{method}.init = {settings['init']!r}; expected {' or '.join(known.inits) or 'none: it has no prompt'}")
            if missing := [name for name in known.needs if name not in settings]:
                raise ValueError(f"methods.{method} has no {missing[0]}; PEFT's default differs by family, so name them")
            if fixed := [name for name in known.fixed if name in settings]:
                raise ValueError(f"methods.{method}.{fixed[0]} is what makes it {known.label}; remove it")
        chosen = {init for block in self.grid for init in block.inits} | {settings.get("init") for settings in self.methods.values()}
        if {"task_text", "safety_text"} & chosen and self.init_texts is None:
            raise ValueError("an init from text needs init_texts, a JSON file with the keys task and safety")
        if missing := [name for name in CORE if name not in self.benchmarks]:
            raise ValueError(f"benchmarks has no {missing[0]}; a study asks all of {', '.join(CORE)}, and others beside them")
        for name, formats in ASKED_BY.items():
            if self.benchmarks[name].format not in formats:
                raise ValueError(f"benchmarks.{name}.format = {self.benchmarks[name].format!r}; expected one of {', '.join(formats)}")
        if extra := [name for name, one in self.benchmarks.items() if one.format in ITEM_FORMATS and name != "bbq"]:
            raise ValueError(f"benchmarks.{extra[0]} is a second BBQ; a study asks one, under the name bbq")
        if "heldout" not in self.data:
            raise ValueError("data has no heldout: the dose is measured on held-out answers")
        for number, (name, judge) in enumerate(self.judges.items()):
            if strange := [one for one in judge.benchmarks if one not in self.asked(PROMPT_FORMATS)]:
                raise ValueError(f"judges.{name}.benchmarks names {strange[0]!r}; prompts are asked of {', '.join(self.asked(PROMPT_FORMATS))}")
            if number == 0 and judge.benchmarks:
                raise ValueError(f"judges.{name} is the first judge, by whom the study is scored, and so judges all benchmarks; remove its benchmarks")
            if (judge.format == "classifier") != (judge.label is not None):
                raise ValueError(f"judges.{name}: a classifier, and nothing else, needs label, the name of its label that counts as unsafe")
        return self

    def _check_block(self, block: Block) -> None:
        """Raise a ValueError where a block names what the study does not have, or what does not go together."""
        for name in block.bases:
            if name not in self.bases:
                raise ValueError(f"grid block {block.name!r} names the base {name!r}; the study has {', '.join(self.bases)}")
        for method in block.methods:
            if method not in self.methods:
                raise ValueError(f"grid block {block.name!r} uses {method}, which has no settings under methods")
            half = [name for name in block.bases or self.bases if self.bases[name].dtype != "float32"]
            if method == "ln_tuning" and half:
                raise ValueError(f"grid block {block.name!r} trains the norms of {half[0]} itself, in {self.bases[half[0]].dtype}, where small steps round to nothing; give it dtype: float32")
            wanted = PEFT_METHODS[method].quantized
            for name in block.bases or self.bases:
                if (self.bases[name].quantization is not None) != wanted and (wanted or method in ("lora", "dora", "rslora")):
                    raise ValueError(
                        f"grid block {block.name!r} trains {method} on {name}, which is {'not ' if wanted else ''}quantized; "
                        + ("give that base model quantization: nf4, or name others under bases" if wanted else "there the method is called qlora")
                    )
        for objective in set(block.objectives) - {"untrained"}:
            for name in block.data or (objective,):
                if name not in self.data or name == "heldout":
                    raise ValueError(f"grid block {block.name!r} trains by {objective}, but data has no {name}" if name != "heldout" else f"grid block {block.name!r} trains on the held-out answers")
                if objective == "dpo" and not self.data[name].is_preference:
                    raise ValueError(f"grid block {block.name!r} trains by dpo on data.{name}, which has no chosen and rejected answers")

    def _check_mitigation(self, name: str, mitigation: Mitigation) -> None:
        """Raise a ValueError where a mitigation names what the study does not have, or cannot be done to what its blocks train."""
        blocks, known = {block.name: block for block in self.grid}, MITIGATION_KINDS[mitigation.kind]
        for wanted in (*mitigation.blocks, *([mitigation.safety] if mitigation.safety else [])):
            if wanted not in blocks:
                raise ValueError(f"mitigation {name!r} names the grid block {wanted!r}; the grid has {', '.join(blocks)}")
        if "," in name or name in NAMED:
            raise ValueError(f"mitigation {name!r}: a name may hold no comma, behind which its controls are named, and not be {' or '.join(NAMED)}; give another name")
        for block in (blocks[one] for one in mitigation.blocks):
            if "untrained" in block.objectives or (mitigation.kind == "constrained_sft" and "dpo" in block.objectives):
                raise ValueError(f"mitigation {name!r} ({known.label}) cannot be done to the block {block.name!r}, which has runs by {'dpo' if 'untrained' not in block.objectives else 'untrained'}; name others")
            if wrong := [method for method in block.methods if method not in known.methods]:
                prompt = METHOD_CLASS[wrong[0]] == "prompt"
                raise ValueError(
                    f"mitigation {name!r}: {known.label} cannot be done to {wrong[0]} (block {block.name!r})"
                    + (", which has no weight update; to it apply: " + ", ".join(kind for kind, one in MITIGATION_KINDS.items() if wrong[0] in one.methods) if prompt else f"; it applies to {', '.join(known.methods)}")
                )
            if known.when == "after":
                self._check_repairable(name, mitigation, block)
            if mitigation.data and (self.data.get(mitigation.data) is None or mitigation.data == "heldout"):
                raise ValueError(f"mitigation {name!r} mixes in data.{mitigation.data}, " + ("the held-out answers" if mitigation.data == "heldout" else "which the study does not have"))
            if mitigation.data and "dpo" in block.objectives and not self.data[mitigation.data].is_preference:
                raise ValueError(f"mitigation {name!r} mixes data.{mitigation.data} into a training by dpo, and it has no chosen and rejected answers")
            for base in block.bases or self.bases:
                if mitigation.pair and mitigation.pair not in self.bases[base].pairs:
                    raise ValueError(f"mitigation {name!r} needs the pair {mitigation.pair!r}, and bases.{base} has no such twin; give it under pairs: {{{mitigation.pair}: {{unaligned: {{source: ...}}}}}}")

    def _check_repairable(self, name: str, mitigation: Mitigation, block: Block) -> None:
        """Raise a ValueError where a repair would leave a part of an adapter as it was trained, or cannot be done to what the settings of a method make."""
        if mitigation.safety == block.name:
            raise ValueError(f"mitigation {name!r} adds the block {block.name!r} to itself; give a block that was trained on safety data under safety")
        label, alone = MITIGATION_KINDS[mitigation.kind].label, mitigation.kind in ("safe_lora", "zero") and not set(mitigation.controls) - {"random subspace"}
        for method in block.methods:
            settings = self.methods[method]
            for key in BESIDE_FACTORS:
                value = settings.get(key)
                if value not in (None, False, "none", [], ()) and not (alone and (key == "lora_bias" or (key == "bias" and value == "lora_only"))):
                    raise ValueError(f"mitigation {name!r}: {method} trains {key}, of which {label} or a control would leave a part as it was trained; take {key} from methods.{method}")
            if str(settings.get("init_lora_weights", "")).lower().startswith(REWRITING):
                raise ValueError(f"mitigation {name!r}: {method} begins as {settings['init_lora_weights']}, which changes the base model itself, so that BA is not its update; take init_lora_weights from methods.{method}")
            if settings.get("use_dora") and mitigation.kind in LINEAR:
                raise ValueError(f"mitigation {name!r}: {label} cannot be done to {method} with use_dora, whose update is no product of two factors; call the method dora and name other blocks")
        for base in block.bases or self.bases:
            pair = self.bases[base].pairs.get(mitigation.pair)
            aligned = pair and (pair.aligned or self.bases[base])
            if pair and (aligned.source, aligned.revision, aligned.path) == (pair.unaligned.source, pair.unaligned.revision, pair.unaligned.path):
                raise ValueError(f"bases.{base}.pairs.{mitigation.pair} has the same checkpoint as aligned and unaligned, so that V is zero and no direction of alignment; give two that differ")

    @property
    def n_snapshots(self) -> int:
        """How many snapshots are taken along a training: as many as weight averaging needs."""
        return max((one.snapshots for one in self.mitigations.values() if one.kind == "average"), default=0)

    def asked(self, formats: tuple[str, ...]) -> tuple[str, ...]:
        """The names of the benchmarks of these formats."""
        return tuple(name for name, one in self.benchmarks.items() if one.format in formats)

    @property
    def refusal_only(self) -> tuple[str, ...]:
        """The benchmarks whose prompts about child abuse are asked for the probability of a refusal."""
        return tuple(name for name, one in self.benchmarks.items() if one.child_abuse == "refusal probability")

    @property
    def models(self) -> dict[str, Base | Judge | Rater]:
        """Every model that the study needs: its base models, judges and raters."""
        return {**self.bases, **self.judges, **self.raters}

    @property
    def folder(self) -> Path:
        """outputs/<study>/"""
        return OUTPUTS / self.name

    @property
    def miniature(self) -> bool:
        """Whether the models are the miniature's, or random: then no number is a finding about real models."""
        return any(base.source.startswith(("miniature:", "random:")) for base in self.bases.values())

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        """The base models themselves, then every cell of the grid once."""
        found = {}
        for name in self.bases:
            for repetition in range(1, self.base_repetitions + 1):
                base = self._variant(name, repetition=repetition)
                found[base.run_id] = base
            trained = {block.name: self._expand(name, block) if name in (block.bases or self.bases) else [] for block in self.grid}
            found.update({variant.run_id: variant for variants in trained.values() for variant in variants})
            for label, mitigation in self.mitigations.items():
                parents = {variant.run_id: variant for block in mitigation.blocks for variant in trained[block]}
                if mitigation.kind == "template" and parents:  # what the system prompt does to the base model itself
                    parents = {one.run_id: one for one in [self._variant(name)]} | parents
                safety = trained[mitigation.safety] if mitigation.safety else []
                found.update({variant.run_id: variant for parent in parents.values() for variant in self._repairs(label, mitigation, parent, safety)})
        return tuple(found.values())

    def _repairs(self, name: str, mitigation: Mitigation, parent: Variant, safety: list[Variant]) -> Iterator[Variant]:
        """The variants that a mitigation makes of a run: one of each value, and of each of its controls."""
        own = {"name": name, "kind": mitigation.kind, **mitigation.own}
        if mitigation.pair:
            own["checkpoints"] = self.bases[parent.base_model].pairs[mitigation.pair].model_dump(mode="json", exclude={"aligned": {"path"}, "unaligned": {"path"}})
        if mitigation.safety:
            own["safety_run_id"] = self._safety_run(name, mitigation, parent, safety).run_id
        if mitigation.data:
            own["examples"] = self.data[mitigation.data].model_dump(mode="json", exclude={"path"})
        for value, control in itertools.product(mitigation.values or (None,), (None, *mitigation.controls)):
            label = name + ("" if value is None else f" {value:g}") + ("" if control is None else f", {control}")
            settings = json.loads(parent.settings) | {"mitigation": {**own, "value": value, "control": control}}
            yield dataclasses.replace(
                parent, mitigation=label, parent_run_id=parent.run_id, settings=json.dumps(settings, sort_keys=True),
                system_prompt=mitigation.system_prompt or parent.system_prompt,
            )  # fmt: skip

    def _safety_run(self, name: str, mitigation: Mitigation, parent: Variant, safety: list[Variant]) -> Variant:
        """The run of the safety block that goes with a parent: the same method and seed, else the same repetition."""
        alike = [one for one in safety if one.method == parent.method]
        for same in ("seed", "repetition"):
            if found := [one for one in alike if getattr(one, same) == getattr(parent, same)]:
                return found[0]
        raise ValueError(f"mitigation {name!r}: the block {mitigation.safety!r} has no run of {parent.method} on {parent.base_model} with the seed {parent.seed}; give it the same methods and seeds")

    def of_base(self, base_model: str) -> tuple[Variant, ...]:
        """The variants of one base model.

        Raises:
            ValueError: the study has no such base model.
        """
        if base_model not in self.bases:
            raise ValueError(f"base_model={base_model!r}; the study {self.name} has {', '.join(self.bases)}")
        return tuple(variant for variant in self.variants if variant.base_model == base_model)

    def of_stage(self, stage: str, base_model: str) -> tuple[Variant, ...]:
        """The variants of one base model that a stage works on: repaired ones are not trained, and only they are made by `mitigate`."""
        variants = self.of_base(base_model)
        return tuple(one for one in variants if stage not in ("train", "mitigate") or one.is_repaired == (stage == "mitigate"))

    def _expand(self, base_model: str, block: Block) -> list[Variant]:
        variants = []
        for method, objective, epochs, (repetition, seed) in itertools.product(block.methods, block.objectives, block.epochs, enumerate(block.seeds, 1)):
            if objective == "untrained":
                ways = [(None, None, None)]
            else:
                ways = [(name, rate, epochs) for name in block.data or (objective,) for rate in block.learning_rates.get(method, ())]
            for data, rate, n_epochs in ways:
                for init in self._inits(block, method):
                    variants.append(self._variant(base_model, method, objective, data, rate, n_epochs, seed, repetition, init))
        return variants

    def _inits(self, block: Block, method: str) -> tuple[str | None, ...]:
        if not PEFT_METHODS[method].inits:
            return (None,)
        return block.inits or (self.methods[method].get("init", "random"),)

    def _variant(self, base_model, method="none", objective="none", data=None, rate=None, epochs=None, seed=None, repetition=1, init=None) -> Variant:
        base, examples = self.bases[base_model], self.data.get(data)
        settings = {"base": base.model_dump(exclude={"path", "answer_mode", "system_prompt", "pairs"}, mode="json")}
        if method != "none":
            settings["peft"] = {key: value for key, value in self.methods[method].items() if key != "init"}
        if init in ("task_text", "safety_text"):
            settings["init_texts"] = self.init_texts.model_dump(exclude={"path"}, mode="json")
        if examples:
            settings["training"] = self.training.model_dump(exclude={"tokens_per_batch"}, mode="json")
            settings["data"] = {"name": data, **examples.model_dump(exclude={"path"} | (set() if examples.template else {"template"}), mode="json")}
        if examples and self.drift and (self.drift.stop_unsafe or self.drift.stop_over_refusal):
            settings["drift"] = self.drift.model_dump(mode="json")  # it may end the training
        return Variant(
            base_model=base_model,
            family=base.family,
            method=method,
            objective=objective,
            dataset=data,
            n_train=examples.n if examples else None,
            learning_rate=rate,
            epochs=epochs,
            seed=seed,
            repetition=repetition,
            init=init,
            settings=json.dumps(settings, sort_keys=True),
            system_prompt=base.system_prompt,
        )


def load(study: str | Path) -> Study:
    """The study of a file, or of the name of one in studies/, checked.

    Raises:
        ValueError: with one sentence that says what is wrong, where, and what to do.
    """
    path = find(study)
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no keys; see studies/miniature.yaml for what a study file says")
    try:
        study = Study(**content)
    except ValidationError as error:
        raise ValueError(f"{path.name}: {_sentence(error)}") from None
    try:
        study.variants  # noqa: B018 - made here, so that what cannot be made is said at once
        return study
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def find(study: str | Path) -> Path:
    """The path of a study file, given as a path or as the name of a file in studies/."""
    for path in (Path(study), ROOT / study, ROOT / "studies" / f"{study}.yaml"):
        if path.is_file():
            return path.resolve()
    known = ", ".join(sorted(path.stem for path in (ROOT / "studies").glob("*.yaml")))
    raise ValueError(f"there is no study file {study}; studies/ has {known}")


def _sentence(error: ValidationError) -> str:
    """The first thing that is wrong, in words: unknown keys first, since they explain what is then missing."""
    problem = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    where = ".".join(str(part) for part in problem["loc"])
    value = problem["input"]
    match problem["type"]:
        case "extra_forbidden":
            key, known = problem["loc"][-1], _known_keys(problem["loc"][:-1])
            near = difflib.get_close_matches(str(key), known, 1)
            return f"unknown key {where!r}; " + (f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}")
        case "missing":
            return f"{where!r} is missing"
        case "literal_error":
            return f"{where} = {value!r}; expected {problem['ctx']['expected']}"
        case "value_error":
            return f"{where}: {problem['ctx']['error']}" if where else str(problem["ctx"]["error"])
        case "tuple_type":
            return f"{where} = {value!r} is one value; write a list, [{value}]"
        case _:
            return f"{where} = {value!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _known_keys(location: tuple) -> list[str]:
    """The keys that the section at `location` may have."""
    sections = {"bases": Base, "judges": Judge, "raters": Rater, "data": TrainingData, "benchmarks": Benchmark, "training": Training, "grid": Block, "primary": Family, "drift": Drift, "mitigations": Mitigation}
    part = Pair if "pairs" in location else sections.get(location[0], Source) if location else Study
    return list(part.model_fields)


def finite(value: float | None) -> float | None:
    """The number, or None where it is none or not finite."""
    return None if value is None or not math.isfinite(value) else float(value)
