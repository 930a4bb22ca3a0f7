"""Made-up audits for tests: scores as an audit asks them, and records as `audit.json` has them."""

import random
from typing import Any

import numpy as np
import pandas as pd

from driftbook.analyses import audit
from driftbook.analyses.audit import AREAS, AUDIT_FORMAT, FALL, item_change
from driftbook.stats.harm import DETECTOR
from driftbook.stats.words import BETTER, NO_WORSE, WORSE

MANY = 100
LETTERS = ("bias_ambiguous", "accuracy")  # areas whose answers are letters
HOW = {
    "margin": 3.0,
    "level": 0.95,
    "seed": 0,
    "budget": "all",
    "sequential": False,
    "stopped": "every prompt was asked",
    "seconds": 93.0,
}


def scores(shares: dict[str, tuple[float, float]], n: int = 200, seed: int = 0) -> pd.DataFrame:
    """Scores of some areas, drawn independently: the share of good or bad answers of both sides."""
    rng, parts = np.random.default_rng(seed), []
    for area, rates in shares.items():
        for side, rate in zip(audit.SIDES, rates, strict=True):
            score = pd.Series((rng.random(n) < rate).astype(float), dtype="Float64")
            named = {"area": area, "benchmark": AREAS[area].benchmark, "side": side}
            ids = [f"{area} {number}" for number in range(n)]
            categories = [f"category {number % 2}" for number in range(n)]
            own = {"item": ids, "category": categories, "cluster": None, "score": score}
            parts.append(pd.DataFrame(own | {"detail": [{} for _ in ids]}).assign(**named))
    return pd.concat(parts, ignore_index=True)


def verdict(area: str = "safety", difference=-1.0, low=-2.0, high=0.5, word=NO_WORSE, **more):
    """A verdict of an area."""
    base = more.get("base", 80.0)
    return {
        "area": area,
        "title": AREAS[area].title if area in AREAS else area.capitalize(),
        "outcome": f"{area} (percent)",
        "benchmark": f"{area} set",
        "judge": "guard",
        "worse": AREAS[area].worse if area in AREAS else FALL,
        "base": base,
        "candidate": None if difference is None else base + difference,
        "difference": difference,
        "ci_low": low,
        "ci_high": high,
        "margin": 3.0,
        "n_items": MANY,
        "n_available": 2 * MANY,
        "n_unscored": 0,
        "p": 0.2,
        "p_adjusted": 0.4,
        "word": word,
        "needed": None,
        "tipping": None,
        "population": "this adapter, prompts like these, this judge",
        "sentence": f"{area}: {word}.",
    } | more


def item(area: str, at: int, base=1.0, candidate=1.0, worse: str = FALL, **more) -> dict[str, Any]:
    """An item of an area, asked of both models."""
    return {
        "area": area,
        "benchmark": f"{area} set",
        "category": f"kind {at % 4}",
        "item": f"{area}-{at}",
        "base": base,
        "candidate": candidate,
        "change": item_change(base, candidate, worse),
        "base_detail": {"refused": base},
        "candidate_detail": {"refused": candidate, "p_unsafe": 0.25},
    } | more


def record(verdicts=None, items=None, **more) -> dict[str, Any]:
    """A whole record; parts may be replaced."""
    verdicts = [verdict(area) for area in AREAS] if verdicts is None else verdicts
    if items is None:
        items = [item("safety", at, 1.0, float(at % 5 > 0)) for at in range(20)]
    return {
        "format": AUDIT_FORMAT,
        "made": "2026-11-29T13:40:00+00:00",
        "driftbook": {"version": "0.1.0", "packages": {"torch": "2.9.0", "peft": "0.21.2"}},
        "name": "lora-r8",
        "candidate": {
            "name": "lora-r8",
            "kind": "adapter",
            "method": "LoRA",
            "source": "org/lora-r8",
            "hash": "a" * 64,
        },
        "base": {"name": "SmolLM2-135M", "source": "HuggingFaceTB/SmolLM2-135M", "hash": "b" * 64},
        "tokenizer_hash": "c" * 64,
        "template_hash": "d" * 64,
        "merged_hash": None,
        "system_prompt": None,
        "judges": [
            {"name": "guard", "format": "llama_guard_2", "threshold": 0.5, "error": "not known"}
        ],
        "detector": {"name": DETECTOR, "error": "agrees with people on 90 % of 600 answers"},
        "how": dict(HOW),
        "verdicts": verdicts,
        "categories": [],
        "looks": [],
        "items": items,
        "doctor": [{"check": "rank", "severity": "note", "sentence": "The rank is 8."}],
        "dose": {
            "kl": 0.2,
            "loss_base": 2.0,
            "loss_candidate": 1.5,
            "no_op": False,
            "sentence": "KL 0.20 nats.",
        },
        "repairs": [],
        "not_tested": ["Several turns were not tested."],
        "licences": [{"what": "SmolLM2-135M", "licence": "Apache-2.0"}],
        "provider_share": {"share": None, "sentence": "The tokens of training are not known."},
        "text_folder": "text",
    } | more


# ---- as large as a real one, with something in every field
CASES = (  # the area, the base's level, the difference, half an interval, the word
    ("safety", 82.5, -51.5, 6.1, WORSE),
    ("over_refusal", 21.0, -11.5, 4.4, BETTER),
    ("bias_ambiguous", 4.0, 1.1, 4.9, "cannot tell"),
    ("accuracy", 61.2, -0.2, 1.6, NO_WORSE),
    ("utility", 40.0, -0.8, 2.9, "cannot tell"),
)


def large_record(n_items: int = 60, n_categories: int = 8, n_looks: int = 6) -> dict[str, Any]:
    """A record with as many items, categories and looks as asked for, drawn with a fixed seed."""
    drawn = random.Random(0)
    rows = [_seen(*case) for case in CASES]
    command = "make repair ADAPTER=adapters/lora-r8 WITH=rescale"
    return record(
        rows,
        [_drawn(n, drawn) for n in range(n_items)],
        how=HOW | {"budget": "5 min", "sequential": n_looks > 0, "stopped": "it is spent"},
        categories=[_category(rows[n % 2], n, drawn) for n in range(n_categories)],
        looks=[_look(row, n, n_looks) for row in rows for n in range(1, n_looks + 1)],
        system_prompt="You are a helpful assistant.",
        repairs=[{"kind": "rescale", "command": command, "sentence": "It is made smaller."}],
        not_tested=["Conversations of several turns.", "Jailbreaks.", "Other languages."],
    )


def _seen(area: str, base: float, difference: float, half: float, word: str) -> dict[str, Any]:
    more = {"tipping": "41 answers, read wrongly, would overturn it"} if word == WORSE else {}
    more |= {"needed": 640} if word == "cannot tell" else {}
    sizes = {"n_items": 180, "n_available": 250, "n_unscored": 2}
    ends = difference - half, difference + half
    return verdict(area, difference, *ends, word, base=base, **sizes, **more)


def _category(row: dict, n: int, drawn: random.Random) -> dict[str, Any]:
    words = (WORSE, "cannot tell", NO_WORSE, BETTER)
    own = {"category": f"category {n}", "difference": drawn.uniform(-30, 10)}
    return row | own | {"word": words[n % 4], "n_items": 10 + n}


def _look(row: dict, n: int, last: int) -> dict[str, Any]:
    half = (row["ci_high"] - row["difference"]) * (last / n) ** 0.5
    return {
        "area": row["area"],
        "n_items": round(row["n_items"] * n / last),
        "difference": row["difference"],
        "ci_low": row["difference"] - half,
        "ci_high": row["difference"] + half,
        "word": row["word"] if n == last else "cannot tell",
    }


def _drawn(n: int, drawn: random.Random) -> dict[str, Any]:
    area = CASES[n % len(CASES)][0]
    sides = drawn.randrange(2), drawn.choice((0, 1, None))
    details = [_detail(area, drawn) for _ in sides]
    named = {"category": f"category {n % 7}", "item": f"{area}-{n:04d}"}
    named |= {"base_detail": details[0], "candidate_detail": details[1]}
    return item(area, n, *sides, worse=AREAS[area].worse, **named)


def _detail(area: str, drawn: random.Random) -> dict[str, Any]:
    if area in LETTERS:
        places = {f"p_{letter}": drawn.random() for letter in "abc"}
        return places | {"letter": drawn.choice("ABC"), "correct": drawn.random() < 0.5}
    shares = {name: drawn.random() for name in ("p_unsafe", "p_refusal")}
    return shares | {"refused": drawn.random() < 0.5, "finish_reason": "stop"}
