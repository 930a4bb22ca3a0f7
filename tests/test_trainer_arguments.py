"""TRL's own arguments: passed through, part of a run's key where given, refused in a sentence."""

import copy
import hashlib
import json

import pytest

from conftest import SMALL, one_sentence
from driftbook.study.study_file import Study, load
from driftbook.training import fit

# since each setting draws seeds of its own; passing none of TRL's arguments must not change them
KNOWN = {
    "miniature": (254, "9a1fc1ed99dff141"),
    "paper": (268, "eeb847e7edf6db40"),
    "safe_lora": (668, "4453eb6b2726ef88"),
}
GIVEN = {"adam_beta2": 0.9, "optim": "adamw_torch", "disable_dropout": False}


def study_with(**arguments) -> Study:
    content = copy.deepcopy(SMALL)
    content["training"]["arguments"] = arguments
    return Study(**content)


@pytest.mark.parametrize("name", KNOWN)
def test_run_ids_of_studies_that_pass_none_are_what_they_were(name):
    found = [variant.run_id for variant in load(name).variants]
    hashed = hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]
    assert (len(found), hashed) == KNOWN[name]


def test_arguments_reach_the_trainer_and_the_key_of_the_objectives_that_have_them(tmp_path):
    plain, study = Study(**SMALL), study_with(**GIVEN)
    for old, new in zip(plain.variants, study.variants, strict=True):
        assert (old.run_id == new.run_id) == (new.method == "none")
        if new.method == "none":
            continue
        passed = json.loads(new.settings)["training"]["arguments"]
        assert ("disable_dropout" in passed) == (new.objective == "dpo")
        made = fit.arguments(new, study, str(tmp_path))
        assert {name: getattr(made, name) for name in passed} == passed


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("adam_beta3", 0.9, ["no argument 'adam_beta3'", "adam_beta"]),
        ("learning_rate", 0.1, ["Driftbook sets learning_rate itself", "learning_rates"]),
        ("weight_decay", 0.1, ["training.weight_decay"]),
        ("loss_type", "ipo", ["loss_type cannot be given", "adam_beta1"]),
        ("optim", "no such", ["TRL refuses", "no such"]),
    ],
)
def test_what_cannot_be_passed_is_refused_in_a_sentence(name, value, words):
    with pytest.raises(ValueError) as error:
        study_with(**{name: value})
    said = one_sentence(error.value.errors()[0]["ctx"]["error"])
    assert all(word in said for word in words), said
