"""QLoRA: a base model in 4 or 8 bits is loaded, trained over, attached and scored by the same code,
and is itself scored as it is.
"""

import copy

import numpy as np
import pytest
import torch

from conftest import SMALL, variants_of, write_study
from driftbook.models import adapters, loading
from driftbook.models.scoring import Scorer
from driftbook.study.study_file import load
from driftbook.training import examples
from driftbook.training import fit as fitting

pytestmark = pytest.mark.slow

pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is not installed, so no base model can be quantized"
)


@pytest.fixture(scope="module", params=["nf4", "int8"])
def study(request, bases, data_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    bases["llama"].model.save_pretrained(folder)
    bases["llama"].tokenizer.save_pretrained(folder)
    content = copy.deepcopy(SMALL)
    content["bases"] = {
        "small": {
            "family": "llama",
            "source": "tests:llama",
            "path": str(folder),
            "quantization": request.param,
        }
    }
    content["methods"] = {
        "qlora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "prompt_tuning": content["methods"]["prompt_tuning"],
    }
    content["grid"][0] |= {
        "methods": ["qlora", "prompt_tuning"],
        "learning_rates": {"qlora": [5e-2], "prompt_tuning": [5e-2]},
    }
    return load(write_study(tmp_path_factory.mktemp("study"), content))


@pytest.fixture(scope="module")
def base(study):
    return loading.load(study.bases["small"], "small", study)


def test_the_weights_are_in_few_bits_and_the_answers_near_those_of_the_whole_model(base, bases):
    kinds = {type(module).__name__ for module in base.model.modules()}
    assert kinds & {"Linear4bit", "Linear8bitLt"}
    pairs = [([5, 6, 7, 8], [9, 10, 11]), ([20, 21], [22])]
    whole, few = (
        np.concatenate(Scorer(one.model, one.tokenizer).token_logprobs(pairs))
        for one in (bases["llama"], base)
    )
    assert np.abs(whole - few).max() > 1e-6
    assert np.abs(whole - few).mean() < 3


@pytest.mark.parametrize(
    ("method", "objective"), [("qlora", "sft"), ("qlora", "dpo"), ("prompt_tuning", "sft")]
)
def test_a_variant_is_trained_over_it_in_fp32_and_scored_again(
    base, study, tmp_path, method, objective
):
    [variant] = variants_of(study, method, objective)
    ids = torch.tensor([list(range(20, 50))])
    with torch.no_grad():
        before = base.model(ids).logits
    done = fitting.train(
        variant, base, examples.prepare(objective, base, study), study, tmp_path / "adapter"
    )
    assert done.record["status"] == "ok"
    assert not done.record["no_op"]
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, before), (
            "the base model must not drift while adapters come and go"
        )
    from safetensors.torch import load_file

    assert {
        value.dtype for value in load_file(tmp_path / "adapter" / adapters.WEIGHTS).values()
    } == {torch.float32}
    with adapters.attached(base.model, tmp_path / "adapter") as model:
        nll = -np.concatenate(
            Scorer(model, base.tokenizer).token_logprobs(examples.held_out(base, study)[0])
        ).mean()
    assert nll == pytest.approx(done.record["nll"], abs=1e-4)
