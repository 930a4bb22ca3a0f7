"""How much of the machine's rate each stage reaches on real weights of 135 M parameters, and on
what the rest of its time goes: what to cut next.

Operations are those of the matrix products that a stage needs (batch/costing.py counts them for the
plan), padding left out; the rate is that of square products, measured in the same run; seconds are
those of the processor, one thread.
"""

from collections.abc import Callable
from typing import Any

import pandas as pd
from bench import harness
from bench.harness import least_seconds, row
from bench.real_model import NAME, PRODUCTS, asked, counted, machine_rate, real_model

N = 16  # examples, pairs, prompts
LENGTH = 192  # tokens of an example
NEW = 24  # tokens of an answer
GOAL = 0.6  # of the machine's rate, in training
PARTS = {  # of a profile's operations, by a word in their names
    "attention": ("attention",),
    "matrix products": tuple(PRODUCTS),
    "optimiser": ("adam", "Optimizer", "foreach", "clip_grad"),
    "copies and padding": ("copy_", "cat", "index", "gather", "clone", "contiguous", "pad"),
    "random numbers of dropout": ("dropout", "bernoulli"),
}


def stage_rows(items: pd.DataFrame) -> list[dict]:
    """A line for each stage, and for the largest parts of its time."""
    found = [*_training("sft"), *_training("dpo")]
    return [*found, *_reading(items), *_writing(items)]


def _training(objective: str) -> list[dict]:
    from driftbook.batch.costing import operations
    from driftbook.batch.lengths import Amount
    from driftbook.batch.sizes import size_of
    from driftbook.training import examples

    base, this = real_model(), harness.study(N, ("lora",), LENGTH)
    prepared = examples.prepare(objective, base, this)
    made = [one for one in this.of_base(next(iter(this.bases))) if one.objective == objective]
    parts = [
        (one.chosen, one.rejected) if objective == "dpo" else (one,) for one in prepared.examples
    ]
    shared = [int(both[0].counted[0]) if len(both) > 1 else 0 for both in parts]
    tokens = sum(len(one.ids) for both in parts for one in both) - sum(shared)
    n_counted = sum(len(one.counted) for both in parts for one in both)
    amount = Amount(tokens, n_counted, tokens / len(parts))
    needed = operations(size_of(base.model.config.to_dict()), amount, 4)
    name = f"training, {objective.upper()} by LoRA, {len(parts)} examples of chat"
    work = (harness.fit_once, made[0], base, prepared, this)
    return _lines(name, needed, GOAL, *work)


def _reading(items: pd.DataFrame) -> list[dict]:
    from driftbook.models.scoring import Scorer

    base = real_model()
    scorer = Scorer(base.model, base.tokenizer)
    prompts, options = asked(items, "letters")
    work = (scorer.choices, scorer.ask(prompts), options, scorer.lead)
    return _lines(
        f"reading, {len(items)} BBQ items by letters", _counted(scorer, *work), None, *work
    )


def _writing(items: pd.DataFrame) -> list[dict]:
    from driftbook.models.scoring import Scorer

    base = real_model()
    scorer = Scorer(base.model, base.tokenizer)
    questions = list(items.question.head(N))
    work = (scorer.generate, scorer.ask(questions), NEW)
    name = f"writing, {len(questions)} answers of {NEW} tokens"
    return _lines(name, _counted(scorer, *work), None, *work)


def _counted(scorer: Any, work: Callable, *given: Any) -> float:
    with counted(scorer.model) as operations:
        work(*given)
    return sum(operations.values())


def _lines(name: str, needed: float, goal: float | None, work: Callable, *given: Any) -> list[dict]:
    """The share of the machine's rate, and the two largest parts of the time that are no matrix
    products.
    """
    rate = machine_rate()
    seconds, _ = least_seconds(work, *given, repeats=2)
    shares = time_by_part(work, *given)
    reached = f"{name}: share of the machine's {rate / 1e9:.0f} GFLOP/s"
    found = [row(reached, NAME, needed / seconds / rate, goal, "share")]
    found.append(
        row(f"{name}: time in matrix products", NAME, shares.pop("matrix products"), None, "share")
    )
    for part, share in list(shares.items())[:2]:
        found.append(row(f"{name}: largest waste, time in {part}", NAME, share, None, "share"))
    return found


def time_by_part(work: Callable, *given: Any) -> dict[str, float]:
    """The share of the processor's time by PARTS, largest first, all else under `the rest`."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work(*given)
    spent = dict.fromkeys([*PARTS, "the rest"], 0.0)
    for one in profiled.key_averages():
        part = next(
            (part for part, words in PARTS.items() if any(word in one.key for word in words)),
            "the rest",
        )
        spent[part] += one.self_cpu_time_total
    whole = sum(spent.values())
    return {part: spent[part] / whole for part in sorted(spent, key=spent.get, reverse=True)}
