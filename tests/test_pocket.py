"""The pocket study's real model on real prompts, one method and few of each, where the package that
ships it is to be had.
"""

import os
from pathlib import Path

import numpy as np
import pytest

from driftbook.benchmarks import data, responding, utility
from driftbook.benchmarks.refusals import is_refusal
from driftbook.models import adapters, loading
from driftbook.models.scoring import Scorer
from driftbook.study import folders, packages, sources
from driftbook.study.reading import yaml_value
from driftbook.study.study_file import Study, find
from driftbook.study.tables import RUNS
from driftbook.training import stage

pytestmark = pytest.mark.slow
SIZES = {"safety": {"n": 3}, "over_refusal": {"n": 4}, "bbq": {"n": 4}, "utility": {"n": 2}}


@pytest.fixture(scope="module")
def pocket(shared) -> Study:
    """The study pocket, with one base model, one method, and few examples and prompts."""
    content = yaml_value(find("pocket"))
    base = dict(content["bases"]["smollm2"])
    if folder := os.environ.get("DRIFTBOOK_MODELS"):
        name = Path(packages.shipped(base["source"]).file).name
        base["path"] = str(next(Path(folder).rglob(name), Path(folder) / name))
    content |= {
        "bases": {"smollm2": base},
        "twins": {},
        "data": {
            name: {**content["data"][name], "n": n} for name, n in (("sft", 8), ("heldout", 2))
        },
        "grid": [{**content["grid"][1], "bases": ["smollm2"], "methods": ["lora"], "seeds": [1]}],
        "benchmarks": {name: {**one, **SIZES[name]} for name, one in content["benchmarks"].items()},
        "mitigations": {},
        "primary": {},
    }
    content["benchmarks"]["bbq"]["permuted"] = 2
    for name in ("safety", "over_refusal", "utility"):
        content["benchmarks"][name]["max_new_tokens"] = 6
    study = Study(**content)
    try:
        sources.locate(study.bases["smollm2"], study)
    except ValueError as error:
        if "registry" not in str(error) and "pip" not in str(error):
            raise  # another file than it should be is no reason to skip
        pytest.skip(str(error))
    return study


def asked(study: Study, scorer: Scorer, variant) -> dict:
    """What a variant answers, and how likely its answers begin as refusals."""
    found = {}
    for name in ("safety", "over_refusal"):
        prompts = data.prompts(name, study)
        found[name] = responding.responses(name, prompts, scorer, variant, study)
        begun = utility.begun_refusals(name, prompts, scorer, variant, study)
        found[f"{name} begins"] = begun.value.to_numpy(float)
    return found


def test_the_base_is_the_same_to_the_bit_before_and_after_a_training_that_moves_it(pocket):
    base = loading.load(pocket.bases["smollm2"], "smollm2", pocket)
    itself, lora = pocket.variants
    before = asked(pocket, Scorer(base.model, base.tokenizer), itself)
    prepared = stage.prepare_all([lora], base, pocket)
    stage.train_variant(lora, base, pocket, prepared)
    record = RUNS.read(folders.folder(pocket, lora)).iloc[0]
    assert not record.no_op
    assert record.n_examples == 8
    with adapters.attached(base.model, folders.adapter(pocket, lora)) as model:
        tuned = asked(pocket, Scorer(model, base.tokenizer), lora)
    after = asked(pocket, Scorer(base.model, base.tokenizer), itself)
    for name in ("safety", "over_refusal"):
        assert list(before[name].response) == list(after[name].response)
        assert np.array_equal(before[f"{name} begins"], after[f"{name} begins"])
        assert not np.allclose(before[f"{name} begins"], tuned[f"{name} begins"], rtol=1e-3)
        assert not is_refusal(list(before["over_refusal"].response)).astype(bool).all()
