"""Every table of a study, declared once: columns with dtype, meaning, nullable, volatile."""

from functools import partial

import pandas as pd

from driftbook.study.declared import Column
from driftbook.study.declared import Table as Table

_text, _whole = partial(Column, "text"), partial(Column, "whole")
_real, _truth = partial(Column, "real", nullable=True), partial(Column, "truth", nullable=True)

RUN_ID = _text("readable settings and a short hash of all of them")
BENCHMARK = _text("name of the benchmark in the study file")
PROMPT_ID = _text("the benchmark's own id of the prompt")
RESPONSE_KEY = {
    "run_id": RUN_ID,
    "benchmark": BENCHMARK,
    "prompt_id": PROMPT_ID,
    "prompt_variant": _text("wording and system prompt under which it was asked"),
    "decoding": _text("greedy, or the sampling settings"),
    "sample": _whole("number of the sample, from 0"),
}

VARIANTS = Table(
    "variants",
    "a base model x method x settings x repetition; method none is the base model itself",
    ("run_id",),
    {
        "run_id": RUN_ID,
        "base_model": _text("the instruction-tuned model before PEFT"),
        "family": _text("architecture family"),
        "method": _text(
            "none (the base), or the name of a PEFT method: study.PEFT_METHODS, of runs read again"
            " PEFT's own word"
        ),
        "method_class": _text("base, adapter, prompt; of runs read again also full"),
        "objective": _text("none (the base), sft, dpo, untrained (as initialised)"),
        "dataset": _text("training data, by its name in the study file", nullable=True),
        "n_train": _whole("training examples", nullable=True),
        "learning_rate": _real("peak learning rate asked for"),
        "epochs": _whole("passes over the data", nullable=True),
        "seed": _whole("seed of init, data order and dropout", nullable=True),
        "repetition": _whole("number of the repetition, from 1"),
        "init": _text("how a soft prompt was initialised", nullable=True),
        "mitigation": _text(
            "name of the repair, or of the layers that alone are adapted", nullable=True
        ),
        "parent_run_id": _text("variant that was repaired", nullable=True),
        "template": _text("prompt template at test time"),
        "system_prompt": _text("system prompt at test time", nullable=True),
        "settings": _text("all other settings, JSON"),
    },
)

RUNS = Table(
    "runs",
    "a variant, executed",
    ("run_id",),
    {
        "run_id": RUN_ID,
        "status": _text("ok or failed"),
        "failure": _text("why it failed, one sentence", nullable=True),
        "trained_learning_rate": _real("peak rate, read back from the optimiser"),
        "trained_epochs": _real("epochs, read back from the trainer"),
        "trained_seed": _whole("seed, read back from the trainer", nullable=True),
        "trained_batch_size": _whole(
            "effective batch size, read back from the trainer", nullable=True
        ),
        "trainer_arguments": _text(
            "the trainer's own arguments after training, JSON", nullable=True
        ),
        "steps": _whole("optimiser steps", nullable=True),
        "n_examples": _whole("training examples used", nullable=True),
        "n_trainable": _whole("trainable parameters", nullable=True),
        "n_stored": _whole("numbers in the adapter file", nullable=True),
        "loss_first": _real("training loss at the first step"),
        "loss_last": _real("training loss at the last step"),
        "nll": _real("mean negative log-likelihood per token of the held-out answers"),
        "nll_base": _real("the same of the base model"),
        "dose_nll": _real("nll_base - nll: how much the held-out answers gained, nats per token"),
        "kl_base": _real("mean KL(variant || base) per token on the held-out answers, nats"),
        "kl_init": _real(
            "the same against the adapter as it was initialised: what training itself did"
        ),
        "no_op": _truth(
            "training left the model where its initialisation put it (kl_init below the threshold)"
        ),
        "findings": _text("adapter doctor's findings, separated by '; '", nullable=True),
        "adapter_sha256": _text("hash of the adapter's bytes", nullable=True),
        "base_revision": _text("revision or content hash of the base model", nullable=True),
        "data_revision": _text("content hash of the training examples", nullable=True),
        "seconds": _real("wall-clock seconds of training", volatile=True),
        "cpu_seconds": _real("CPU seconds of training", volatile=True),
        "gpu_seconds": _real("GPU-seconds of training, null on CPU", volatile=True),
        "peak_memory": _real(
            "peak memory of the process (CPU) or the device (GPU), bytes", volatile=True
        ),
        "versions": _text("package versions, JSON", nullable=True, volatile=True),
        "hardware": _text("machine", nullable=True, volatile=True),
        "finished": _text("when, UTC", nullable=True, volatile=True),
    },
)

CURVES = Table(
    "curves",
    "a point of a training curve",
    ("run_id", "split", "step"),
    {
        "run_id": RUN_ID,
        "split": _text("train or heldout"),
        "step": _whole("optimiser step"),
        "loss": _real("mean loss at that step: of SFT, nats per token; of DPO, the DPO loss"),
        "learning_rate": _real("rate at that step"),
    },
)

DRIFT = Table(
    "drift",
    "what a small fixed sample showed at one step of a training",
    ("run_id", "step", "outcome"),
    {
        "run_id": RUN_ID,
        "step": _whole("optimiser step, 0 before the first"),
        "outcome": _text(
            "unsafe answers (without a judge harmful prompts answered without refusing),"
            " over-refusal, accuracy in BBQ by context, stereotyped answers in BBQ"
        ),
        "value": _real("percent of the answers that could be scored"),
        "ci_low": _real("interval (Wilson), lower end; its level: stats/confidence.py"),
        "ci_high": _real("interval, upper end"),
        "n": _whole("answers scored"),
        "base_value": _real("the same of the base model"),
    },
)

PROMPTS = Table(
    "prompts",
    "a prompt asked, without its text",
    ("benchmark", "prompt_id"),
    {
        "benchmark": BENCHMARK,
        "prompt_id": PROMPT_ID,
        "category": _text("the benchmark's own category"),
        "kind": _text("harmful, benign look-alike, or utility"),
        "family": _text(
            "prompts made from one template or about one subject, the unit of resampling",
            nullable=True,
        ),
    },
)

RESPONSES = Table(
    "responses",
    "one answer",
    tuple(RESPONSE_KEY),
    {
        **RESPONSE_KEY,
        "response": _text("what the model said"),
        "n_tokens": _whole("tokens generated"),
        "finish_reason": _text("stop, length, or thought (it is all thought, and no answer)"),
    },
    private=True,
)

VERDICTS = Table(
    "verdicts",
    "one judge on one answer",
    (*RESPONSE_KEY, "judge"),
    {
        **RESPONSE_KEY,
        "judge": _text("name of the judge in the study file, 'refusal detector' where it has none"),
        "p_unsafe": _real(
            "the judge's probability of unsafe among safe and unsafe, or of the highest grade among"
            " the grades"
        ),
        "mass": _real("its probability of these words together"),
        "unsafe": _truth("true, false, or null where unscored"),
        "score": _real("mean grade of a judge that grades harm, 1 to 5; null for all others"),
        "hazards": _text("the judge's own codes, of the unsafe", nullable=True),
        "judge_refusal": _truth(
            "the judge's own word on whether the response declines; null for judges that do not say"
        ),
        "refusal": _truth("the response declines, by its words; measured apart from unsafe"),
        "reply": _text("the judge's reply, raw", nullable=True),
        "unscored_reason": _text("why unsafe is null", nullable=True),
        "coherent": _truth("false for gibberish"),
        "n_tokens": _whole("tokens of the response"),
        "finish_reason": _text("stop, length, or thought (it is all thought, and no answer)"),
        "outcome": _text(
            "safe and useful (without a judge: answered), refused, unsafe, incoherent, no answer",
            nullable=True,
        ),
    },
)

ANSWERS = Table(
    "answers",
    "one BBQ item, answered",
    ("run_id", "item_id", "answer_mode", "prompt_variant", "option_order"),
    {
        "run_id": RUN_ID,
        "item_id": _text("category and example_id"),
        "answer_mode": _text(
            "letters or options, read from probabilities; debiased: without the prior of each"
            " place; generated: read from text"
        ),
        "prompt_variant": _text("wording"),
        "option_order": _text("order in which the file's options were shown, ABC the file's own"),
        "dimension": _text("BBQ category"),
        "context": _text("ambiguous or disambiguated"),
        "polarity": _text("negative or non-negative"),
        "question_family": _text("template of the question, the unit of resampling", nullable=True),
        "p_a": _real("probability of the file's first option among the three"),
        "p_b": _real("of its second"),
        "p_c": _real("of its third"),
        "option_mass": _real("probability of the three options together"),
        "answer": _text("A, B, C in file order, or null", nullable=True),
        "correct": _truth("the label's answer"),
        "unknown": _truth("the UNKNOWN option was chosen"),
        "biased": _truth(
            "the answer agrees with the stereotype; null for UNKNOWN or where no target is defined"
        ),
        "unscored_reason": _text("why answer is null", nullable=True),
    },
)

RATINGS = Table(
    "ratings",
    "one utility item",
    ("run_id", "benchmark", "prompt_id", "metric"),
    {
        "run_id": RUN_ID,
        "benchmark": BENCHMARK,
        "prompt_id": PROMPT_ID,
        "metric": _text(
            "nll (nats per token), correct (0 or 1), 'grade by' a rater (1 to 10), p_refusal (of"
            " prompts that are also answered by kind: p_refusal, harmful; p_refusal, benign), or"
            " what instructions.py and stereoset.py declare"
        ),
        "value": _real("value"),
        "weight": _real("tokens for nll, 1 for correct"),
        "unscored_reason": _text("why value is null", nullable=True),
    },
)

LABELS = Table(
    "labels",
    "a known or human label of an answer",
    ("benchmark", "prompt_id", "run_id", "rater"),
    {
        "benchmark": BENCHMARK,
        "prompt_id": PROMPT_ID,
        "run_id": RUN_ID,
        "rater": _text("rule (the miniature's known truth) or a person"),
        "label": _text("unsafe or safe; refused or answered for benign prompts"),
        "sampling_probability": _real(
            "probability with which the answer was drawn for labelling", nullable=False
        ),
    },
)

MODULES = Table(
    "modules",
    "a module of a repaired variant",
    ("run_id", "module"),
    {
        "run_id": RUN_ID,
        "module": _text("name of the weight matrix in the base model"),
        "out_features": _whole("rows of the matrix", nullable=True),
        "in_features": _whole("its columns", nullable=True),
        "rank": _whole("rank r of the update's factors", nullable=True),
        "norm_update": _real("Frobenius norm of the parent's update dW"),
        "norm_v": _real("Frobenius norm of V, the aligned matrix minus the unaligned one"),
        "effective_rank_v": _real("participation ratio of V's squared singular values"),
        "cosine": _real("of dW and C dW, C the operator"),
        "cosine_null": _real(
            "the same for an update in a random direction: sqrt(effective_rank_v / out_features)"
        ),
        "energy": _real(
            "share of the squared norm of dW in the span of V's first k left singular vectors"
        ),
        "energy_null": _real("the same for an update in a random direction: k / out_features"),
        "k": _whole("number of those vectors", nullable=True),
        "score": _real("what the module was selected by"),
        "projected": _truth("whether the repair touched it"),
        "share_kept": _real("norm of the repaired update over that of the parent's"),
        "state": _text("what was done, or why not", nullable=True),
    },
)

SPECTRA = Table(
    "spectra",
    "a singular value of V, the difference of two checkpoints",
    ("base_model", "pair", "module", "index"),
    {
        "base_model": _text("base model of the study"),
        "pair": _text("which two checkpoints, by their name in the study file"),
        "module": _text("name of the weight matrix"),
        "index": _whole("its place, from 1 for the largest"),
        "singular_value": _real("singular value of V"),
        "out_features": _whole("rows of the matrix"),
        "in_features": _whole("its columns"),
        "norm_v": _real("Frobenius norm of V"),
        "effective_rank_v": _real("participation ratio of V's squared singular values"),
    },
)

FRONTIER = Table(
    "frontier",
    "a number of a repaired run, its parent or its base model",
    ("run_id", "half", "outcome"),
    {
        "run_id": RUN_ID,
        "half": _text("calibration or report half of the prompts, or all of them"),
        "outcome": _text("what is measured, with its unit"),
        "value": _real("the number"),
    },
)

SPECIFICATIONS = Table(
    "specifications",
    "the change of a method under one choice of each kind that an analyst has",
    (
        "study",
        "method",
        "judge",
        "threshold",
        "wording",
        "no_ops",
        "weights",
        "unscored",
        "estimator",
    ),
    {
        "study": _text("name of the study"),
        "family_of_tests": _text("the declared family that is estimated again"),
        "method": _text("method"),
        "judge": _text("name of the judge in the study file"),
        "threshold": _text("probability above which an answer is unsafe, or the judge's own"),
        "wording": _text("wording and system prompt of the prompts"),
        "no_ops": _text("with or without runs that training left as they were"),
        "weights": _text("settings alike, runs alike, or by the model"),
        "unscored": _text("left out, or at the value that makes the change lowest or highest"),
        "estimator": _text("primary, or the model that gave the number"),
        "declared": _truth("the specification of the study file"),
        "value": _real("change in the rate of unsafe, or not refused, answers, percentage points"),
        "ci_low": _real("interval, lower end; its level: stats/confidence.py"),
        "ci_high": _real("interval, upper end"),
        "p": _real("p value"),
        "p_adjusted": _real("Holm's, among the methods of the specification"),
        "word": _text("rises, falls, or cannot tell"),
        "n_runs": _whole("runs behind it", nullable=True),
        "n_items": _whole("prompts behind it", nullable=True),
    },
)

PROBES = Table(
    "probes",
    "a number found inside a run, by the probe, part, layer and token",
    ("run_id", "probe", "part", "layer", "position"),
    {
        "run_id": RUN_ID,
        "probe": _text("what is measured, with its unit (training/probes.py)"),
        "part": _text("module, kind of prompts, or all"),
        "layer": _whole(
            "layer at whose output it is, from 0; null for the whole model or before the first",
            nullable=True,
        ),
        "position": _text("token: last of the prompt, all of the prompt, or number in the answer"),
        "value": _real("the number, null where the probe is refused"),
        "ci_low": _real("interval over prompts, lower end; its level: stats/confidence.py"),
        "ci_high": _real("interval, upper end"),
        "null": _real("the same where there is nothing to find (training/probes.py says how)"),
        "null_low": _real("lower end of the range of this null"),
        "null_high": _real("upper end"),
        "n": _whole("prompts behind it", nullable=True),
        "note": _text("why value is null", nullable=True),
    },
)

RATES = Table(
    "rates",
    "counts of a run in a category",
    ("run_id", "benchmark", "judge", "category", "outcome"),
    {
        "run_id": RUN_ID,
        "benchmark": BENCHMARK,
        "judge": _text("judge, or 'refusal detector'"),
        "category": _text("the benchmark's own category"),
        "outcome": _text("unsafe (without a judge: not refused), or refused"),
        "k": _whole("answers with that outcome"),
        "n_scored": _whole("answers that could be scored"),
        "n": _whole("prompts asked"),
    },
)

ESTIMATES = Table(
    "estimates",
    "one number with its interval",
    (
        "study",
        "notebook",
        "outcome",
        "benchmark",
        "judge",
        "base_model",
        "method",
        "group",
        "member",
        "category",
        "contrast",
        "against",
        "estimator",
        "margin",
    ),
    {
        "study": _text("name of the study"),
        "notebook": _text("notebook that computed it"),
        "outcome": _text("what is measured, with its unit"),
        "benchmark": _text("benchmark, or all"),
        "judge": _text("judge, or none"),
        "base_model": _text("base model, or all"),
        "method": _text("method, or all"),
        "group": _text("kind of the runs together: trained, settings, run, ..., or all"),
        "member": _text("which one of that kind: a run_id, settings, a repair, ..., or all"),
        "category": _text("category or dimension of the benchmark, or all"),
        "contrast": _text("level, change, difference, ..."),
        "against": _text("method, control or run on the other side, or none"),
        "estimator": _text("primary, or the model or correction that gave the number"),
        "value": _real("the number"),
        "se": _real("standard error"),
        "ci_low": _real("interval, lower end; its level: stats/confidence.py"),
        "ci_high": _real("interval, upper end"),
        "p": _real("p value"),
        "p_adjusted": _real("adjusted within its family of tests"),
        "family_of_tests": _text("name of that family", nullable=True),
        "margin": _real("margin of non-inferiority"),
        "population": _text("what the interval generalises to"),
        "n_runs": _whole("runs behind it", nullable=True),
        "n_items": _whole("prompts or items behind it", nullable=True),
        "n_unscored": _whole("answers that could not be scored", nullable=True),
        "how": _text("estimator"),
    },
)

TABLES = {
    one.name: one
    for one in (
        VARIANTS,
        RUNS,
        CURVES,
        DRIFT,
        PROMPTS,
        RESPONSES,
        VERDICTS,
        ANSWERS,
        RATINGS,
        LABELS,
        RATES,
        MODULES,
        SPECTRA,
        FRONTIER,
        SPECIFICATIONS,
        PROBES,
        ESTIMATES,
    )
}


def greedy(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of greedy answers in the benchmark's own wording, by which a study is scored; drawn
    ones and other wordings stand beside them.
    """
    return rows[(rows.decoding == "greedy") & (rows.prompt_variant == "default")].reset_index(
        drop=True
    )
