"""`make bench`: what the scoring costs and how right it is, in one run on one machine, each figure
beside a peer's or a goal.

Times are CPU seconds of one thread; ratios are of two measurements made one after the other on the
same work, the least of several repeats.
"""

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from bench.harness import (
    LLAMA_8B,
    SHAPES,
    _matrix_rate,
    _wall,
    least_seconds,
    random_llama,
    row,
    texts_of,
    tokenizer_of,
)

from driftbook.study.methods import STUDIED

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


# ---- BBQ against lm-evaluation-harness
def bbq_speed(items: pd.DataFrame, batch_sizes: Sequence[int] = BATCH_SIZES) -> list[dict]:
    """CPU seconds for the same log-probabilities of the same texts, from text to numbers; the peer
    at its fastest batch size.
    """
    from driftbook.benchmarks import bbq

    rows, tokenizer = [], tokenizer_of(texts_of(items))
    fields = items.drop(columns="context").rename(columns={"passage": "context"}).to_dict("records")
    for shape, sizes in SHAPES.items():
        model = random_llama(sizes, tokenizer)
        for mode, goal in (("letters", 8.0), ("options", 3.0)):
            prompts = [bbq.TEMPLATES[mode].format(**one) for one in fields]
            options = [
                ["A", "B", "C"] if mode == "letters" else [one["ans0"], one["ans1"], one["ans2"]]
                for one in fields
            ]
            ours, found = least_seconds(_own, model, tokenizer, prompts, options)
            few = (model, tokenizer, prompts[:90], options[:90])
            pilot = {size: least_seconds(_peer, *few, size, repeats=1)[0] for size in batch_sizes}
            best = min(pilot, key=pilot.get)
            asked = (model, tokenizer, prompts, options, best)
            peer, expected = least_seconds(_peer, *asked, repeats=2)
            setting, n = f"{mode}, {shape}", len(items)
            name = f"BBQ, {n} items: times faster than lm-evaluation-harness (batch {best})"
            rows.append(row(name, setting, peer / ours, goal, "CPU s", ours, peer))
            gap, name = np.abs(found - expected).max(), "largest difference of a log-likelihood"
            rows.append(row(name, setting, gap, 1e-4, "nats", least=False))
            same = (found.argmax(1) == expected.argmax(1)).mean()
            rows.append(row("same most probable option", setting, same, 1.0, "share"))
    return rows


def _own(model, tokenizer, prompts: list[str], options: list[list[str]]) -> np.ndarray:
    from driftbook.models.scoring import Scorer

    scorer = Scorer(model, tokenizer)
    return scorer.choices(scorer.ask(prompts), options)


def _peer(
    model, tokenizer, prompts: list[str], options: list[list[str]], batch_size: int
) -> np.ndarray:
    """The same by lm-evaluation-harness, of prompts in the chat template."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": one}], tokenize=False, add_generation_prompt=True
        )
        for one in prompts
    ]
    return peer_scores(model, tokenizer, texts, options, batch_size)


def peer_scores(
    model, tokenizer, texts: list[str], options: list[list[str]], batch_size: int
) -> np.ndarray:
    """Log-probabilities [n, k] of k options after each text by lm-evaluation-harness's own model
    class (Gao et al.), which computes each text once where options are single tokens.
    """
    import logging

    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    peer = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        device=str(model.device),
        max_length=4_096,
    )
    asked = [
        Instance(
            request_type="loglikelihood",
            doc={},
            arguments=(text, option),
            idx=i,
            metadata=("bbq", 0, 1),
        )
        for text, row_ in zip(texts, options, strict=True)
        for i, option in enumerate(row_)
    ]
    return np.array([value for value, _ in peer.loglikelihood(asked, disable_tqdm=True)]).reshape(
        len(texts), -1
    )


# ---- generation
def generation(
    items: pd.DataFrame, n: int = 64, max_new_tokens: int = 48, batch: int = 32
) -> list[dict]:
    """Greedy answers of each method in batches and one by one, each answer of its full length."""
    from driftbook.models import adapters
    from driftbook.models.scoring import Scorer

    tokenizer = tokenizer_of(texts_of(items))
    model = random_llama(SHAPES["vocabulary of 32,000"], tokenizer)
    model.generation_config.eos_token_id = None
    tokenizer.eos_token_id = (
        len(tokenizer) - 1
    )  # a token like any other, so that answers seldom end early
    rows = []
    for method in STUDIED:
        with (
            tempfile.TemporaryDirectory() as scratch,
            adapters.attached(model, saved_adapter(model, method, 0, Path(scratch))) as variant,
        ):
            scorer = Scorer(variant, tokenizer)
            contexts = scorer.ask([str(passage) for passage in items.passage[:n]])

            together, first = least_seconds(
                _answers, scorer, contexts, max_new_tokens, batch, repeats=2
            )
            alone, second = least_seconds(_answers, scorer, contexts, max_new_tokens, 1, repeats=1)
        rows.append(
            row(
                f"generation: times faster at batch {batch} than one by one",
                method,
                alone / together,
                5.0,
                "CPU s",
                together,
                alone,
            )
        )
        rows.append(
            row(
                "same greedy text",
                f"{method}, batch {batch} against 1",
                np.mean([a == b for a, b in zip(first, second, strict=True)]),
                1.0,
                "share",
            )
        )
    return rows


def _answers(scorer, contexts: list[list[int]], max_new_tokens: int, size: int) -> list[str]:
    return [
        answer.text
        for i in range(0, len(contexts), size)
        for answer in scorer.generate(contexts[i : i + size], max_new_tokens)
    ]


def saved_adapter(model, method: str, seed: int, folder: Path) -> Path:
    """A saved adapter with random weights."""
    import torch
    from peft import IA3Config, LoraConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

    from driftbook.models import adapters
    from driftbook.models.base_state import BaseState

    configs = {
        "lora": lambda: LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            lora_alpha=16,
            target_modules=["q_proj", "v_proj"],
            init_lora_weights=False,
        ),
        "ia3": lambda: IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["q_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            init_ia3_weights=False,
        ),
        "prompt_tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
        "p_tuning": lambda: PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=20, encoder_hidden_size=64
        ),
    }
    torch.manual_seed(seed)
    before = BaseState(model)
    adapters.save(get_peft_model(model, configs[method]()), folder)
    before.restore("an adapter")
    return folder


def many_adapters(items: pd.DataFrame, n: int = 16) -> list[dict]:
    """n adapters put on one base, one after the other, each scoring the items, against n times the
    forward passes of one.
    """
    from driftbook.models import adapters

    tokenizer = tokenizer_of(texts_of(items))
    model = random_llama(SHAPES["vocabulary of 8,192"], tokenizer)
    rows = []
    for method in ("lora", "prompt_tuning"):
        with tempfile.TemporaryDirectory() as scratch:
            folders = [
                saved_adapter(model, method, seed, Path(scratch, str(seed))) for seed in range(n)
            ]
            with adapters.attached(model, folders[0]) as variant:
                one = statistics.median(
                    least_seconds(_score, variant, tokenizer, items, repeats=1)[0] for _ in range(4)
                )
            every, _ = least_seconds(_score_each, model, folders, tokenizer, items, repeats=1)
        rows.append(
            row(
                f"{n} adapters of one base: cost against {n} x the forward passes of one",
                f"{method}, {len(items)} items",
                every / (n * one),
                1.1,
                "CPU s",
                every,
                n * one,
                least=False,
            )
        )
    return rows


def _score(variant, tokenizer, items: pd.DataFrame) -> None:
    from driftbook.benchmarks import bbq
    from driftbook.models.scoring import Scorer

    bbq.answers(items, Scorer(variant, tokenizer), "letters", "run")


def _score_each(model, folders: list[Path], tokenizer, items: pd.DataFrame) -> None:
    from driftbook.models import adapters

    for folder in folders:
        with adapters.attached(model, folder) as variant:
            _score(variant, tokenizer, items)


def intervals() -> list[dict]:
    """The least coverage of the 95 % intervals of BBQ's scores at 25 question families, by
    simulation.
    """
    from bench import bbq_coverage

    found = bbq_coverage.coverage(n_sets=2_000)
    return [
        row(
            "intervals of BBQ scores: coverage at 25 families",
            f"{score}, lowest of {len(part)} cells (mean {part.covered.mean() / 100:.3f})",
            part.covered.min() / 100,
            0.93,
            "share",
        )
        for score, part in found.groupby("score")
    ]


# ---- a GPU, where there is one
def gpu(
    items: pd.DataFrame,
    shape: dict = LLAMA_8B,
    dtype: str = "bfloat16",
    n_answers: int = 330,
    max_new_tokens: int = 500,
) -> list[dict]:
    """An 8B Llama of random weights: BBQ items, generated tokens and verdicts a second, share of
    the card's measured matrix rate, peak memory.
    """
    import torch

    from driftbook.models.scoring import Scorer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = tokenizer_of(texts_of(items))
    model = random_llama(shape, tokenizer, dtype, device)
    scorer, rate = Scorer(model, tokenizer), _matrix_rate(device, dtype)
    contexts = scorer.ask([f"{text} Answer with A, B or C." for text in texts_of(items)])
    wall, n = _wall(lambda: scorer.letters(contexts), device), len(items)
    flops = 2 * sum(p.numel() for p in model.parameters()) * sum(map(len, contexts))
    share = "share of the measured matrix rate, shared beginnings counted each time"
    found = [
        ("BBQ items a second by letters", f"{n} items", n / wall, 15_876 / 120, "1/s"),
        (share, "BBQ", flops / wall / rate, None, "share"),
    ]
    model.generation_config.eos_token_id = None
    asked = contexts[:n_answers]
    wall = _wall(lambda: scorer.generate(asked, max_new_tokens), device)
    setting = f"{len(asked)} answers of up to {max_new_tokens}"
    speed = len(asked) * max_new_tokens / wall
    found.append(("generated tokens a second", setting, speed, 330 * 500 / 60, "1/s"))
    pairs = [([*context, *context], [token]) for context in asked for token in (5, 6)]
    wall = _wall(lambda: scorer.token_logprobs(pairs), device)
    setting = f"{len(asked)} conversations"
    found.append(("verdicts a second", setting, len(asked) / wall, None, "1/s"))
    rows = [row(f"8B, bfloat16: {figure}", *rest) for figure, *rest in found]
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        name = "8B, bfloat16: peak memory"
        rows.append(row(name, "all of the above", peak, None, "GiB", least=False))
    return rows
