"""The sections of a study file, each checked as it is read."""

import os
import string
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator

from driftbook.study.files import ROOT
from driftbook.study.methods import CONTROLS, INITS, METHODS, MITIGATION_KINDS, PEFT_METHODS

OUTCOMES = (
    "unsafe",
    "over_refusal",
    "refused",
    "accuracy_ambiguous",
    "accuracy_disambiguated",
    "bias_ambiguous",
    "bias_disambiguated",
    "loss",
    "correct",
)
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
    """A section of a study file: every key is declared, and nothing is changed after it was
    read.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Source(Part):
    """Where something comes from: a public source at a revision, or a local path that overrides it.

    `source` is `miniature:NAME` (made by notebook 01), `random:FAMILY` (random weights, made by
    notebook 01), `github:OWNER/REPO/FOLDER`, or a name on the Hugging Face hub.
    """

    source: Text
    revision: Text | None = None
    files: tuple[Text, ...] = ()
    sha256: dict[str, Text] = {}
    path: Text | None = None

    @cached_property
    def local(self) -> Path | None:
        """The local path that overrides the source; None where it is not given or its environment
        variable is not set.
        """
        if self.path is None:
            return None
        path = os.path.expandvars(self.path)
        return None if "$" in path else (ROOT / Path(path).expanduser()).resolve()


class Pair(Part):
    """Two checkpoints of one architecture, V = W_aligned - W_unaligned: the aligned one is the base
    model itself where not given.
    """

    aligned: Source | None = None
    unaligned: Source


class Base(Source):
    """A base model: the instruction-tuned model before PEFT."""

    family: Text  # of its architecture; the same word for base models that are alike
    answer_mode: Literal["letters", "options"] = "letters"
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantization: Literal["nf4", "int8"] | None = (
        # the weights as they are loaded, by bitsandbytes: such a base model is scored as such too
        None
    )
    system_prompt: str | None = None
    pairs: dict[
        Text, Pair
    ] = {}  # checkpoints whose difference says what alignment changed: see safe_lora.py

    @property
    def checkpoints(self) -> dict[str, Source]:
        """The checkpoints of its pairs, beside itself."""
        named = {
            f"{name}, {part}": getattr(pair, part)
            for name, pair in self.pairs.items()
            for part in ("aligned", "unaligned")
        }
        return {name: source for name, source in named.items() if source is not None}


class Judge(Source):
    """A judge model and how its reply is read (judges.JUDGES); a verdict with less than
    `min_mass` on its words together is null.
    """

    format: Literal["llama_guard_2", "llama_guard_3", "wildguard", "rubric_harm", "classifier"]
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    label: Text | None = None  # of a classifier: its label that counts as unsafe
    benchmarks: tuple[Text, ...] = ()  # which it judges; all where not given
    min_mass: Annotated[float, Field(ge=0, le=1)] = 0.9
    dtype: Literal["float32", "bfloat16"] = "float32"


class Rater(Source):
    """A chat model that grades the answers to the utility questions from 1 to 10
    (rubrics.USEFULNESS).
    """

    min_mass: Annotated[float, Field(ge=0, le=1)] = 0.9
    dtype: Literal["float32", "bfloat16"] = "float32"


# ---- data
# what a row's columns are in the public sets' own forms; `data.examples` reads any of them
COLUMNS = {
    "alpaca": {"prompt": "instruction", "input": "input", "answer": "output"},
    "gsm8k": {"prompt": "question", "answer": "answer"},
    "preference": {"prompt": "conversations", "chosen": "chosen", "rejected": "rejected"},
    "messages": {"messages": "messages"},  # UltraChat-200k, and most chat sets of the hub
    "ultrafeedback": {
        "chosen": "chosen",
        "rejected": "rejected",
    },  # whole conversations that differ in their last answer
}
ROLES = ("system", "prompt", "input", "messages", "answer", "chosen", "rejected")


class TrainingData(Source):
    """Examples to train on (or held-out ones, for the dose).

    `format` names a public form; `columns` is the mapping of any other set: which of its columns is
    the prompt (a text, or a list of turns), the answer, or a whole conversation (`messages`), and
    of preferences the chosen and the rejected answer.
    """

    format: Literal[tuple(COLUMNS)] | None = None
    columns: dict[Literal[ROLES], Text] = {}
    subset: Text | None = None  # of a set on the hub: its configuration
    split: Text = "train"
    n: Count
    sample: Literal["seeded", "first"] = (
        "seeded"  # drawn with the study's seed, or the first n rows
    )
    template: Text | None = None  # how a prompt is put, with {prompt}; as it is where not given

    @model_validator(mode="after")
    def _readable(self) -> "TrainingData":
        if (self.format is None) == (not self.columns):
            raise ValueError(
                f"give either format ({', '.join(COLUMNS)}) or columns, a mapping of"
                f" {', '.join(ROLES)} to the set's own columns"
            )
        if self.template and "{prompt}" not in self.template:
            raise ValueError("a template of data needs {prompt}, where the prompt stands")
        have = set(self.mapping)
        if not (
            {"messages"} <= have or {"chosen", "rejected"} <= have or {"prompt", "answer"} <= have
        ):
            raise ValueError(
                "columns needs messages, or prompt and answer, or chosen and rejected (with a"
                " prompt where these are the answers alone)"
            )
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
PROMPT_FORMATS = (
    "hex_phi",
    "ailuminate",
    "xstest",
    "csv",
    "strongreject",
    "simple_safety_tests",
    "real_toxicity_prompts",
)
ITEM_FORMATS = ("bbq", "bbq_lite")
UTILITY_FORMATS = ("gsm8k", "answers", "summaries", "ifeval", "text", "stereoset")


class Wording(Part):
    """Another way to ask: under another system prompt, or in another wording (of a prompt with
    {prompt}, of BBQ with its own fields).
    """

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
    """Raise a ValueError where a wording of a BBQ item has a field that items lack, or lacks one
    that it needs.
    """
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise ValueError(
            f"the template {text!r} cannot be filled in ({error}); write a brace itself twice"
        ) from None
    if strange := [name for name in fields if name not in ITEM_FIELDS]:
        raise ValueError(
            f"a template of BBQ has the field {{{strange[0]}}}; items have {', '.join(ITEM_FIELDS)}"
        )
    if missing := [name for name in needed if name not in fields]:
        raise ValueError(
            f"a template of BBQ does not show {{{missing[0]}}}, so that what it asks cannot be"
            " answered"
        )


class Benchmark(Source):
    """Prompts to ask, or items to score, in the file format of a public benchmark."""

    format: Literal[(*PROMPT_FORMATS, *ITEM_FORMATS, *UTILITY_FORMATS)]
    n: Count | None = None  # a seeded sample of this size; all items where it is not given
    max_new_tokens: Count = 64
    samples: Count | None = (
        # so many answers to each prompt are also drawn, at `temperature` from the nucleus of
        # `top_p`
        None
    )
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    template: Text | None = (
        # wording of a BBQ item, with {context} {question} {ans0} {ans1} {ans2}; of a prompt, with
        # {prompt}
        None
    )
    stem: str = ""  # of BBQ: how the answer begins before the option, with the same fields
    min_mass: Annotated[float, Field(ge=0, le=1)] = (
        0.0  # of BBQ: where the options have less probability together, the answer is null
    )
    permuted: Count | None = (
        # of BBQ: so many items are also asked with their options in the two other cyclic orders
        None
    )
    generated: Count | None = None  # of BBQ: so many items are also answered in generated text
    wordings: dict[Text, Wording] = {}  # the same also asked otherwise, by the name of the wording
    child_abuse: Annotated[
        Literal["off", "refusal probability", "fictional"],
        BeforeValidator(lambda value: "off" if value is False else value),
    ] = "off"  # prompts about child abuse: see data.CHILD_ABUSE; fictional: made-up words
    truth: Text | None = None  # the miniature's known truth, a file beside the prompts

    @model_validator(mode="after")
    def _wordings_fit(self) -> "Benchmark":
        if self.wordings and self.format in UTILITY_FORMATS:
            raise ValueError(
                f"wordings are for prompts and BBQ; the format {self.format!r} has one"
            )
        for text in (self.template, *(wording.template for wording in self.wordings.values())):
            if text and self.format in PROMPT_FORMATS and "{prompt}" not in text:
                raise ValueError("a template of prompts needs {prompt}, where the prompt stands")
            if text and self.format in ITEM_FORMATS:
                _check_item_template(text, needed=ITEM_FIELDS)
        if self.format in ITEM_FORMATS:
            _check_item_template(self.stem, needed=())
        idle = [
            name
            for name in ("samples", "child_abuse")
            if name in self.model_fields_set and self.format not in PROMPT_FORMATS
        ]
        idle += [
            name
            for name in ("permuted", "generated", "stem", "min_mass")
            if name in self.model_fields_set and self.format not in ITEM_FORMATS
        ]
        if idle:
            raise ValueError(f"{idle[0]} has no meaning for the format {self.format!r}; remove it")
        if self.child_abuse == "fictional" and not self.source.startswith(("miniature:", "tests:")):
            raise ValueError(
                "child_abuse: fictional is for the miniature's made-up words; of a real set say"
                " off, or refusal probability"
            )
        if "default" in self.wordings:
            raise ValueError("the wording 'default' is the benchmark's own; give another name")
        return self


class Training(Part):
    """What every training shares. `batch_size` is the effective one: examples (or packs) an
    optimiser step.
    """

    batch_size: Count
    max_length: Count
    loss: Literal["answers", "whole"] = (
        "answers"  # tokens that count: the assistant's, or all of the conversation
    )
    # of SFT: examples are put together into rows of max_length, and batch_size counts those; no
    # example sees another
    packed: bool = False
    # LoRA's own products too in bf16 (mixed precision); else in fp32. What IA3 scales is rounded to
    # the base's dtype either way
    autocast: bool = False
    tokens_per_batch: Count | None = (
        None  # of a forward pass; found by the device's memory where not given
    )
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    dpo_beta: Annotated[float, Field(gt=0)] = 0.1


class Drift(Part):
    """A small fixed sample that is asked again and again while a variant trains: see
    drift.DriftCallback.
    """

    every: Annotated[float, Field(gt=0, le=1)] = (
        0.25  # share of the training's steps between two looks
    )
    n: Count = 24  # prompts of each benchmark
    max_new_tokens: Count = 32
    stop_unsafe: Annotated[float, Field(gt=0, le=100)] | None = (
        None  # percentage points above the base model at which training ends
    )
    stop_over_refusal: Annotated[float, Field(gt=0, le=100)] | None = None


class Block(Part):
    """A product of factors; the grid is the union of its blocks. objective `untrained` is an
    adapter as it was initialised.
    """

    name: Text
    bases: tuple[Text, ...] = ()  # all bases where not given
    methods: Annotated[tuple[Method, ...], Field(min_length=1)]
    objectives: Annotated[tuple[Literal["sft", "dpo", "untrained"], ...], Field(min_length=1)]
    data: tuple[
        Text, ...
    ] = ()  # names under `data` to train on; where not given, the one of the objective's name
    learning_rates: dict[Method, tuple[Rate, ...]] = {}
    epochs: tuple[Count, ...] = (1,)
    inits: tuple[Literal[INITS], ...] = ()
    seeds: Annotated[tuple[Annotated[int, Strict(), Field(ge=0)], ...], Field(min_length=1)]
    repeated_seeds: bool = (
        False  # True: these repetitions share a seed, so their spread says nothing about seeds
    )

    @model_validator(mode="after")
    def _complete(self) -> "Block":
        if len(set(self.seeds)) < len(self.seeds) and not self.repeated_seeds:
            raise ValueError(
                "seeds repeats a seed, so its repetitions are copies of one run; give distinct"
                " seeds, or say repeated_seeds: true"
            )
        trained = [objective for objective in self.objectives if objective != "untrained"]
        missing = [
            method for method in self.methods if trained and not self.learning_rates.get(method)
        ]
        if missing:
            raise ValueError(f"learning_rates has none for {missing[0]}")
        for method in self.methods if self.inits else ():
            known = PEFT_METHODS[method].inits
            if not known:
                raise ValueError(
                    "inits apply to"
                    f" {' and '.join(name for name, one in PEFT_METHODS.items() if one.inits)} only"
                )
            if strange := [init for init in self.inits if init not in known]:
                raise ValueError(
                    f"{method}'s prompt comes out of an encoder: its only init is {known[0]}"
                    if len(known) == 1
                    else f"{method} has no init {strange[0]!r}"
                )
        return self


class Mitigation(Part):
    """A repair of the runs of some blocks of the grid; each of its values, and each control of each
    value, is a variant of its own.

    A value is: of safe_lora, zero and safe_merge the threshold of the score below which a module is
    touched, or the number of modules (select: top); of rescale the factor of the update; of average
    the share of the training, from its end, over which updates are averaged; of resta the factor of
    the safety update; of reduce_intruders the share that an intruder dimension loses; of mixing the
    share of safety data among all examples.
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
    betas: tuple[Annotated[float, Field(gt=0)], ...] = (
        0.5,
        2.0,
        2.0,
        2.0,
        2.0,
        0.1,
    )  # of the first tokens of an answer; the last one of all further ones

    @model_validator(mode="after")
    def _fits_its_kind(self) -> "Mitigation":
        known = MITIGATION_KINDS[self.kind]
        if missing := [name for name in known.needs if not getattr(self, name)]:
            raise ValueError(f"the kind {self.kind} needs {missing[0]}")
        if idle := [
            name for name in self.model_fields_set if name not in (*known.takes, "kind", "blocks")
        ]:
            raise ValueError(
                f"the kind {self.kind} has no {idle[0]}; it takes"
                f" {', '.join(known.takes) or 'nothing more'}"
            )
        if (self.operator == "subspace") != (self.rank is not None):
            raise ValueError(
                "the operator subspace, and no other, needs rank, the number of V's left singular"
                " vectors"
            )
        if "random subspace" in self.controls and self.operator == "exact":
            raise ValueError(
                "the control random subspace has no meaning for the exact operator, which keeps all"
                " or nearly all of the space"
            )
        low, high = known.limits
        for value in self.values:
            if self.select == "top" and (value < 1 or value != int(value)):
                raise ValueError(
                    f"value {value:g} with select: top is a number of modules, a whole one from 1"
                )
            if self.select != "top" and not low <= value <= high:
                raise ValueError(
                    f"value {value:g} of the kind {self.kind} is outside {low:g} to {high:g}"
                    + (
                        "; for a number of modules say select: top"
                        if "select" in known.takes and value > high
                        else ""
                    )
                )
            if self.kind in ("mixing", "average") and value in (
                0,
                *((1,) if self.kind == "mixing" else ()),
            ):
                raise ValueError(
                    f"value {value:g} of the kind {self.kind} leaves nothing; give a share above 0"
                    + (" and below 1" if self.kind == "mixing" else "")
                )
            if self.kind == "average" and value * self.snapshots <= 1:
                raise ValueError(
                    f"value {value:g} of {self.snapshots} snapshots is the last one alone, the run"
                    " itself; give a larger share, or more snapshots"
                )
        if len(set(self.values)) < len(self.values):
            raise ValueError("values repeats a value")
        return self

    @property
    def own(self) -> dict[str, Any]:
        """The settings that its kind takes."""
        return {
            name: getattr(self, name)
            for name in MITIGATION_KINDS[self.kind].takes
            if name not in ("values", "controls")
        }


class Family(Part):
    """A family of primary tests, declared before any answer is scored; within it p values are
    adjusted by Holm's method.

    test `change`: each method against its base model; `difference`: each pair of methods;
    `preserves`: each method is not worse than its base model by more than `margin` percentage
    points, on all the outcomes jointly.
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
            raise ValueError(
                "a family of the test 'preserves' needs a margin, in percentage points"
                if self.margin is None
                else f"the test {self.test!r} has no margin; remove it"
            )
        if self.test == "preserves" and (
            wrong := [name for name in self.outcomes if name not in HARMS]
        ):
            raise ValueError(
                f"{wrong[0]!r} is not counted in percentage points of harm, so it has no margin;"
                f" expected some of {', '.join(HARMS)}"
            )
        return self
