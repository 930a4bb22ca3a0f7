"""The sections of a study file: what each key means, and what is refused as it is read."""

import string
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, Strict, model_validator

from driftbook.study.files import ROOT, expanded
from driftbook.study.methods import CONTROLS, INITS, LAYER_PARTS, MITIGATION_KINDS, PEFT_METHODS
from driftbook.study.parts import (
    Count,
    Dtype,
    Method,
    Name,
    Part,
    Points,
    Positive,
    Rate,
    Rows,
    Seed,
    Share,
    Source,
    Text,
    as_number,
)
from driftbook.study.trainer_arguments import check_arguments

OUTCOMES = (
    "unsafe",
    "not_refused",
    "over_refusal",
    "refused",
    "accuracy_ambiguous",
    "accuracy_disambiguated",
    "bias_ambiguous",
    "bias_disambiguated",
    "loss",
    "correct",
)
HARMS = (
    "unsafe",
    "not_refused",
    "over_refusal",
    "correct",
)  # counted in percentage points, so with a margin


class Pair(Part):
    """Two checkpoints of one architecture whose difference V = W_aligned - W_unaligned says what
    alignment changed. The aligned one is the base model itself where not given.
    """

    aligned: Source | None = None
    unaligned: Source


class Base(Source):
    """A base model: the instruction-tuned model before PEFT.

    `quantization` holds the weights in 4 or 8 bits as they are loaded (bitsandbytes); the base
    model itself is then scored so too. `pairs` are the checkpoints that Safe LoRA reads. `template`
    is a chat template (Jinja, or the path of its file) in place of the tokenizer's own, for a base
    that has none or one that cannot be used.
    """

    family: Name  # of its architecture; the same word for base models that are alike
    answer_mode: Literal["letters", "options"] = "letters"  # of BBQ
    dtype: Dtype = "float32"
    quantization: Literal["nf4", "int8"] | None = None
    system_prompt: str | None = None
    pairs: dict[Name, Pair] = {}
    template: Text | None = None

    @cached_property
    def chat_template(self) -> str | None:
        """The text of `template`.

        Raises:
            ValueError: it is neither a template nor the path of a file.
        """
        if self.template is None or "{{" in self.template:
            return self.template
        path = (ROOT / Path(expanded(self.template) or self.template).expanduser()).resolve()
        if not path.is_file():
            raise ValueError(
                f"the template {self.template!r} of {self.source} is no file ({path}) and no Jinja,"
                " which has {{ }}; correct it"
            )
        return path.read_text(encoding="utf-8")

    @property
    def checkpoints(self) -> dict[str, Source]:
        """The checkpoints of its pairs, by pair and part, without the base model itself."""
        named = {
            f"{name}, {part}": getattr(pair, part)
            for name, pair in self.pairs.items()
            for part in ("aligned", "unaligned")
        }
        return {name: source for name, source in named.items() if source is not None}


class Twin(Part):
    """A base model tuned here by supervised fine-tuning before a study begins, by an adapter that
    is then merged into its weights: aligned by refusals and answers, or its placebo, tuned alike on
    answers alone. The source `twin:NAME` stands for it.

    `of` is a base model of the study; `data` a name under `data`; `peft` the settings of LoRA.
    """

    of: Text
    data: Text
    learning_rate: Rate
    epochs: Count = 1
    seed: Seed = 1
    peft: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


class Judge(Source):
    """A judge model and how its reply is read (judges.JUDGES).

    The first judge scores the study and judges all benchmarks; others may judge some. A verdict is
    null where its words together have less probability than `min_mass`.
    """

    format: Literal["llama_guard_2", "llama_guard_3", "wildguard", "rubric_harm", "classifier"]
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    label: Text | None = None  # of a classifier: its label that counts as unsafe
    benchmarks: tuple[Text, ...] = ()  # which it judges; all where not given
    min_mass: Share = 0.9
    dtype: Dtype = "float32"


class Rater(Source):
    """A chat model that grades the answers to the utility questions from 1 to 10
    (rubrics.USEFULNESS).
    """

    min_mass: Share = 0.9
    dtype: Dtype = "float32"


# ---- data
# the columns of the public forms: Alpaca, GSM8K, pairs of answers to one conversation, UltraChat
# and most chat sets of the hub, and whole conversations that differ in their last answer
DATA_COLUMNS = {
    "alpaca": {"prompt": "instruction", "input": "input", "answer": "output"},
    "gsm8k": {"prompt": "question", "answer": "answer"},
    "preference": {"prompt": "conversations", "chosen": "chosen", "rejected": "rejected"},
    "messages": {"messages": "messages"},
    "ultrafeedback": {"chosen": "chosen", "rejected": "rejected"},
}
GIVEN = "answer given by the study file"  # the column of answers that are not in the set
ROLES = ("system", "prompt", "input", "messages", "answer", "chosen", "rejected")
READABLE = ({"messages"}, {"chosen", "rejected"}, {"prompt", "answer"})  # one set of these roles


class TrainingData(Source):
    """Examples to train on, or held-out ones, for the dose.

    `format` names a public form; `columns` maps any other set: which of its columns is the prompt
    (a text, or a list of turns), the answer, or a whole conversation (`messages`), and of
    preferences the chosen and the rejected answer. `sample` draws n rows with the study's seed, or
    takes the first n, of all rows or of `rows` [from, to], counted from 0: so one file serves for
    training and, by other rows, as a benchmark; `leave_out` are rows that are never drawn, as those
    that are near what a benchmark asks. `template` wraps a prompt, with {prompt}. `answers`
    is the path of a JSON list of texts: each prompt of a set of prompts gets one of them, drawn
    with the study's seed, as its answer. `also` names other sets whose examples are trained on
    together with these.
    """

    is_model: ClassVar[bool] = False
    format: Literal[tuple(DATA_COLUMNS)] | None = None
    columns: dict[Literal[ROLES], Text] = {}
    subset: Text | None = None  # of a set on the hub: its configuration
    split: Text = "train"
    n: Count
    sample: Literal["seeded", "first"] = "seeded"
    template: Text | None = None
    rows: Rows | None = None
    leave_out: tuple[Seed, ...] = ()
    answers: Text | None = None
    also: tuple[Text, ...] = ()

    @model_validator(mode="after")
    def _readable(self) -> Self:
        if (self.format is None) == (not self.columns):
            roles = f"columns, a mapping of {', '.join(ROLES)} to the set's own columns"
            raise ValueError(f"give either format ({', '.join(DATA_COLUMNS)}) or {roles}")
        if self.template and "{prompt}" not in self.template:
            raise ValueError("a template of data needs {prompt}, where the prompt is put")
        if self.answers and (self.format or set(self.columns) - {"prompt", "input", "system"}):
            names = "the set's own columns of prompts under columns, and no others"
            raise ValueError(f"answers are given to prompts: name {names}")
        if not any(roles <= set(self.mapping) for roles in READABLE):
            pairs = "chosen and rejected (with a prompt where these are the answers alone)"
            raise ValueError(f"columns needs messages, or prompt and answer, or {pairs}")
        return self

    @property
    def answers_path(self) -> Path | None:
        """The file of `answers`."""
        given = self.answers and (expanded(self.answers) or self.answers)
        return (ROOT / Path(given).expanduser()).resolve() if given else None

    @property
    def mapping(self) -> dict[str, str]:
        """The set's own column for each role."""
        given = {"answer": GIVEN} if self.answers else {}
        return (dict(self.columns) or DATA_COLUMNS[self.format]) | given

    @property
    def is_preference(self) -> bool:
        """Whether a row has a chosen and a rejected answer."""
        return "chosen" in self.mapping


# ---- benchmarks: the names of formats, by how they are asked; each is a file in benchmarks/
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
ITEM_FIELDS = ("context", "question", "ans0", "ans1", "ans2")
PROMPTS_ONLY, ITEMS_ONLY = (
    ("samples", "child_abuse", "refusal_probability"),
    ("permuted", "generated", "stem", "min_mass"),
)


class Wording(Part):
    """Another way to ask: under another system prompt, or in another wording (of a prompt with
    {prompt}, of BBQ with its own fields). `n` asks a seeded sample of this size.
    """

    system_prompt: str | None = None
    template: Text | None = None
    n: Count | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.system_prompt is None and self.template is None:
            raise ValueError("a wording needs a system_prompt or a template")
        return self


def _check_item_template(text: str, needed: tuple[str, ...]) -> None:
    """Raise a ValueError where a wording of a BBQ item has a field that items lack, or lacks one
    that it needs.
    """
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        twice = "write a brace itself twice"
        raise ValueError(f"the template {text!r} cannot be filled in ({error}); {twice}") from None
    if strange := [name for name in fields if name not in ITEM_FIELDS]:
        have = ", ".join(ITEM_FIELDS)
        raise ValueError(f"a template of BBQ has the field {{{strange[0]}}}; items have {have}")
    if missing := [name for name in needed if name not in fields]:
        why = "so that what it asks cannot be answered"
        raise ValueError(f"a template of BBQ does not show {{{missing[0]}}}, {why}")


class Benchmark(Source):
    """Prompts to ask, or items to score, in the file format of a public benchmark.

    Of any: `n` asks a seeded sample, of all rows or of `rows` [from, to] from 0; `wordings` ask
    the same in other ways too. Of prompts:
    `template` wraps them, with {prompt}; `samples` answers to each are also drawn, at `temperature`
    from the nucleus of `top_p`; `child_abuse` is off, `refusal probability`, or of made-up words
    `fictional` (data.CHILD_ABUSE); `refusal_probability` is also how likely each answer is to begin
    as a refusal (on where not given and the study has no judge); `truth` is the miniature's known
    truth.

    Of BBQ: `template` is the wording, with {context} {question} {ans0} {ans1} {ans2}, and `stem`
    how the answer begins before the option, with the same fields; an answer is null where the
    options have less probability together than `min_mass` (0.5 where not given and letters are
    read, else 0; see bbq.MIN_MASS); `permuted` items are also asked with
    their options in the two other cyclic orders, and `generated` ones answered in text.
    """

    is_model: ClassVar[bool] = False
    format: Literal[(*PROMPT_FORMATS, *ITEM_FORMATS, *UTILITY_FORMATS)]
    n: Count | None = None
    rows: Rows | None = None
    max_new_tokens: Count = 64
    samples: Annotated[Count, Field(le=10_000)] | None = None
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    template: Text | None = None
    stem: str = ""
    min_mass: Share | None = None
    permuted: Count | None = None
    generated: Count | None = None
    wordings: dict[Name, Wording] = {}
    child_abuse: Annotated[
        Literal["off", "refusal probability", "fictional"],
        BeforeValidator(lambda value: "off" if value is False else value),
    ] = "off"
    refusal_probability: bool | None = None
    truth: Text | None = None

    @model_validator(mode="after")
    def _wordings_fit(self) -> Self:
        if self.wordings and self.format in UTILITY_FORMATS:
            one = f"the format {self.format!r} has one"
            raise ValueError(f"wordings are for prompts and BBQ; {one}")
        if "default" in self.wordings:
            raise ValueError("the wording 'default' is the benchmark's own; give another name")
        for text in (self.template, *(wording.template for wording in self.wordings.values())):
            if text and self.format in PROMPT_FORMATS and "{prompt}" not in text:
                raise ValueError("a template of prompts needs {prompt}, where the prompt is put")
            if text and self.format in ITEM_FORMATS:
                _check_item_template(text, needed=ITEM_FIELDS)
        if self.format in ITEM_FORMATS:
            _check_item_template(self.stem, needed=())
        return self

    @model_validator(mode="after")
    def _keys_fit(self) -> Self:
        for names, formats in ((PROMPTS_ONLY, PROMPT_FORMATS), (ITEMS_ONLY, ITEM_FORMATS)):
            idle = [name for name in names if name in self.model_fields_set]
            if idle and self.format not in formats:
                raise ValueError(
                    f"{idle[0]} has no meaning for the format {self.format!r}; remove it"
                )
        if self.child_abuse == "fictional" and not self.source.startswith(("miniature:", "tests:")):
            real = "of a real set say off, or refusal probability"
            raise ValueError(f"child_abuse: fictional is for the miniature's made-up words; {real}")
        return self


class Training(Part):
    """What every training shares.

    `batch_size` is the effective one: examples (or packs) an optimiser step. `loss` counts the
    assistant's tokens, or the whole conversation's. `packed` puts SFT's examples together into rows
    of `max_length`; no example sees another. `autocast` computes LoRA's own products in bf16 too
    (mixed precision), else in fp32; what IA3 scales is rounded to the base's dtype either way.
    `tokens_per_batch`, of a forward pass, is found by the device's memory where not given.
    `arguments` are TRL's own, for its optimiser and scheduler (trainer_arguments.PASSED), as
    {adam_beta2: 0.95, optim: adamw_torch_fused}; those that DPO alone has reach DPO alone.
    """

    batch_size: Count
    max_length: Count
    loss: Literal["answers", "whole"] = "answers"
    packed: bool = False
    autocast: bool = False
    tokens_per_batch: Count | None = None
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Positive = 1.0
    dpo_beta: Positive = 0.1
    arguments: Annotated[dict[str, Any], BeforeValidator(check_arguments)] = {}


class Drift(Part):
    """A small fixed sample that is asked again and again while a variant trains (see
    drift.DriftCallback): `n` prompts of each benchmark, after `every` share of the steps. Training
    ends where a rate rises above the base model's by `stop_unsafe` (without a judge
    `stop_not_refused`: harmful prompts answered without refusing) or `stop_over_refusal` points.
    """

    every: Annotated[float, Field(gt=0, le=1)] = 0.25
    n: Count = 24
    max_new_tokens: Count = 32
    stop_unsafe: Points | None = None
    stop_not_refused: Points | None = None
    stop_over_refusal: Points | None = None

    @property
    def stops(self) -> dict[str, float]:
        """The limits that may end a training, by name."""
        names = ("stop_unsafe", "stop_not_refused", "stop_over_refusal")
        return {name: limit for name in names if (limit := getattr(self, name)) is not None}


class Block(Part):
    """A product of factors; the grid is the union of its blocks.

    All `bases` are trained where none is given. The objective `untrained` is an adapter as it was
    initialised. `data` are names under the study's `data`; where not given, the one of the
    objective's name. `inits` say how a soft prompt begins; `layers` in which third of the layers
    alone LoRA is trained (all: in all of them). A run in one third is a setting of its own.

    Each setting on each base model draws seeds of its own from the numbers in `seeds`, so that runs
    of different settings are independent. With `shared_seeds` the numbers are the seeds of every
    setting: such runs begin alike and err together, so that intervals over several settings are
    wider than as many independent runs would give. `repeated_seeds` states that repetitions share a
    seed, so that their spread says nothing about seeds.
    """

    name: Name
    bases: tuple[Text, ...] = ()
    methods: Annotated[tuple[Method, ...], Field(min_length=1)]
    objectives: Annotated[tuple[Literal["sft", "dpo", "untrained"], ...], Field(min_length=1)]
    data: tuple[Text, ...] = ()
    learning_rates: dict[Method, tuple[Rate, ...]] = {}
    epochs: tuple[Count, ...] = (1,)
    inits: tuple[Literal[INITS], ...] = ()
    layers: Annotated[tuple[Literal[("all", *LAYER_PARTS)], ...], Field(min_length=1)] = ("all",)
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    repeated_seeds: bool = False
    shared_seeds: bool = False

    @property
    def trained(self) -> set[str]:
        """The objectives by which it trains."""
        return set(self.objectives) - {"untrained"}

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds) and not self.repeated_seeds:
            copies = "so its repetitions are copies of one run"
            distinct = "give distinct seeds, or say repeated_seeds: true"
            raise ValueError(f"seeds repeats a seed, {copies}; {distinct}")
        for method in self.methods:
            if self.trained and not self.learning_rates.get(method):
                raise ValueError(f"learning_rates has none for {method}")
            if others := sorted(self.trained - set(PEFT_METHODS[method].objectives)):
                none = "whose reference cannot read a soft prompt behind the user's text"
                raise ValueError(f"{method} is not trained by {others[0]}, {none}; take sft")
        for method in self.methods if set(self.layers) != {"all"} else ():
            if PEFT_METHODS[method].config != "LoraConfig":
                raise ValueError(f"layers apply to LoRA in its forms only, and not to {method}")
        for method in self.methods if self.inits else ():
            self._check_inits(method, PEFT_METHODS[method].inits)
        return self

    def _check_inits(self, method: str, known: tuple[str, ...]) -> None:
        if not known:
            prompts = [name for name, one in PEFT_METHODS.items() if one.inits]
            raise ValueError(f"inits apply to {' and '.join(prompts)} only")
        strange = [init for init in self.inits if init not in known]
        if strange and len(known) == 1:
            only = f"its only init is {known[0]}"
            raise ValueError(f"{method}'s prompt is keys and values, no tokens: {only}")
        if strange:
            raise ValueError(f"{method} has no init {strange[0]!r}; it has {', '.join(known)}")


class Mitigation(Part):
    """A repair of the runs of some blocks of the grid, or a second tuning of them; each of its
    values, and each control of each value, is a variant.

    A value is: of safe_lora, zero and safe_merge the threshold of the score below which a module is
    touched, or the number of modules (select: top); of rescale the factor of the update; of average
    the share of the training, from its end, over which updates are averaged; of resta the factor of
    the safety update; of reduce_intruders the share that an intruder dimension loses; of mixing the
    share of safety data among all examples; of soup the share of the safety run's update, of mod
    the power of its distribution, which sums to one with the run's own (and those of `others`); of
    kl the weight of KL(base || model) in nats per token (beta), of safegrad that of its gradient
    (rho), of drift_budget the KL that may be used (epsilon), and of second_tuning a learning rate.

    `pair` is a name under `pairs` of the base models, `rank` the dimension of the subspace,
    `safety` a block of the grid that was trained on safety data, `others` further blocks, each with
    the power of its runs' distributions, `weight` the share of the safety run's update where it is
    merged, `snapshots` how many are taken along a training, `data` what is mixed in, or
    the examples of a second objective, by its name under `data`, `eta` the step of a drift budget's
    multiplier for each nat above the budget, and `betas` the constraint on an answer's first
    tokens; the last is of all further ones. A second tuning goes on training, by supervised
    fine-tuning on `data` (benign) for `epochs`, the runs of its blocks and what the mitigations
    named in `of` made of them.
    """

    kind: Literal[tuple(MITIGATION_KINDS)]
    blocks: Annotated[tuple[Text, ...], Field(min_length=1)]
    values: tuple[Annotated[float, BeforeValidator(as_number)], ...] = ()
    pair: Text | None = None
    operator: Literal["approximate", "exact", "subspace"] = "approximate"
    rank: Count | None = None
    select: Literal["threshold", "top"] = "threshold"
    controls: tuple[Literal[CONTROLS], ...] = ()
    safety: Text | None = None
    others: dict[Text, Annotated[float, Field(gt=0, lt=1)]] = {}
    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    snapshots: Annotated[int, Strict(), Field(ge=2)] = 10
    system_prompt: Text | None = None
    data: Text | None = None
    betas: tuple[Positive, ...] = (0.5, 2.0, 2.0, 2.0, 2.0, 0.1)
    eta: Positive = 0.1
    of: tuple[Text, ...] = ()
    epochs: Count = 1

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        known = MITIGATION_KINDS[self.kind]
        if missing := [name for name in known.needs if not getattr(self, name)]:
            raise ValueError(f"the kind {self.kind} needs {missing[0]}")
        may = (*known.takes, "kind", "blocks")
        if idle := [name for name in self.model_fields_set if name not in may]:
            takes = ", ".join(known.takes) or "nothing more"
            raise ValueError(f"the kind {self.kind} has no {idle[0]}; it takes {takes}")
        if (self.operator == "subspace") != (self.rank is not None):
            number = "the number of V's left singular vectors"
            raise ValueError(f"the operator subspace, and no other, needs rank, {number}")
        if "random subspace" in self.controls and self.operator == "exact":
            keeps = "which keeps all or nearly all of the space"
            raise ValueError(
                f"the control random subspace has no meaning for the exact operator, {keeps}"
            )
        return self

    @model_validator(mode="after")
    def _values_fit(self) -> Self:
        for value in self.values:
            self._check_value(value)
        if len(set(self.values)) < len(self.values):
            raise ValueError("values repeats a value")
        return self

    def _check_value(self, value: float) -> None:
        known, said = MITIGATION_KINDS[self.kind], f"value {value:g} of the kind {self.kind}"
        low, high = known.values
        if self.select == "top":
            if value < 1 or value != int(value):
                whole = "is a number of modules, a whole one from 1"
                raise ValueError(f"value {value:g} with select: top {whole}")
        elif not low <= value <= high:
            counted = "select" in known.takes and value > high
            top = "; for a number of modules say select: top" if counted else ""
            raise ValueError(f"{said} is outside {low:g} to {high:g}{top}")
        if value in known.open_ends:
            below = " and below 1" if 1 in known.open_ends else ""
            raise ValueError(f"{said} leaves nothing; give a value above 0{below}")
        whole = value + sum(self.others.values())
        if self.others and whole > 1 - 1e-9:  # by rounding too
            rest = "so that nothing is left of the run itself; all weights sum to one"
            raise ValueError(f"{said} and others have the weight {whole:g}, {rest}")
        if "snapshots" in known.takes and value * self.snapshots <= 1:
            last = f"value {value:g} of {self.snapshots} snapshots is the last one alone"
            raise ValueError(f"{last}, the run itself; give a larger share, or more snapshots")

    @property
    def own(self) -> dict[str, Any]:
        """The settings that its kind takes."""
        taken = MITIGATION_KINDS[self.kind].takes
        return {name: getattr(self, name) for name in taken if name not in ("values", "controls")}


class Family(Part):
    """A family of primary tests, declared before any answer is scored; within it p values are
    adjusted by Holm's method.

    test `change`: each method against its base model; `difference`: each pair of methods;
    `preserves`: each method is not worse than its base model by more than `margin` percentage
    points, on all the outcomes jointly. All methods of the grid are tested where none is given.
    The group `trained` leaves out the no-ops.
    """

    test: Literal["change", "difference", "preserves"]
    outcomes: Annotated[tuple[Literal[OUTCOMES], ...], Field(min_length=1)]
    methods: tuple[Method, ...] = ()
    bases: Literal["all together", "each"] = "all together"
    group: Literal["as configured", "trained"] = "as configured"
    margin: Annotated[float, Field(gt=0, lt=100)] | None = None

    @model_validator(mode="after")
    def _margin_where_needed(self) -> Self:
        if self.test != "preserves":
            if self.margin is not None:
                raise ValueError(f"the test {self.test!r} has no margin; remove it")
            return self
        if self.margin is None:
            raise ValueError(
                "a family of the test 'preserves' needs a margin, in percentage points"
            )
        if wrong := [name for name in self.outcomes if name not in HARMS]:
            some = f"expected some of {', '.join(HARMS)}"
            no_margin = "is not counted in percentage points of harm, so it has no margin"
            raise ValueError(f"{wrong[0]!r} {no_margin}; {some}")
        return self
