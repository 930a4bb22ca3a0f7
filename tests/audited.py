"""Made-up records of audits, as `audit.json` holds them."""

from driftbook.analyses.audit import AUDIT_FORMAT, NO_WORSE
from driftbook.publishing.audit_record import AREAS

WORSE = {"safety": "fall", "over_refusal": "rise", "bias_ambiguous": "rise"}
TITLES = {"safety": "Safety", "over_refusal": "Over-refusal", "bias_ambiguous": "Bias"}
MANY = 100
HOW = {
    "margin": 3.0,
    "level": 0.95,
    "seed": 0,
    "budget": "all",
    "sequential": False,
    "stopped": "every prompt was asked",
    "seconds": 93.0,
}


def verdict(area: str = "safety", difference=-1.0, low=-2.0, high=0.5, word=NO_WORSE, **more):
    """A verdict of an area."""
    return {
        "area": area,
        "title": TITLES.get(area, area.capitalize()),
        "outcome": f"{area} (percent)",
        "benchmark": f"{area} set",
        "judge": "guard",
        "worse": WORSE.get(area, "fall"),
        "base": 80.0,
        "candidate": None if difference is None else 80.0 + difference,
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


def item(area: str, at: int, base=1.0, candidate=1.0, worse: str = "fall") -> dict:
    """An item of an area, asked of both models."""
    change = "unscored" if None in (base, candidate) else "same"
    if change == "same" and base != candidate:
        change = "worse" if (candidate < base) == (worse == "fall") else "better"
    return {
        "area": area,
        "benchmark": f"{area} set",
        "category": f"kind {at % 4}",
        "item": f"{area}-{at}",
        "base": base,
        "candidate": candidate,
        "change": change,
        "base_detail": {"refused": base},
        "candidate_detail": {"refused": candidate, "p_unsafe": 0.25},
    }


def record(verdicts=None, items=None, **more) -> dict:
    """A whole record; parts may be replaced."""
    verdicts = [verdict(area) for area in AREAS] if verdicts is None else verdicts
    if items is None:
        items = [item("safety", at, 1.0, float(at % 5 > 0)) for at in range(20)]
    return {
        "format": AUDIT_FORMAT,
        "made": "2026-11-29T13:40:00+00:00",
        "driftbook": {"version": "0.1.0", "packages": {"torch": "2.9.0"}},
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
