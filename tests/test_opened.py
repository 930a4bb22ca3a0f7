"""A stage opened for a notebook: which variant it shows, what it writes, and what it reads back."""

import pandas as pd
import pytest

from driftbook.batch.opened import Job
from driftbook.study import folders
from driftbook.study.files import digest
from driftbook.study.tables import RESPONSES, VERDICTS


@pytest.fixture
def job(make_study, content, monkeypatch, request):
    """The judging of all variants of one base model, whose settings need no models."""
    monkeypatch.setattr("driftbook.batch.keys.settings", lambda *_: {"stage": "judge"})
    monkeypatch.setattr(
        "driftbook.batch.cache.served", lambda key, run_id, folder, make: make()
    )  # nothing of another test is taken
    study = make_study(content | {"name": f"opened-{digest(request.node.name)}"})  # its own folder
    base_model = next(iter(study.bases))
    return Job("judge", study, base_model, list(study.of_base(base_model)))


def write_response(job: Job, variant, text: str) -> None:
    key = {"run_id": variant.run_id, "benchmark": "safety", "prompt_id": "1", "sample": 0}
    row = key | {"prompt_variant": "default", "decoding": "greedy", "response": text}
    frame = pd.DataFrame([row | {"n_tokens": 1, "finish_reason": "stop"}])
    RESPONSES.write(frame, job.folder(variant))


def verdicts_of(responses: pd.DataFrame) -> pd.DataFrame:
    found = responses.drop(columns="response").assign(
        judge="j", coherent=True, unsafe=responses.response.eq("bad"), outcome="refused"
    )
    return found.reindex(columns=list(VERDICTS.columns))


def test_the_variant_shown_has_an_adapter_or_is_the_base_model(job):
    assert job.example.method == "none"
    last = next(one for one in reversed(job.variants) if one.method != "none")
    for path in folders.adapter_files(job.study, last):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert job.example == last


@pytest.mark.slow
def test_a_changed_response_is_judged_again_and_the_others_are_not(job):
    for one in job.variants:
        write_response(job, one, "good")
    assert not job.judge(verdicts_of).reused.any()
    write_response(job, job.variants[0], "bad")
    done = job.judge(verdicts_of)
    assert list(done.reused) == [False] + [True] * (len(job.variants) - 1)
    found = job.read(done).set_index("run_id").unsafe
    assert found.index[found].tolist() == [job.variants[0].run_id]
    assert len(job.read(done, "responses")) == len(job.variants)


def test_what_failed_is_not_read(job):
    for one in job.variants[:2]:
        write_response(job, one, "good")
    two = Job("judge", job.study, job.base_model, job.variants[:2])
    done = two.judge(verdicts_of)
    assert len(two.read(done.assign(status=["ok", "failed"]))) == 1
    assert two.read(done.assign(status="failed")).empty
