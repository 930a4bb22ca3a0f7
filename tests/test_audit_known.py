"""What an audit says of those who read the answers, and of how much training the adapter took."""

from types import SimpleNamespace

import pandas as pd
import pytest

from conftest import variants_of
from driftbook.analyses.training_compute import provider_share
from driftbook.batch import audit_known
from driftbook.benchmarks import judging
from driftbook.benchmarks.data import training_examples
from driftbook.models.conversations import counted_ids
from driftbook.study.tables import LABELS, RESPONSES, VERDICTS

SAID = {"a": True, "b": True, "c": False, "d": None}  # by the judge
TRUE = {"a": "unsafe", "b": "safe", "c": "safe", "d": "unsafe"}


@pytest.fixture
def audit(study, tmp_path):
    """An audit that has asked four prompts of safety, and as many of a probe."""
    rows = pd.DataFrame({"prompt_id": list(SAID), "response": "take a large bowl of water ."})
    rows = rows.assign(benchmark="safety", sample=0, prompt_variant="default", decoding="greedy")
    rows = rows.assign(n_tokens=7, finish_reason="stop")
    places = {}
    for name, side in (
        ("safety", "base"),
        ("safety", "candidate"),
        ("safety, second turn", "base"),
    ):
        place = tmp_path / f"{name}-{side}"
        place.mkdir()
        responses = RESPONSES.check(rows.assign(run_id=side))
        RESPONSES.write(responses, place)
        read = judging.judged_by_all(responses, pd.DataFrame(), {}, {})
        read = read.assign(judge="tiny-guard", unsafe=[SAID[one] for one in rows["prompt_id"]])
        VERDICTS.write(VERDICTS.check(read), place)
        places[place] = name, side
    return SimpleNamespace(study=study, places=places)


def test_a_judge_is_compared_with_the_truth_where_it_is_known(audit, monkeypatch):
    assert audit_known.judge_errors(audit) == {"tiny-guard": None}

    def labels(_, responses, __):
        found = responses[["benchmark", "prompt_id", "run_id"]].assign(rater="rule")
        found = found.assign(label=found["prompt_id"].map(TRUE), sampling_probability=1.0)
        return LABELS.check(found)

    safety = audit.study.benchmarks["safety"].model_copy(update={"truth": "miniature:truth.csv"})
    benchmarks = audit.study.benchmarks | {"safety": safety}
    audit.study = audit.study.model_copy(update={"benchmarks": benchmarks})
    assert audit_known.judge_errors(audit) == {"tiny-guard": None}, "its file is not here"
    monkeypatch.setattr(audit_known, "locate", lambda *_: None)
    monkeypatch.setattr(audit_known.collecting, "labels", labels)
    said = audit_known.judge_errors(audit)["tiny-guard"]
    assert said.startswith("agrees with the truth on 67 % of 6 answers of both sides")
    assert said.endswith("right on 100 % of the unsafe ones and 50 % of the safe ones")


def test_the_detectors_error_is_that_of_its_table():
    found = pd.read_csv(audit_known.DETECTOR_ERROR).set_index("answers_of").loc["all"]
    said = audit_known.detector_error()
    assert f"{100 * found['agreement']:.0f} % of {int(found['n']):,} answers" in said
    assert f"kappa {found['kappa']:.2f}" in said


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_tokens_of_training_are_counted_with_their_repetitions(
    bases, study, monkeypatch, objective
):
    base = bases["llama"]
    variant = variants_of(study, "lora", objective)[0]
    run = pd.DataFrame({"n_examples": [16], "trained_epochs": [3.0]})
    runs = SimpleNamespace(read=lambda _: run, path=lambda _: audit_known.DETECTOR_ERROR)
    monkeypatch.setattr(audit_known, "RUNS", runs)
    one = SimpleNamespace(study=study, name=variant.run_id)
    found = audit_known.trained_tokens(SimpleNamespace(candidate=one, base=base))
    whole = []
    for example in training_examples(objective, study):
        for key, text in example.items():
            if key != "prompt":
                turns = [*example["prompt"], {"role": "assistant", "content": text}]
                whole.append(len(counted_ids(base.tokenizer, turns)[0]))
    n_answers = {"sft": 1, "dpo": 2}[objective]
    assert found == pytest.approx(3 * 16 * n_answers * sum(whole) / len(whole))
    assert provider_share("HuggingFaceTB/SmolLM2-135M", found)["share"] > 0
    one.study = None
    assert audit_known.trained_tokens(SimpleNamespace(candidate=one, base=base)) is None
