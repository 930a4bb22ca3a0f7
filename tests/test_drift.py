"""The drift callback: it sees what it should, changes nothing of a training that it does not stop,
and can be put on any trainer.
"""

import copy

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from conftest import SMALL, variants_of, write_study
from driftbook.benchmarks import bbq, data
from driftbook.benchmarks.refusals import is_refusal
from driftbook.models import adapters
from driftbook.study.files import file_digest
from driftbook.study.study_file import load
from driftbook.study.tables import DRIFT
from driftbook.training import drift, examples, steps
from driftbook.training import fit as fitting
from driftbook.training.drift import OVER_REFUSAL, UNREFUSED, UNSAFE, DriftCallback, Sample

HARMFUL, BENIGN = (
    ("how do i glark a snib", "tell me of grinks"),
    ("what is a floop", "who is a snib", "may i floop"),
)


@pytest.fixture(scope="module")
def study(data_folder, tmp_path_factory):
    content = copy.deepcopy(SMALL)
    content["data"]["sft"]["n"] = content["data"]["dpo"]["n"] = 32
    content["training"] = {"batch_size": 8, "max_length": 128}
    content["grid"][0]["learning_rates"] = {method: [5e-2] for method in content["methods"]}
    return load(write_study(tmp_path_factory.mktemp("study"), content))


@pytest.fixture(scope="module")
def items(study):
    return data.items("bbq", study).head(12)


def sample(items=None, **more):
    return Sample(HARMFUL, BENIGN, items, max_new_tokens=4, **more)


def run(study, base, method, folder, looks=None, objective="sft"):
    [variant] = variants_of(study, method, objective)
    return fitting.train(
        variant, base, examples.prepare(objective, base, study), study, folder / "adapter", looks
    )


def test_what_it_sees_is_what_the_engine_and_the_detector_say(bases, items):
    base = bases["llama"]
    seen = sample(items, answer_mode="options").look(base.model, base.tokenizer)
    answers = sample()._answers(drift.Scorer(base.model, base.tokenizer), BENIGN)
    refused = [one for one in is_refusal(answers) if one is not None]
    assert seen[OVER_REFUSAL] == (
        (np.mean(refused), len(refused)) if refused else (pytest.approx(np.nan, nan_ok=True), 0)
    )
    own = bbq.answers(items, drift.Scorer(base.model, base.tokenizer), "options", "run")
    for context, part in own.groupby("context"):
        assert seen[f"accuracy in BBQ, {context}"] == (
            pytest.approx(part.correct.astype(float).mean()),
            len(part),
        )
    assert seen["stereotyped answers in BBQ"][1] == own.biased.notna().sum()


@pytest.mark.parametrize("method", ["lora", "p_tuning", "prompt_tuning"])
def test_looking_changes_nothing_of_the_training(bases, study, items, tmp_path, method):
    base = bases["qwen2"]
    looks = DriftCallback(sample(items), base.tokenizer, every=0.25, run_id="r")
    seen, unseen = (
        run(study, base, method, tmp_path / "a", looks),
        run(study, base, method, tmp_path / "b"),
    )
    assert file_digest(tmp_path / "a" / "adapter" / adapters.WEIGHTS) == file_digest(
        tmp_path / "b" / "adapter" / adapters.WEIGHTS
    )
    pd.testing.assert_frame_equal(seen.curve, unseen.curve)
    assert sorted(looks.rows.step.unique()) == [0, 1, 2, 3, 4]
    assert looks.stopped is None
    DRIFT.check(looks.rows)


def test_before_the_first_step_lora_is_the_base_model(bases, study, items, tmp_path):
    base = bases["llama"]
    of_base = sample(items).look(base.model, base.tokenizer)
    looks = DriftCallback(sample(items), base.tokenizer, every=1.0, base=of_base)
    run(study, base, "lora", tmp_path, looks)
    first = looks.rows.query("step == 0").set_index("outcome")
    for outcome, (share, n) in of_base.items():
        assert first.n[outcome] == n
        assert n == 0 or first.value[outcome] == pytest.approx(100 * share)
    assert sorted(looks.rows.step.unique()) == [0, 4]


class _Rising(Sample):
    """A sample in which unsafe answers become more by ten points at each look."""

    def look(self, model, tokenizer):
        looks = getattr(type(self), "looks", 0)
        type(self).looks = looks + 1
        return {UNSAFE: (0.1 * looks, 20), OVER_REFUSAL: (0.5, 20)}


def test_it_stops_where_the_threshold_is_passed_and_the_record_says_so(bases, study, tmp_path):
    _Rising.looks = 0
    looks = DriftCallback(_Rising(), bases["llama"].tokenizer, every=0.25, stop_unsafe=20)
    trained = run(study, bases["llama"], "lora", tmp_path, looks)
    assert trained.record["steps"] == 2
    assert "training stopped at step 2" in trained.record["findings"]
    assert "20 allowed" in trained.record["findings"]
    assert trained.record["status"] == "ok"


def test_over_refusal_has_a_threshold_of_its_own(bases, study, tmp_path):
    _Rising.looks = 0
    looks = DriftCallback(_Rising(), bases["llama"].tokenizer, every=0.25, stop_over_refusal=1)
    assert run(study, bases["llama"], "ia3", tmp_path, looks).record["steps"] == 4


def test_a_training_that_goes_on_keeps_what_was_seen(bases, study, items, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    monkeypatch.setattr(steps, "CHECKPOINT_SECONDS", 0.0)
    base = bases["llama"]

    class Dies(DriftCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise Killed

    with pytest.raises(Killed):
        run(study, base, "lora", tmp_path / "a", Dies(sample(items), base.tokenizer, run_id="r"))
    again = DriftCallback(sample(items), base.tokenizer, run_id="r")
    run(study, base, "lora", tmp_path / "a", again)
    whole = DriftCallback(sample(items), base.tokenizer, run_id="r")
    run(study, base, "lora", tmp_path / "b", whole)
    pd.testing.assert_frame_equal(DRIFT.comparable(again.rows), DRIFT.comparable(whole.rows))


def test_it_works_on_trls_own_trainer(bases, study, tmp_path):
    base = copy.deepcopy(bases["mistral"])
    rows = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "who are you"}],
                "completion": [{"role": "assistant", "content": "i am you"}],
            }
        ]
        * 16
    )
    looks = DriftCallback(sample(), base.tokenizer, every=0.5)
    config = SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    [variant] = variants_of(study, "lora")
    SFTTrainer(
        model=base.model,
        args=config,
        train_dataset=rows,
        processing_class=base.tokenizer,
        callbacks=[looks],
        peft_config=adapters.config(variant),
    ).train()
    assert sorted(looks.rows.step.unique()) == [0, 2, 4]
    assert set(looks.rows.outcome) == {UNREFUSED, OVER_REFUSAL}
