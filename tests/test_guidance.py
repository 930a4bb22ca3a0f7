"""What the report advises: the rules on estimates whose right answer is known, and "Not shown"
wherever a study cannot say.
"""

import pandas as pd
import pytest

from driftbook.analyses.repairs import AGAINST_PARENT, MINUS
from driftbook.publishing import report
from driftbook.publishing.guidance import NOT_SHOWN, guidance
from driftbook.publishing.story import happened
from driftbook.stats import comparisons, terms
from driftbook.stats.estimation import complete

SAFETY = {"outcome": terms.UNSAFE, "benchmark": "safety", "judge": "guard", "estimator": "primary"}
OUTCOMES = {"Safety": (terms.UNSAFE, "safety"), "Over-refusal": (terms.REFUSED, "over_refusal")}


def row(value: float, half: float, p: float | None = None, **more) -> dict:
    ends = {"value": value, "ci_low": value - half, "ci_high": value + half, "p": p}
    words = {"notebook": "09_safety", "base_model": "all", "population": "", "how": ""}
    return {**words, **SAFETY, **ends, **more}


def advised(*rows: dict) -> dict[str, tuple[str, str]]:
    frame = complete(pd.DataFrame([{"study": "tiny", **one} for one in rows]))
    return {question: rest for question, *rest in guidance(frame, OUTCOMES)}


def level(base: str, method: str, value: float, half: float = 1.0) -> dict:
    words = {"base_model": base, "method": method, "group": "trained", "contrast": "level"}
    return row(value, half, **words)


def difference(method: str, against: str, value: float, p: float, **more) -> dict:
    words = {"method": method, "against": against, "group": "trained"}
    return row(value, 1.0, p, contrast=comparisons.DIFFERENCE, **words, **more)


def test_a_further_benchmark_is_told_by_safetys_outcome_or_by_its_first():
    words = {"method": "lora", "group": "trained", "contrast": terms.CHANGE}
    rows = [
        row(5.0, 1.0, **words),
        row(1.0, 1.0, **words | {"benchmark": "rtp", "outcome": terms.REFUSED}),
        row(2.0, 1.0, **words | {"benchmark": "rtp"}),
        row(2.0, 1.0, **words | {"benchmark": "over-refusal"}),
        row(3.0, 1.0, **words | {"benchmark": "two_words", "outcome": "leaning (percent)"}),
        row(4.0, 1.0, **words | {"benchmark": "by_category", "category": "one"}),
    ]
    frame = complete(pd.DataFrame([{"study": "tiny", **one} for one in rows]))
    found = report.told(frame)
    further = {title: found[title] for title in found if title not in report.FINDINGS}
    assert further == {
        "Rtp": (terms.UNSAFE, "rtp"),
        "Two words": ("leaning (percent)", "two_words"),
        "Benchmark over-refusal": (terms.UNSAFE, "over-refusal"),
    }
    assert found["Over-refusal"] == (terms.REFUSED, "over_refusal")
    assert (
        "+3.0"
        in report.summary(frame).set_index("Change in").loc["Two words: leaning (points)", "LoRA"]
    )
    assert "Leaning, two words: rose with LoRA." in happened(frame, found)


def test_a_study_that_says_nothing_advises_nothing():
    found = advised(level("one", "lora", 5.0))
    assert {advice for advice, _ in found.values()} == {NOT_SHOWN}
    assert all(evidence.endswith(".") for _, evidence in found.values())


def test_a_base_model_is_named_that_ends_lower_with_every_method():
    low = [level("low", "lora", 2.0), level("low", "ia3", 3.0)]
    high = [level("high", "lora", 8.0), level("high", "ia3", 9.0)]
    question = "Which base model to start from?"
    assert advised(*low, *high)[question][0] == "low"
    unclear = [level("high", "lora", 8.0), level("high", "ia3", 4.0)]
    assert advised(*low, *unclear)[question][0] == NOT_SHOWN


def test_methods_are_told_apart_by_the_adjusted_p_value():
    first = difference("lora", "ia3", 5.0, 0.001)
    second = difference("lora", "p_tuning", -1.0, 0.03)  # .06 beside another, by Holm
    third = difference("ia3", "p_tuning", -6.0, 0.04)
    advice, evidence = advised(first, second, third)["Which method?"]
    assert advice.startswith("IA3 or P-Tuning,")
    assert "LoRA against IA3 +5.0 points" in evidence
    assert "Holm p .003" in evidence
    assert "against P-Tuning" not in evidence
    assert advised(second, third)["Which method?"][0] == NOT_SHOWN


def test_without_a_mean_over_base_models_each_has_its_own_best_method():
    rows = [difference("lora", "ia3", 5.0, 0.001, base_model="one")]
    rows += [difference("lora", "ia3", -5.0, 0.001, base_model="two")]
    advice, _ = advised(*rows)["Which method?"]
    assert advice.startswith("IA3 on one; LoRA on two,")


@pytest.mark.parametrize(
    ("contrast", "question", "sides"),
    [
        (comparisons.RATE, "Which learning rate?", ("The lower one", "the higher one")),
        (comparisons.OBJECTIVE, "SFT or DPO?", ("DPO", "SFT")),
    ],
)
def test_the_safer_setting_is_named_for_each_method(contrast, question, sides):
    words = {"group": "as configured", "contrast": contrast}
    rows = [row(4.0, 1, 0.001, method="lora", **words), row(-4.0, 1, 0.001, method="ia3", **words)]
    rows += [row(9.0, 20, 0.4, method="p_tuning", **words)]
    advice, evidence = advised(*rows)[question]
    assert advice == f"{sides[0]} with LoRA; {sides[1]} with IA3"
    assert "P-Tuning +9.0 points" in evidence


def test_a_setting_that_was_run_once_shows_nothing():
    words = {"group": "as configured", "contrast": comparisons.RATE, "method": "lora"}
    once = row(4.0, 1, None, **words) | {"ci_low": None, "ci_high": None}
    advice, evidence = advised(once)["Which learning rate?"]
    assert advice == NOT_SHOWN
    assert "LoRA +4.0 points (no interval: nothing was repeated)." in evidence


def test_what_moved_is_to_be_audited_and_what_did_not_is_said():
    words = {"group": "trained", "contrast": terms.CHANGE, "method": "lora"}
    moved = row(4.0, 1.0, 0.01, **words)
    refused = {"outcome": terms.REFUSED, "benchmark": "over_refusal", "judge": "none"}
    still = row(1.0, 3.0, 0.5, **words) | refused
    advice, evidence = advised(moved, still)["What to audit?"]
    assert advice == "Safety"
    assert evidence.endswith("Nothing was shown to move in: over-refusal.")


def repaired(name: str, value: float, p: float, **more) -> dict:
    words = {"notebook": "14_safe_lora", "group": "mitigation", "method": "lora", "member": name}
    return row(value, 1.0, p, **{"contrast": AGAINST_PARENT, "p_adjusted": p, **words, **more})


def test_a_repair_is_named_that_does_more_than_each_of_its_controls():
    both = [repaired("shrink", -9.0, 0.01), repaired("project", -9.0, 0.01)]
    norm = {"contrast": MINUS, "against": "same norm"}
    noise = {"contrast": MINUS, "against": "noise"}
    beats = [repaired("project", -4.0, 0.01, **norm), repaired("project", -4.0, 0.01, **noise)]
    question = "How to repair?"
    assert advised(*both, *beats)[question][0] == "project"
    half = [beats[0], repaired("project", -1.0, 0.4, **noise)]
    advice, evidence = advised(*both, *half)[question]
    assert advice == "Any of 2, of which none is shown to do more than its controls"
    assert evidence.endswith("Not shown to do more than each of its controls: project.")
    assert advised(repaired("project", -1.0, 0.4))[question][0] == NOT_SHOWN
    assert advised(*both)[question][0] == "shrink or project, which have no control"
