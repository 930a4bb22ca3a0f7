"""A training that is killed, or whose disk fills, goes on from its checkpoint to the same bytes."""

import shutil

import pytest
import torch

from conftest import one_sentence
from driftbook.training import fit as fitting
from driftbook.training import steps
from fitted import Killed, Trainings, Watch

pytest_plugins = ["fitted"]


# ---- checkpoints
@pytest.mark.parametrize(
    ("method", "objective"),
    [
        ("lora", "sft"),
        ("lora", "dpo"),
        ("ia3", "dpo"),
        ("prompt_tuning", "sft"),
        ("p_tuning", "dpo"),
        ("prefix_tuning", "sft"),
    ],
)
def test_a_training_that_was_killed_ends_in_the_same_bytes(
    bases, a_study, tmp_path, often, method, objective
):
    base, study = (
        bases["mistral"],
        a_study(method, n=8, epochs=2, dropout=0.1 if method == "lora" else 0),
    )
    whole, resumed = (
        Trainings(base, study, objective, tmp_path / name / "adapter")
        for name in ("whole", "resumed")
    )
    assert whole.train() == 0
    assert resumed.killed(1) == 0
    assert resumed.checkpoints == ["checkpoint-1"]
    assert resumed.killed(2) == 1  # at the end of the first epoch
    assert resumed.train() == 2
    assert resumed.digest == whole.digest
    assert list(resumed.curve.loss) == list(whole.curve.loss)
    assert list(resumed.curve.step) == [1, 2, 3, 4]
    assert list(resumed.curve.learning_rate) == list(whole.curve.learning_rate)
    assert not resumed.scratch.exists()
    assert sorted(path.name for path in resumed.folder.parent.iterdir()) == ["adapter"]


def test_a_torn_checkpoint_is_ignored_and_deleted(bases, a_study, tmp_path, often):
    one = Trainings(bases["llama"], a_study("ia3"), "sft", tmp_path / "adapter")
    one.killed(2)
    torn = one.scratch / "checkpoint-9"
    torn.mkdir()
    (torn / "trained.safetensors").write_bytes(b"half")
    assert steps.last_whole(one.scratch) == str(one.scratch / "checkpoint-2")
    assert not torn.exists()
    (one.scratch / "checkpoint-2" / steps.WHOLE).unlink()
    assert one.train() == 0
    assert steps.last_whole(tmp_path / "nowhere") is None


def test_the_newest_checkpoint_is_by_its_number_and_not_its_name(tmp_path):
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / steps.WHOLE).write_text("{}")
    assert steps.last_whole(tmp_path) == str(tmp_path / "checkpoint-100")


def test_a_checkpoint_of_another_training_is_not_used(bases, a_study, tmp_path, often):
    one = Trainings(bases["llama"], a_study("ia3", n=8), "sft", tmp_path / "adapter")
    one.killed(1)
    shutil.copytree(one.scratch, tmp_path / "kept")

    def begins(**change):
        """Where a training begins that finds the checkpoint, one step before the end."""
        shutil.rmtree(one.scratch, ignore_errors=True)
        shutil.copytree(tmp_path / "kept", one.scratch)
        study = a_study("ia3", **{"n": 8} | change)
        return Trainings(bases["llama"], study, "sft", tmp_path / "adapter").train()

    assert begins() == 1
    for change in (
        {"seed": 2},
        {"n": 7},
        {"max_length": 127},
        {"rate": 4e-3},
        {"weight_decay": 0.1},
        {"loss": "whole"},
    ):
        assert begins(**change) == 0, change


def test_another_width_of_a_pass_or_a_failure_in_between_keeps_the_checkpoint(
    bases, a_study, tmp_path, often
):
    one = Trainings(bases["llama"], a_study("ia3"), "sft", tmp_path / "adapter")
    one.killed(2)
    assert (
        Trainings(
            bases["llama"], a_study("ia3", tokens_per_batch=64), "sft", tmp_path / "adapter"
        ).train()
        == 2
    )


# ---- a disk that fills
def full(*_, **__):
    raise OSError(28, "No space left on device")


def torn(*_, **__):
    from safetensors import SafetensorError

    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )  # what safetensors 0.8 raises


class FullAt(Watch):
    """Lets something fail from a step on."""

    def __init__(self, patch, step, target, failure):
        self.patch, self.step, self.what = patch, step, (*target, failure)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.patch.setattr(*self.what)


FILLS = {
    "weights": ((steps, "save_file"), full),
    "weights, as safetensors says it": ((steps, "save_file"), torn),
    "optimiser": ((torch, "save"), full),
    "the last mark": ((steps, "write_json"), full),
}


@pytest.mark.parametrize("what", [*list(FILLS)[:-1], "the last mark"])
def test_a_disk_that_fills_is_said_and_the_last_checkpoint_stays(
    bases, a_study, tmp_path, often, what
):
    one = Trainings(bases["llama"], a_study("p_tuning"), "sft", tmp_path / "adapter")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError) as error:
        fitting.train(
            one.variant,
            one.base,
            one.prepared,
            one.study,
            one.folder,
            FullAt(patch, 1, *FILLS[what]),
        )
    said = one_sentence(error.value)
    assert "make room and run again" in said
    assert str(one.scratch) in said
    assert "space" in said
    assert one.train() == 1
    whole = Trainings(bases["llama"], a_study("p_tuning"), "sft", tmp_path / "other" / "adapter")
    whole.train()
    assert one.digest == whole.digest


def test_a_kill_before_the_new_checkpoint_is_whole_keeps_the_old_one(
    bases, a_study, tmp_path, often
):
    one = Trainings(bases["llama"], a_study("ia3"), "sft", tmp_path / "adapter")

    def killed(*_):
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        fitting.train(
            one.variant,
            one.base,
            one.prepared,
            one.study,
            one.folder,
            FullAt(patch, 1, (steps, "write_json"), killed),
        )
    assert one.train() == 1


def test_only_one_whole_checkpoint_is_kept(bases, a_study, tmp_path, often):
    one = Trainings(bases["llama"], a_study("ia3", n=20), "sft", tmp_path / "adapter")
    one.killed(4)
    assert one.checkpoints == ["checkpoint-4"]
