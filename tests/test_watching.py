"""What a running study says of itself: what is done, by loops and by marks, and the time left."""

import os
import time

import pytest

from driftbook.batch import keys, shards, watching
from driftbook.batch.schedule import Piece, PlannedJob
from driftbook.study import progress
from driftbook.study.files import read_json, write_json


def test_the_display_says_what_is_done_and_how_much_is_left():
    Part = watching.Part
    done = Part("train/a", "train", "a", 5, 5, False)
    working = [
        Part("respond/a", "respond", "a", 2, 5, True),
        Part("answer/b", "answer", "b", 1, 5, True),
    ]
    waiting = Part("judge/a", "judge", "a", 0, 5, False)
    text, n_done, n_all, left = watching.summary([done, waiting, *working])
    assert (text, n_done, n_all, left) == ("respond a", 8, 20, "")
    assert watching.summary([done, waiting])[0] == "judge a"
    assert watching.summary([done]) == ("finished", 5, 5, "")
    both = [
        Part("respond/a", "respond", "a", 0, 5, True),
        Part("respond/b", "respond", "b", 0, 5, True),
    ]
    assert watching.summary(both)[0] == "respond a, b"
    plan = {
        "train/a": PlannedJob(2.0, {str(i): Piece(30.0, {"steps": (12, 30.0)}) for i in range(5)})
    }
    outlook = watching.Outlook(plan, 2)
    told = {"done": 1, "run_id": "1", "counts": {"steps": 6.5}, "seconds": {}, "spent": 16.25}
    running = Part("train/a", "train", "a", 1, 5, True, told)
    text, *_, left = watching.summary([running], outlook)
    assert text == "train a: train variant 2 of 5, 6 of 12 steps"
    assert left == "about 2 min left", "three and a half of 30 seconds, and what is around them"
    assert watching.summary([Part("train/a", "train", "a", 5, 5, False)], outlook)[3] == ""


def run_by_plan(speed: dict[str, float], at: float, counted: bool = True):
    """The parts of two long stages of two variants each, of 400 planned seconds, that take `speed`
    times as long as planned, `at` seconds after their start, and the seconds that are really left.
    """
    plan, began, found = {}, 0.0, []
    for stage in ("train", "respond"):
        took = 400.0 * speed[stage]
        pieces = {str(i): Piece(400.0, {"steps": (40, 390.0)}) for i in range(2)}
        plan[f"{stage}/a"] = PlannedJob(0.0, pieces, ("train/a",) if stage == "respond" else ())
        done = int(min(2, max(0, (at - began) // took)))
        told = {"done": done, "seconds": {str(i): took for i in range(done)}}
        since = began + done * took
        steps = {"steps": 40 * (at - since) / took} if counted else {}
        told |= {"run_id": str(done), "counts": steps, "spent": at - since}
        active = done < 2 and began <= at
        found.append(
            watching.Part(f"{stage}/a", stage, "a", done, 2, active, told if began <= at else {})
        )
        began += 2 * took
    return watching.Outlook(plan, 2).left(found), began - at


@pytest.mark.parametrize("speed", [{"train": 1, "respond": 1}, {"train": 3, "respond": 2.6}])
@pytest.mark.parametrize("share", [0.25, 0.4, 0.6, 0.9])
def test_few_long_jobs_have_a_time_left_within_30_percent_from_a_quarter_on(speed, share):
    whole = sum(800 * one for one in speed.values())
    said, left = run_by_plan(speed, share * whole)
    assert said == pytest.approx(left, rel=0.3)


def test_without_counts_the_time_left_falls_all_the_same():
    speed = {"train": 1, "respond": 1}
    first, second = (run_by_plan(speed, at, counted=False)[0] for at in (20, 200))
    assert first - second == pytest.approx(180)


def test_a_line_comes_every_20_seconds_where_there_is_no_terminal(
    make_study, content, capsys, tmp_path
):
    part = watching.Part("train/a", "train", "a", 0, 2, True, {"counts": {"steps": 1}, "spent": 0})
    with watching.display(make_study(content), tmp_path / "none.json", 2) as show:
        for number in range(100):
            show([part], number / 2)
    assert len(capsys.readouterr().out.splitlines()) == 3, "at 0, 20 and 40 seconds"


def test_loops_say_how_far_they_are_at_most_once_a_second(monkeypatch, tmp_path):
    now, path = [1000.0], tmp_path / "progress" / "respond.a.json"
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    progress.advance("written", 1)  # nobody reads it
    with progress.reported(path, 2) as told:
        told.begin("first")
        for _ in range(30):
            progress.advance("written", 0.5)
        assert read_json(path)["counts"] == {}, "within a second of the last one"
        now[0] += 1.0
        progress.reach("steps", 3)
        assert read_json(path)["counts"] == {"written": 15.0, "steps": 3}
        now[0] += 9.0
        told.end("first", worked=True)
        told.begin("second")
        told.end("second", worked=False)
    kept = read_json(path)
    assert (kept["done"], kept["seconds"], kept["run_id"]) == (2, {"first": 10.0}, None)
    assert read_json(path) == kept


def test_parts_are_read_from_marks_and_this_batchs_progress(make_study, content, standins):
    content["name"] = "parts"
    study = make_study(content)
    n, started = len(study.variants), time.time()
    dealt = shards.dealt(study, 1)
    job = "train/tiny-llama/0"
    progress_of, mark, key = (
        shards.path_of(study, kind, job) for kind in ("progress", "jobs", "keys")
    )

    def found():
        return {
            (part.stage, part.about): (part.done, part.total, part.active)
            for part in watching.parts(study, dealt, started, time.time())
        }

    assert found()["train", "tiny-llama"] == (0, n, False)
    write_json(progress_of, {"done": 3, "of": n})
    assert found()["train", "tiny-llama"] == (3, n, True)
    os.utime(progress_of, (1, 1))
    assert found()["train", "tiny-llama"] == (0, n, False), (
        "an older batch's progress is no progress"
    )
    write_json(mark, {})
    assert found()["train", "tiny-llama"] == (n, n, False)
    write_json(key, {})
    os.utime(key, (time.time() + 9,) * 2)
    assert found()["train", "tiny-llama"] == (0, n, False), "a changed key asks for the job again"
    assert {part.stage for part in watching.parts(study, dealt, started, time.time())} == {
        "prepare",
        *keys.STAGES,
        "collect",
        *keys.ANALYSES,
        "report",
    }
