"""Small studies of one method and their trainings, as tests of training share them."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import TrainerCallback

from conftest import SMALL, variants_of, write_study
from driftbook.models import adapters
from driftbook.study.files import file_digest
from driftbook.study.methods import PEFT_METHODS as EVERY_METHOD
from driftbook.study.study_file import load
from driftbook.training import examples, steps
from driftbook.training import fit as fitting
from driftbook.training.steps import Conversation

# the last one of these is in test_suffixes.py
METHODS = tuple(name for name in EVERY_METHOD if name not in ("qlora", "suffix_tuning"))


OBJECTIVES = ("sft", "dpo")


TARGETS = ["q_proj", "v_proj"]


SETTINGS = {
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": TARGETS},
    "dora": {"r": 4, "target_modules": TARGETS},
    "rslora": {"r": 4, "target_modules": TARGETS},
    "ia3": {
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
    "bitfit": {"target_modules": ["v_proj"]},
    "ln_tuning": {},
    "prompt_tuning": {"num_virtual_tokens": 4, "init": "vocabulary"},
    "p_tuning": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "prefix_tuning": {"num_virtual_tokens": 4},
}


@pytest.fixture
def a_study(tmp_path_factory, data_folder):
    """Makes a study of one method, small and without dropout."""

    def make(method="lora", seed=1, n=12, epochs=1, rate=5e-3, dropout=0.0, data=None, **changes):
        content = copy.deepcopy(SMALL)
        content["methods"] = {
            method: SETTINGS[method] | ({"lora_dropout": dropout} if dropout else {})
        }
        content["data"]["sft"]["n"] = content["data"]["dpo"]["n"] = n
        content["data"]["heldout"]["n"] = 2
        if data:
            content["data"]["sft"] = data
        content["training"] = {"batch_size": 4, "max_length": 128, **changes}
        content["grid"][0] |= {
            "methods": [method],
            "objectives": list(OBJECTIVES),
            "learning_rates": {method: [rate]},
            "epochs": [epochs],
            "seeds": [seed],
        }
        return load(write_study(tmp_path_factory.mktemp("study"), content))

    return make


class Fit:
    """A training by fitting.fit: its losses, the trained weights and its facts."""

    def __init__(self, base, study, objective="sft", folder=None):
        [variant] = variants_of(study, next(iter(study.methods)), objective)
        model = adapters.create(variant, base.model, base.tokenizer)
        try:
            prepared = examples.prepare(objective, base, study)
            self.facts, curve = fitting.fit(variant, model, base, prepared, study, folder)
            self.losses, self.weights = curve.loss.to_numpy(float), adapters.state(model)
            self.said = json.loads(self.facts["trainer_arguments"])
        finally:
            adapters.detach(model)
            base.model.gradient_checkpointing_disable()
            base.model.eval()


@pytest.fixture
def fit(a_study, tmp_path_factory):
    """Fits one method of a study on a base."""

    def run(base, method="lora", objective="sft", **changes):
        return Fit(
            base, a_study(method, **changes), objective, tmp_path_factory.mktemp("fit") / "adapter"
        )

    return run


def same(one, other, atol):
    np.testing.assert_allclose(one.losses, other.losses, atol=atol, rtol=0)
    assert one.weights.keys() == other.weights.keys()
    for name, value in one.weights.items():
        np.testing.assert_allclose(value, other.weights[name], atol=atol, rtol=0, err_msg=name)


def conversations(lengths, seed=0, n_tokens=200):
    random = np.random.default_rng(seed)
    made = []
    for length in lengths:
        counted = np.sort(
            random.choice(np.arange(1, length), random.integers(1, length), replace=False)
        )
        made.append(Conversation(random.integers(8, n_tokens, length).tolist(), counted))
    return made


class Killed(Exception):
    """What stands for a kill."""


class Watch(TrainerCallback):
    """Stands where a study's look at the drift does (drift.DriftCallback)."""

    stopped = None


class KillAfter(Watch):
    """Ends the process, as it were, after step k and its checkpoint; remembers at which step
    training began.
    """

    def __init__(self, step=None):
        self.step, self.began = step, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = state.global_step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


class Trainings:
    """Trainings of one variant in one folder, again and again."""

    def __init__(self, base, study, objective, folder, variant=None):
        self.base, self.study, self.folder = base, study, folder
        method = next(iter(study.methods))
        self.variant = variant or variants_of(study, method, objective)[0]
        self.prepared = examples.prepare(objective, base, study, *examples.way(self.variant)[1:])
        self.scratch = folder.parent / f"{folder.name}.checkpoints"

    def train(self, step=None):
        callback = KillAfter(step)
        done = fitting.train(
            self.variant, self.base, self.prepared, self.study, self.folder, callback
        )
        self.curve, self.facts = done.curve, done.record
        return callback.began

    def killed(self, step):
        callback = KillAfter(step)
        with pytest.raises(Killed):
            fitting.train(self.variant, self.base, self.prepared, self.study, self.folder, callback)
        return callback.began

    @property
    def checkpoints(self):
        return sorted(path.name for path in self.scratch.glob("checkpoint-*"))

    @property
    def digest(self):
        return file_digest(self.folder / adapters.WEIGHTS)


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(steps, "CHECKPOINT_SECONDS", 0)


@pytest.fixture(scope="module")
def trained(bases, data_folder, tmp_path_factory):
    """Trains a variant of the small study, with changes, on the random Llama; what was trained
    before is kept.
    """
    base, done = bases["llama"], {}

    def train(method, objective="sft", seed=1, again=0, **changes):
        name = json.dumps([method, objective, seed, again, sorted(changes.items())])
        if name not in done:
            study = study_of(tmp_path_factory.mktemp("study"), seed, **changes)
            [variant] = variants_of(study, method, objective)
            prepared = (
                examples.prepare(objective, base, study) if objective != "untrained" else None
            )
            folder = tmp_path_factory.mktemp("adapter")
            result = fitting.train(variant, base, prepared, study, folder)
            done[name] = SimpleNamespace(
                study=study,
                variant=variant,
                folder=folder,
                record=result.record,
                curve=result.curve,
            )
        return done[name]

    return train


def study_of(
    folder,
    seed=1,
    rate=None,
    dropout=0.1,
    epochs=1,
    n=16,
    batch=8,
    init=None,
    warmup=0.0,
    max_length=128,
):
    content = copy.deepcopy(SMALL)
    content["methods"]["lora"]["lora_dropout"] = dropout
    content["data"]["sft"]["n"] = content["data"]["dpo"]["n"] = n
    content["training"] = {"batch_size": batch, "max_length": max_length, "warmup_ratio": warmup}
    [block] = content["grid"]
    block |= {"seeds": [seed], "epochs": [epochs], "objectives": ["sft", "dpo", "untrained"]}
    if rate:
        block["learning_rates"] = {method: [rate] for method in block["methods"]}
    if init:
        block |= {"methods": ["prompt_tuning"], "inits": [init]}
    return load(write_study(folder, content))
