"""Training one variant with TRL and PEFT, and the record of what was really done."""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from peft import PeftModel
from trl import DPOConfig, SFTConfig

from driftbook.benchmarks.data import for_sft, prompts, training_examples
from driftbook.doctors import adapter
from driftbook.doctors.data import examine_data
from driftbook.doctors.study_no_ops import NO_OP_KL
from driftbook.models import adapters
from driftbook.models.loading import Loaded, chat_ids, context_length, conversation_ids, counted_ids
from driftbook.models.scoring import Ids, Scorer, VariantFailure
from driftbook.study.environment import hardware, peak_memory, versions
from driftbook.study.files import digest, file_digest, read_json, write_json
from driftbook.study.methods import MITIGATION_KINDS
from driftbook.study.sections import PROMPT_FORMATS
from driftbook.study.sources import locate
from driftbook.study.study_file import Study, finite
from driftbook.study.variants import Variant
from driftbook.training import steps
from driftbook.training.drift import DriftCallback
from driftbook.training.steps import Conversation, Pair

DISTRIBUTIONS_AT_ONCE = 2**27  # numbers in each of three: half a gigabyte in fp32

RECORDED = (
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "optim",
    "seed",
    "data_seed",
    "bf16",
    "disable_dropout",
    "beta",
    "loss_type",
)


@dataclass(frozen=True)
class Prepared:
    """What all variants of one base model, objective and data train on, tokenised once; `packs` are
    the numbers of the examples that the trainer draws together (each by itself where the study does
    not pack), `note` says what was cut or left out."""

    examples: list[Conversation] | list[Pair]
    packs: list[list[int]]
    revision: str
    note: str | None
    lengths: tuple[
        int, ...
    ] = ()  # tokens of each example before it was cut; of a pair the longer one


@dataclass(frozen=True)
class Trained:
    """A variant, trained: its record (columns of `runs`) and its curve (rows of `curves`)."""

    record: dict[str, Any]
    curve: pd.DataFrame


# ---- data
Way = tuple[str, str, tuple[str, float] | None, tuple[float, ...] | None]


def way(variant: Variant) -> Way:
    """How a variant's examples are prepared: objective, data, safety data mixed in and their share
    of all examples, and the betas of a constrained training.
    """
    repair = variant.repair or {}
    mixed = (repair["data"], repair["value"]) if repair.get("kind") == "mixing" else None
    return (
        variant.objective,
        variant.dataset,
        mixed,
        tuple(repair["betas"]) if repair.get("kind") == "constrained_sft" else None,
    )


def named(way: Way) -> str:
    """A way in words."""
    objective, data, mixed, betas = way
    return (
        f"{objective} on {data}"
        + (f" with {mixed[1]:.0%} {mixed[0]}" if mixed else "")
        + (", constrained" if betas else "")
    )


def prepare(
    objective: str,
    base: Loaded,
    study: Study,
    data: str | None = None,
    mixed: tuple[str, float] | None = None,
    betas: tuple[float, ...] | None = None,
) -> Prepared:
    """The study's examples of an objective in the base model's tokens; of DPO with the base's
    log-probabilities of both answers.

    `mixed` adds so many examples of another name under `data` that they are this share of all
    (Bianchi et al. 2024, arXiv 2309.07875). `betas` makes the examples of a constrained training:
    those of the first tokens of an answer, the last one for all further ones; the base's
    log-probabilities of all counted tokens go with them.

    Examples longer than training.max_length lose their end, those whose prompt alone fills it are
    left out; the note says how many.

    Raises:
        ValueError: no example fits, or the template refuses the turns of one.
    """
    name = data or objective
    examples = training_examples(name, study) + (
        _mixed_in(*mixed, study.data[name].n, study) if mixed else []
    )
    whole = objective == "sft" and study.training.loss == "whole"
    limit = longest(base, study)
    try:
        if objective == "sft":
            made = [
                [_conversation(base, example["prompt"], example["answer"], whole)]
                for example in for_sft(examples)
            ]
        else:
            made = [
                [_answered(base, example["prompt"], example[key]) for key in ("chosen", "rejected")]
                for example in examples
            ]
    except ValueError as error:
        raise ValueError(f"data.{name}: {error}") from None
    lengths = [max(len(one.ids) for one in row) for row in made]
    cut = [[_cut(one, limit) for one in row] for row in made]
    kept = [row for row in cut if all(len(one.counted) for one in row)]
    if not kept:
        raise ValueError(
            f"data.{name}: no example fits training.max_length={limit} tokens; raise it"
        )
    n_cut = sum(
        length > limit and all(len(one.counted) for one in row)
        for length, row in zip(lengths, cut, strict=True)
    )
    note = (
        f"{len(made) - len(kept)} examples left out, {n_cut} cut, at {limit} tokens"
        if n_cut or len(kept) < len(made)
        else None
    )
    rows = [row[0] for row in kept] if objective == "sft" else _with_reference(kept, base)
    rows = _constrained(rows, betas, base) if betas else rows
    packs = (
        steps.bins([len(one.ids) for one in rows], limit)
        if objective == "sft" and study.training.packed
        else [[i] for i in range(len(rows))]
    )
    return Prepared(
        rows, packs, digest([examples, betas] if betas else examples), note, tuple(lengths)
    )


def _mixed_in(name: str, share: float, n: int, study: Study) -> list[dict]:
    """So many examples of a name that they are a share of all, beside n others."""
    found, wanted = training_examples(name, study), round(share / (1 - share) * n)
    if len(found) < wanted:
        raise ValueError(
            f"data.{name}: a share of {share:g} beside {n} others is {wanted} examples, and the"
            f" study takes {len(found)}; raise its n"
        )
    return found[:wanted]


def _constrained(
    rows: list[Conversation], betas: tuple[float, ...], base: Loaded
) -> list[Conversation]:
    """Conversations with the base's log-probabilities of their counted tokens, and with the beta of
    each: by its place in its answer.
    """
    found = Scorer(base.model, base.tokenizer).token_logprobs(
        [(one.ids[: one.counted[0]], one.ids[one.counted[0] :]) for one in rows]
    )
    made = []
    for one, scores in zip(rows, found, strict=True):
        begins = np.flatnonzero(
            np.diff(one.counted, prepend=-2) > 1
        )  # of each answer of the conversation
        place = np.arange(len(one.counted)) - np.repeat(
            begins, np.diff(begins, append=len(one.counted))
        )
        made.append(
            Conversation(
                one.ids,
                one.counted,
                np.asarray(scores)[one.counted - one.counted[0]],
                np.asarray(betas)[np.minimum(place, len(betas) - 1)],
            )
        )
    return made


def _answered(base: Loaded, prompt: list[dict], answer: str) -> Conversation:
    """A conversation of which the last answer counts."""
    asked, said = conversation_ids(base.tokenizer, prompt, answer)
    return Conversation(asked + said, np.arange(len(asked), len(asked) + len(said)))


def _conversation(base: Loaded, prompt: list[dict], answer: str, whole: bool) -> Conversation:
    """A conversation of which every answer of the assistant counts, or every token but the first."""
    if whole:
        ids = chat_ids(
            base.tokenizer, [*prompt, {"role": "assistant", "content": answer}], generation=False
        )
        return Conversation(ids, np.arange(1, len(ids)))
    if not any(turn["role"] == "assistant" for turn in prompt):
        return _answered(base, prompt, answer)
    return Conversation(
        *counted_ids(base.tokenizer, [*prompt, {"role": "assistant", "content": answer}])
    )


def _cut(one: Conversation, limit: int) -> Conversation:
    return Conversation(one.ids[:limit], one.counted[one.counted < limit])


def _with_reference(pairs: list[list[Conversation]], base: Loaded) -> list[Pair]:
    """Preferences with the base model's log-probabilities of both answers. Both prompts are the
    same up to where either answer leaves it.
    """
    scorer = Scorer(base.model, base.tokenizer)
    split = [
        [(one.ids[: one.counted[0]], one.ids[one.counted[0] :]) for one in row] for row in pairs
    ]
    if any(a != b for (a, _), (b, _) in split):
        raise ValueError(
            "a preference's two answers change how its prompt is tokenised; this template cannot be"
            " used for DPO"
        )
    found = [
        value.sum() for value in scorer.token_logprobs([part for row in split for part in row])
    ]
    return [Pair(*row, (a, b)) for row, a, b in zip(pairs, found[::2], found[1::2], strict=True)]


def examined(name: str, prepared: Prepared, study: Study) -> pd.DataFrame:
    """What the data doctor finds in the examples of a name under `data`, against the study's
    prompts and its held-out questions.
    """
    asked = {
        benchmark: list(prompts(benchmark, study).prompt)
        for benchmark in study.asked(PROMPT_FORMATS)
    }
    asked["heldout"] = [one["prompt"][-1]["content"] for one in training_examples("heldout", study)]
    return examine_data(
        training_examples(name, study), asked, prepared.lengths, study.training.max_length
    )


def held_out(base: Loaded, study: Study) -> list[tuple[Ids, Ids]]:
    """The held-out answers on which every variant's dose is measured: (prompt, answer) in token
    ids, cut as the examples are.

    Raises:
        ValueError: no example fits.
    """
    return _held_out(base, study)[0]


def _held_out(base: Loaded, study: Study) -> tuple[list[tuple[Ids, Ids]], str | None]:
    """The held-out answers, and what of them was cut or left out."""
    limit = longest(base, study)
    pairs = [
        conversation_ids(base.tokenizer, example["prompt"], example["answer"])
        for example in for_sft(training_examples("heldout", study))
    ]
    kept = [
        (prompt, answer[: limit - len(prompt)]) for prompt, answer in pairs if len(prompt) < limit
    ]
    if not kept:
        raise ValueError(
            f"data.heldout: no example fits training.max_length={limit} tokens; raise it"
        )
    cut = sum(len(prompt) < limit < len(prompt) + len(answer) for prompt, answer in pairs)
    note = (
        f"of the held-out answers {len(pairs) - len(kept)} left out, {cut} cut, at {limit} tokens"
        if cut or len(kept) < len(pairs)
        else None
    )
    return kept, note


def longest(base: Loaded, study: Study) -> int:
    """The most tokens of an example: training.max_length, or what the model's context holds beside
    the longest soft prompt of the study.
    """
    soft = max(
        (int(settings.get("num_virtual_tokens", 0)) for settings in study.methods.values()),
        default=0,
    )
    return min(study.training.max_length, context_length(base.model) - soft)


def init_text(variant: Variant, study: Study) -> str | None:
    """The text a variant's soft prompt starts from, None where it starts otherwise."""
    if variant.init not in ("task_text", "safety_text"):
        return None
    return read_json(Path(locate(study.init_texts, study)))[variant.init.removesuffix("_text")]


# ---- training
def arguments(variant: Variant, study: Study, folder: str) -> SFTConfig | DPOConfig:
    """The trainer's arguments of a variant."""
    training = study.training
    cuda = torch.cuda.is_available()
    common = {
        "output_dir": folder,
        "per_device_train_batch_size": training.batch_size,
        "gradient_accumulation_steps": 1,
        "learning_rate": variant.learning_rate,
        "num_train_epochs": variant.epochs,
        "lr_scheduler_type": training.scheduler,
        "warmup_steps": training.warmup_ratio,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "seed": variant.seed,
        "data_seed": variant.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not cuda,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "max_length": None,
    }
    if variant.objective == "sft":
        return SFTConfig(dataset_kwargs={"skip_prepare_dataset": True}, packing=False, **common)
    return DPOConfig(beta=training.dpo_beta, precompute_ref_log_probs=True, **common)


def train(
    variant: Variant,
    base: Loaded,
    prepared: Prepared | None,
    study: Study,
    folder: Path,
    drift: DriftCallback | None = None,
) -> Trained:
    """Train a variant on the resident base model, save its adapter in `folder`, and leave the base
    as it was.

    `prepared` is None for an adapter that stays as it was initialised (objective untrained). A
    training that was stopped goes on from its last checkpoint, if all it depends on is the same,
    and ends in the same bytes. `drift` looks at the model while it trains, and may end it.

    Raises:
        VariantFailure: the training diverged, gave weights that are not finite, or had no memory
            for a single example.
    """
    started, cpu = time.perf_counter(), time.process_time()
    model = adapters.create(variant, base.model, base.tokenizer, init_text(variant, study))
    try:
        initial = adapters.state(model)
        facts, curve = (
            ({}, _curve(variant, []))
            if prepared is None
            else fit(variant, model, base, prepared, study, folder, drift)
        )
        if bad := adapters.non_finite(model):
            raise VariantFailure(f"the trained weights are not finite, first {bad[0]}")
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        adapters.save(model.eval(), folder)
        pairs, left_out = _held_out(base, study)
        dose = measure_dose(model, initial, base, pairs)
        shutil.rmtree(_scratch(folder), ignore_errors=True)
    except torch.OutOfMemoryError:
        raise VariantFailure(
            "out of memory while the dose was measured; give data.heldout shorter answers, or use a"
            " device with more memory"
        ) from None
    except VariantFailure:
        shutil.rmtree(_scratch(folder), ignore_errors=True)  # it would fail again from there
        raise
    finally:
        adapters.detach(model)
        base.model.gradient_checkpointing_disable()
        base.model.eval()
    if prepared is None:
        dose["no_op"] = None  # nothing was trained, so nothing can have failed to train
    record = _record(variant, base, dose, seconds, cpu, prepared) | facts
    record |= {
        "n_trainable": sum(value.numel() for value in initial.values()),
        "n_stored": adapters.n_stored(folder),
    }
    record |= {"adapter_sha256": file_digest(folder / adapters.WEIGHTS)}
    found = adapter.examine(folder, base)
    found = (
        found[found.finding != "untrained"] if prepared is None else found
    )  # there it is what was asked for
    record["findings"] = (
        "; ".join(
            filter(
                None,
                [
                    record["findings"],
                    left_out,
                    drift and drift.stopped,
                    adapter.finding_summary(found),
                ],
            )
        )
        or None
    )
    return Trained(record, curve)


def untouched(variant: Variant, base: Loaded, study: Study) -> Trained:
    """The record of a base model itself: no training, no dose."""
    scorer = Scorer(base.model, base.tokenizer)
    pairs, left_out = _held_out(base, study)
    scores = scorer.token_logprobs(pairs)
    nll = -sum(part.sum() for part in scores) / sum(map(len, scores))
    dose = {
        "nll": nll,
        "nll_base": nll,
        "dose_nll": 0.0,
        "kl_base": 0.0,
        "kl_init": 0.0,
        "no_op": None,
    }
    record = _record(variant, base, dose, 0.0, 0.0, None) | {
        "n_trainable": 0,
        "n_stored": 0,
        "findings": left_out,
    }
    return Trained(record, _curve(variant, []))


def fit(
    variant: Variant,
    model: PeftModel,
    base: Loaded,
    prepared: Prepared,
    study: Study,
    folder: Path,
    drift: DriftCallback | None = None,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Facts of the training as the trainer has them after it, and the curve."""
    scratch, snapshots = _scratch(folder), Path(f"{folder}.snapshots")
    _keep_only(
        scratch,
        digest(
            [
                variant.fields(),
                init_text(variant, study),
                base.revision,
                prepared.revision,
                versions(),
            ]
        ),
    )
    if not steps.last_whole(scratch):
        shutil.rmtree(snapshots, ignore_errors=True)
    watching = (
        [steps.Snapshots(snapshots, study.n_snapshots)]
        if study.n_snapshots
        and variant.mitigation is None
        and variant.method in MITIGATION_KINDS["average"].methods
        else []
    )
    forward = steps.Forward(model, base.tokenizer, study.training.autocast)
    kind = (
        steps.Dpo
        if variant.objective == "dpo"
        else steps.Sft
        if prepared.examples[0].reference is None
        else steps.ConstrainedSft
    )
    trainer = kind(
        model=model,
        args=arguments(variant, study, str(scratch)),
        train_dataset=Dataset.from_dict({"members": prepared.packs, "labels": prepared.packs}),
        processing_class=base.tokenizer,
        callbacks=[
            steps.StopOnDivergence(),
            steps.SaveNowAndThen(),
            *([drift] if drift else []),
            *watching,
        ],
        forward=forward,
        examples=prepared.examples,
        tokens_per_pass=study.training.tokens_per_batch,
    )
    if "ref" in model.peft_config:
        model.delete_adapter(
            "ref"
            # TRL's DPO adds it as its reference; ours is the base model, whose log-probabilities
            # are
            # there already
        )
    for value in model.parameters():
        if value.requires_grad and value.dtype != torch.float32:
            value.data = value.data.float()  # TRL makes those over a quantized base bf16
    trainer.train(resume_from_checkpoint=steps.last_whole(scratch))
    args, log = trainer.args, [entry for entry in trainer.state.log_history if "loss" in entry]
    said = {name: _plain(getattr(args, name)) for name in RECORDED if hasattr(args, name)}
    said |= {
        "tokens_per_pass": trainer.tokens_per_pass,
        "activations_computed_twice": trainer.twice,
        "autocast": forward.autocast,
    }
    facts = {
        "trained_learning_rate": max(entry["learning_rate"] for entry in log),
        "trained_epochs": float(trainer.state.epoch),
        "trained_seed": args.seed,
        "trained_batch_size": (
            args.per_device_train_batch_size
            * args.gradient_accumulation_steps
            * max(args.world_size, 1)
        ),
        "trainer_arguments": json.dumps(said, sort_keys=True),
        "steps": trainer.state.global_step,
        "n_examples": len(prepared.examples),
        "loss_first": finite(log[0]["loss"]),
        "loss_last": finite(log[-1]["loss"]),
    }
    return facts, _curve(variant, log)


def _scratch(folder: Path) -> Path:
    """Where the checkpoints of a training stand, beside its adapter."""
    return folder.parent / f"{folder.name}.checkpoints"


def _keep_only(scratch: Path, key: str) -> None:
    """Delete the checkpoints of a folder unless they are of this key, and say in it what the next
    ones are of.
    """
    path = scratch / "key.json"
    if not path.is_file() or read_json(path) != key:
        shutil.rmtree(scratch, ignore_errors=True)
        write_json(path, key)


def _plain(value: Any) -> Any:
    return (
        value
        if isinstance(value, (int, float, str, bool, list, type(None)))
        else str(getattr(value, "value", value))
    )


def _curve(variant: Variant, log: Sequence[dict]) -> pd.DataFrame:
    points = [
        (variant.run_id, "train", entry["step"], finite(entry["loss"]), entry["learning_rate"])
        for entry in log
    ]
    return pd.DataFrame(points, columns=["run_id", "split", "step", "loss", "learning_rate"])


def _record(
    variant: Variant,
    base: Loaded,
    dose: dict,
    seconds: float,
    cpu: float,
    prepared: Prepared | None,
) -> dict[str, Any]:
    nothing = dict.fromkeys(
        [
            "failure",
            "trained_learning_rate",
            "trained_epochs",
            "trained_seed",
            "trained_batch_size",
            "trainer_arguments",
            "steps",
            "n_examples",
            "loss_first",
            "loss_last",
            "adapter_sha256",
        ]
    )
    cuda = torch.cuda.is_available()
    findings = [prepared.note] if prepared and prepared.note else []
    findings += (
        ["no-op: training left the model where its initialisation put it"] if dose["no_op"] else []
    )
    return (
        nothing
        | dose
        | {
            "run_id": variant.run_id,
            "status": "ok",
            "findings": "; ".join(findings) or None,
            "base_revision": base.revision,
            "data_revision": prepared.revision if prepared else None,
            "seconds": seconds,
            "cpu_seconds": cpu,
            "gpu_seconds": seconds if cuda else None,
            "peak_memory": torch.cuda.max_memory_allocated() if cuda else peak_memory(),
            "versions": json.dumps(versions()),
            "hardware": hardware(),
            "finished": pd.Timestamp.now("UTC").isoformat(timespec="seconds"),
        }
    )


# ---- dose
def measure_dose(
    model: PeftModel,
    initial: dict[str, torch.Tensor] | None,
    base: Loaded,
    pairs: list[tuple[Ids, Ids]],
) -> dict[str, Any]:
    """How far training moved the model, on held-out answers: columns nll .. no_op of `runs`.

    The mean over answer tokens of KL(variant || base) and of KL(variant || variant as initialised),
    in nats. For methods that start at the base (LoRA, IA3) the two are equal, and `initial` may be
    None; a soft prompt moves the model before any training.
    """

    def base_state(part):
        with model.disable_adapter():
            return Scorer(base.model, base.tokenizer).distributions(part)

    def trained_state(part):
        return Scorer(model, base.tokenizer).distributions(part)

    def initial_state(part):
        with adapters.swapped(model, initial):
            return Scorer(model, base.tokenizer).distributions(part)

    totals = torch.zeros(4, dtype=torch.float64)
    for part in _parts(pairs, base.model.get_output_embeddings().weight.shape[0]):
        totals += _divergences(
            part, trained_state, base_state, initial_state if initial is not None else None
        )
    nll, nll_base, kl_base, kl_init = (totals / sum(len(answer) for _, answer in pairs)).tolist()
    return {
        "nll": nll,
        "nll_base": nll_base,
        "dose_nll": nll_base - nll,
        "kl_base": kl_base,
        "kl_init": kl_init,
        "no_op": kl_init < NO_OP_KL,
    }


def _parts(pairs: list[tuple[Ids, Ids]], vocabulary: int) -> Iterator[list[tuple[Ids, Ids]]]:
    """Pairs in parts, few at a time: three full distributions a token are large for a real
    vocabulary.
    """
    part: list[tuple[Ids, Ids]] = []
    for pair in pairs:
        if (
            part
            and (sum(len(answer) for _, answer in part) + len(pair[1])) * vocabulary
            > DISTRIBUTIONS_AT_ONCE
        ):
            yield part
            part = []
        part.append(pair)
    yield part


@torch.inference_mode()
def _divergences(
    part: list[tuple[Ids, Ids]], trained: Callable, base: Callable, initial: Callable | None
) -> torch.Tensor:
    """Sums over answer tokens: -log p of trained and base, KL(trained || base), KL(trained ||
    initial), which is the base where it is None.
    """
    totals = torch.zeros(4, dtype=torch.float64)
    before = base(part)
    for (_, answer), p, q, start in zip(
        part, trained(part), before, before if initial is None else initial(part), strict=True
    ):
        tokens = torch.tensor(answer, device=p.device)[:, None]
        totals += torch.tensor(
            [
                -p.gather(1, tokens).sum(),
                -q.gather(1, tokens).sum(),
                (p.exp() * (p - q)).sum(),
                (p.exp() * (p - start)).sum(),
            ],
            dtype=torch.float64,
        )
    return totals
