"""Whether scoring on real weights is the model's own: answers, BBQ items and long contexts of
SmolLM2 by itself and under each method's adapter, asked in batches and one by one, against
transformers' own `forward` and `generate` on a copy of the model, a sequence at a time.

    python -m bench.real_equality --answers 400 --items 300 --long 50
"""

import argparse
import copy
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from bench.harness import bbq_items, row, settings_of
from bench.real_model import MOST, STEM, asked, real_model

from driftbook.study.methods import PEFT_METHODS, STUDIED

TIE = 1e-4  # between the two largest logits: rounding decides which token is written
NEW_TOKENS = 24
SAID = 40  # the last tokens of a long context are scored
SPREAD = 0.1  # of the noise put on an adapter's weights
Ids = list[int]


# ---- what is asked
def safe_prompts(n: int) -> list[str]:
    """The first n safe prompts of XSTest, in turns of its types.

    Raises:
        ValueError: DRIFTBOOK_SHARED is not set.
    """
    if not (shared := os.environ.get("DRIFTBOOK_SHARED")):
        raise ValueError("set DRIFTBOOK_SHARED to the folder that has data/xstest")
    found = pd.read_csv(Path(shared) / "data" / "xstest" / "xstest_prompts.csv")
    safe = found[found.label.eq("safe")]
    turns = safe.groupby("type").cumcount().sort_values(kind="stable").index
    return safe.prompt.loc[turns].head(n).tolist()


def long_pairs(tokenizer: Any, items: pd.DataFrame, n: int, length: int) -> list[tuple[Ids, Ids]]:
    """n (context, continuation) of `length` tokens together, of BBQ's passages end to end: every
    other begins as the one before it does, so that batches share beginnings.
    """
    ids = tokenizer.encode(" ".join(items.passage), add_special_tokens=False)
    found = []
    for i in range(n):
        first = (i // 2 * length) % max(1, len(ids) - 2 * length)
        text = ids[first : first + length - SAID]
        last = first + length * (1 + i % 2) - SAID
        found.append((text, ids[last : last + SAID]))
    if any(len(context) + len(said) < length for context, said in found):
        raise ValueError(f"the items have {len(ids)} tokens, too few for contexts of {length}")
    return found


# ---- the adapters
def variants(model: Any) -> Iterator[tuple[str, Any, Path | None]]:
    """The base and each method: its name, PEFT's own model on a copy of the base, and the folder of
    its adapter, whose weights are far enough from their beginning to change what is written.
    """
    yield "base", model, None
    for seed, method in enumerate(STUDIED):
        made = _changed(copy.deepcopy(model), method, seed)
        with tempfile.TemporaryDirectory() as scratch:
            made.save_pretrained(scratch)
            yield method, made, Path(scratch)


def _changed(base: Any, method: str, seed: int) -> Any:
    """The base under a new adapter of the method, noise on each of its weights."""
    import peft
    import torch

    settings = settings_of(method)
    settings.pop("init", None)  # which driftbook reads, not PEFT
    config = getattr(peft, PEFT_METHODS[method].config)(task_type="CAUSAL_LM", **settings)
    torch.manual_seed(seed)
    made = peft.get_peft_model(base, config).eval()
    table = base.get_input_embeddings().weight
    with torch.no_grad():
        for value in made.parameters():
            if value.requires_grad:
                if method == "prompt_tuning":  # PEFT's own beginning is far from any token's
                    value.copy_(table[torch.randint(len(table), (len(value),))])
                value.add_(torch.randn_like(value) * SPREAD)
    return made


# ---- transformers' own
def own_tokens(model: Any, context: Ids, most: int) -> Ids:
    """What `generate` writes after a context, greedy and by itself."""
    import torch

    ids = torch.tensor([context], device=model.device)
    settings = {"do_sample": False, "max_new_tokens": most, "pad_token_id": 0}
    with torch.inference_mode():
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    return found[0].tolist()[len(context) :]


def own_logprobs(model: Any, context: Ids, said: Ids) -> np.ndarray:
    """Log-probabilities [vocabulary] before each token of what is said, by `forward`."""
    import torch

    ids = torch.tensor([context + said], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0]  # soft prompts stand before it
    return logits[-len(said) - 1 : -1].log_softmax(-1).numpy()


def own_choices(model: Any, tokenizer: Any, prompt: str, options: list[str]) -> list[float]:
    """Log-probabilities of the options after the prompt in the chat template and the stem."""
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + STEM
    context = tokenizer.encode(text, add_special_tokens=False)
    every = [
        tokenizer.encode(text + one, add_special_tokens=False)[len(context) :] for one in options
    ]
    if all(len(said) == 1 for said in every):
        (before,) = own_logprobs(model, context, every[0])
        return [float(before[said[0]]) for said in every]
    return [_total(own_logprobs(model, context, said), said) for said in every]


def _total(logprobs: np.ndarray, said: Ids) -> float:
    return float(logprobs[np.arange(len(said)), said].sum(dtype=float))


# ---- side by side
def rows(
    n_answers: int = 400,
    n_items: int = 300,
    n_long: int = 50,
    length: int = 2_000,
    methods: Sequence[str] = (),
) -> list[dict]:
    """A line of the bench for each figure of each variant, or of those named; the goals are texts
    that part only where two logits tie, and log-likelihoods that differ by at most MOST.
    """
    from driftbook.models import adapters
    from driftbook.models.scoring import Scorer

    base, items, found, first = real_model(), bbq_items(max(n_items, 300)), [], None
    contexts = Scorer(base.model, base.tokenizer).ask(safe_prompts(n_answers))
    pairs = long_pairs(base.tokenizer, items, n_long, length)
    for name, own, folder in variants(base.model):
        if methods and name not in methods:
            continue
        with adapters.attached(base.model, folder) as variant:
            scorer = Scorer(variant, base.tokenizer)
            written, lines = answer_rows(name, scorer, own, contexts)
            if folder is None:
                first = written
            elif first is not None:  # the base was asked too
                changed = sum(a != b for a, b in zip(written, first, strict=True))
                lines.append(row("answers that the adapter changes", name, changed, 1, "answers"))
            lines += choice_rows(name, scorer, own, items.iloc[_spread(len(items), n_items)])
            lines += long_rows(name, scorer, own, pairs)
        print(pd.DataFrame(lines)[["figure", "setting", "value"]].to_string(), flush=True)
        found += lines
    return found


def _spread(total: int, n: int) -> np.ndarray:
    """n of the numbers below a total, evenly apart."""
    return np.linspace(0, total - 1, n).astype(int)


def answer_rows(
    name: str, scorer: Any, own: Any, contexts: list[Ids]
) -> tuple[list[str], list[dict]]:
    """transformers' answers, and how many of driftbook's are the same; of those that are not, how
    many part where the two largest logits do not tie.
    """
    tokens = [own_tokens(own, context, NEW_TOKENS) for context in contexts]
    texts = [scorer.tokenizer.decode(one, skip_special_tokens=True).strip() for one in tokens]
    ends = {own.generation_config.eos_token_id}
    sizes = [len(one) - (one[-1] in ends) for one in tokens]
    expected = list(zip(texts, sizes, strict=True))
    found = []
    for way, answers in _both(lambda some: scorer.generate(some, NEW_TOKENS), contexts):
        written = [(one.text, one.n_tokens) for one in answers]
        parted = [i for i, one in enumerate(written) if one != expected[i]]
        gaps = [_gap(own, scorer.tokenizer, contexts[i], tokens[i], answers[i]) for i in parted]
        setting, n = f"{name}, {way}", len(contexts)
        figure = f"greedy texts of {n} that are transformers'"
        found.append(row(figure, setting, n - len(parted), None, "answers"))
        apart = sum(gap >= TIE for gap in gaps)
        figure = f"texts that part where no two logits tie within {TIE}"
        found.append(row(figure, setting, apart, 0, "answers", least=False))
    return texts, found


def _gap(own: Any, tokenizer: Any, context: Ids, tokens: Ids, answer: Any) -> float:
    """How far apart the two largest logits are where an answer parts from transformers' tokens."""
    same = 0
    while same < len(tokens) - 1 and answer.text.startswith(
        tokenizer.decode(tokens[: same + 1], skip_special_tokens=True).strip()
    ):
        same += 1
    second, largest = np.sort(own_logprobs(own, context, tokens)[same])[-2:]
    return float(largest - second)


def choice_rows(name: str, scorer: Any, own: Any, items: pd.DataFrame) -> list[dict]:
    """How far BBQ's log-probabilities are from transformers', by letters and by options."""
    found = []
    for mode in ("letters", "options"):
        prompts, options = asked(items, mode)
        given = list(zip(scorer.ask(prompts), options, strict=True))
        expected = np.array(
            [own_choices(own, scorer.tokenizer, *one) for one in zip(prompts, options, strict=True)]
        )

        def work(some: list) -> list:
            return list(scorer.choices(*map(list, zip(*some, strict=True)), STEM))

        for way, values in _both(work, given):
            setting = f"{name}, BBQ by {mode}, {len(given)} items, {way}"
            found += _nats(setting, np.array(values), expected)
    return found


def long_rows(name: str, scorer: Any, own: Any, pairs: list[tuple[Ids, Ids]]) -> list[dict]:
    """How far the log-probabilities of single tokens after long contexts are from transformers'."""
    expected = np.array(
        [own_logprobs(own, *pair)[np.arange(len(pair[1])), pair[1]] for pair in pairs]
    )
    found = []
    for way, values in _both(scorer.token_logprobs, pairs):
        setting = f"{name}, {len(pairs)} contexts of {sum(map(len, pairs[0]))} tokens, {way}"
        found += _nats(setting, np.array(values), expected)
    return found


def _nats(setting: str, values: np.ndarray, expected: np.ndarray) -> list[dict]:
    gap = np.abs(values - expected).max()
    figure = "largest difference from transformers' log-likelihood"
    return [row(figure, setting, gap, MOST, "nats", least=False)]


def _both(work: Callable[[list], list], given: list) -> Iterator[tuple[str, list]]:
    """What work gives of all at once, and of each by itself."""
    yield "together", work(given)
    yield "one by one", [one for some in given for one in work([some])]


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--answers", type=int, default=400)
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--long", type=int, default=50)
    parser.add_argument("--length", type=int, default=2_000, help="tokens of a long context")
    parser.add_argument("--only", nargs="*", default=(), help="base, or methods; default all")
    given = parser.parse_args()
    found = rows(given.answers, given.items, given.long, given.length, given.only)
    missed = pd.DataFrame(found)[lambda table: table.met.eq(False)]
    print(f"{len(missed)} of {len(found)} figures miss their goal")
    raise SystemExit(int(len(missed) > 0))
