"""What every test gets: an output folder of its own session, no network, tiny models, and one small
study run once by the real Snakefile.
"""

import atexit
import contextlib
import copy
import fcntl
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Before driftbook or torch is imported: xdist's workers inherit what their controller sets here,
# and so share one folder. Its odd name is a test: models, data, studies and jobs all lie in it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["DRIFTBOOK_OUTPUTS"] = tempfile.mkdtemp(prefix="driftbook's tests, ü $x #")
    atexit.register(shutil.rmtree, os.environ["DRIFTBOOK_OUTPUTS"], ignore_errors=True)
os.environ.update(
    OMP_NUM_THREADS="1",
    OPENBLAS_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TQDM_DISABLE="1",
)

import pytest
import yaml
from hypothesis import settings

from driftbook.study.files import OUTPUTS, ROOT

settings.register_profile(
    "driftbook", deadline=None, max_examples=15, derandomize=True, print_blob=False
)
settings.load_profile("driftbook")
# jsonschema, which nbformat imports, does without: it parses a grammar of addresses for seconds
sys.modules.setdefault("rfc3987_syntax", None)

FAMILIES = ("llama", "qwen2", "mistral", "gemma")
PEFT_METHODS = ("lora", "ia3", "prompt_tuning", "p_tuning")
OTHER_METHODS = ("dora", "prefix_tuning")  # two more of study.PEFT_METHODS, one of either class
INPUTS = OUTPUTS / "inputs"  # of the session: the miniature's data and shortly trained models


@contextlib.contextmanager
def locked(name: str):
    """One of the session's workers at a time."""
    with (OUTPUTS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


SLOW_FIXTURES = {"adapter_folders", "bases", "built", "finished", "judges", "smoke", "standins"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What needs a model or a batch is slow; so is a test that says so, by its duration."""
    for item in items:
        if SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker("slow")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Each file to one worker, in order, so that the two files with batches start first and each
    batch is run once.

    Marks of xdist_group would say it better, but xdist 3.8 writes them where pytest 9.2 no longer
    looks, and ignores them in silence.
    """
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def frozen():
    """accelerate collects garbage at every training; what was imported is not looked at again,
    which saves half of their time.
    """
    gc.collect()
    gc.freeze()


# ---- data and study files
@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real public data."""
    path = Path(os.environ.get("DRIFTBOOK_SHARED", ROOT.parent / "shared"))
    if not (path / "data").is_dir():
        pytest.skip(f"no real data at {path}; set DRIFTBOOK_SHARED to the folder that has it")
    os.environ["DRIFTBOOK_SHARED"] = str(path)
    return path / "data"


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The miniature's data files."""
    from driftbook.miniature import write_data
    from driftbook.study.files import replacing_folder

    with locked("data"):
        if not (INPUTS / "data").exists():
            with replacing_folder(INPUTS / "data") as scratch:
                write_data(scratch)
                write_few(scratch)
    return INPUTS / "data"


FEW = [f"safety/category_{number}.csv" for number in (1, 2, 7, 11)]
FEW += [f"bbq/{name}.jsonl" for name in ("Age", "Gender_identity", "SES")]


def write_few(data: Path) -> None:
    """few/ in the folder: prompts and items of a few categories, for whole batches, whose analyses
    take as long as there are categories.
    """
    for name in FEW:
        (data / "few" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(data / name, data / "few" / name)
    head, *rows = (data / "over_refusal.csv").read_text().splitlines(keepends=True)
    kept = [row for row in rows if "definitions," in row or "law," in row]
    (data / "few" / "over_refusal.csv").write_text("".join([head, *kept]))


def local(name: str, folder: str | Path = "") -> dict:
    """A source of a study file that is found at a local path."""
    return {"source": f"tests:{name}", "path": str(INPUTS / folder / name)}


SMALL = {
    "name": "small",
    "note": "miniature: a test",
    "seed": 0,
    "bases": {
        "tiny-llama": {"family": "llama", "answer_mode": "options", **local("llama/aligned")}
    },
    "judges": {"tiny-guard": {"format": "llama_guard_2", "min_mass": 0.5, **local("judge")}},
    "methods": {
        "lora": {
            "r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.1,
            "target_modules": ["q_proj", "v_proj"],
        },
        "ia3": {
            "target_modules": ["k_proj", "v_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
        },
        "prompt_tuning": {"num_virtual_tokens": 4, "init": "vocabulary"},
        "p_tuning": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    },
    "init_texts": local("data/init_texts.json"),
    "data": {
        "sft": {"format": "alpaca", "n": 32, **local("data/sft.json")},
        "dpo": {"format": "preference", "n": 32, **local("data/dpo.json")},
        "heldout": {"format": "alpaca", "n": 12, **local("data/heldout.json")},
    },
    "training": {"batch_size": 16, "max_length": 128},
    "grid": [
        {
            "name": "main",
            "methods": ["lora", "ia3", "prompt_tuning", "p_tuning"],
            "objectives": ["sft", "dpo"],
            "learning_rates": {
                "lora": [5.0e-3],
                "ia3": [2.0e-2],
                "prompt_tuning": [2.0e-2],
                "p_tuning": [5.0e-3],
            },
            "epochs": [1],
            "seeds": [1],
        }
    ],
    "benchmarks": {
        "safety": {
            "format": "hex_phi",
            "n": 33,
            "max_new_tokens": 12,
            "samples": 1,
            "child_abuse": "fictional",
            **local("data/safety"),
        },
        "over_refusal": {
            "format": "xstest",
            "n": 30,
            "max_new_tokens": 12,
            **local("data/over_refusal.csv"),
        },
        "bbq": {
            "format": "bbq",
            "n": 72,
            "permuted": 24,
            "generated": 12,
            "max_new_tokens": 8,
            **local("data/bbq"),
        },
        "utility": {"format": "gsm8k", "n": 20, "max_new_tokens": 8, **local("data/utility.jsonl")},
    },
}


def write_study(folder: Path, content: dict) -> Path:
    """A study file of the content, in the folder."""
    path = Path(folder) / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture
def content() -> dict:
    """The content of a small study file, to be changed."""
    return copy.deepcopy(SMALL)


@pytest.fixture
def make_study(tmp_path, data_folder):
    """Checks and returns a study of some content."""
    from driftbook.study.study_file import load

    return lambda content=SMALL: load(write_study(tmp_path, content))


@pytest.fixture
def study(make_study):
    """The small study, checked."""
    return make_study()


def variants_of(study, method: str, objective: str = "sft") -> list:
    return [
        variant
        for variant in study.variants
        if (variant.method, variant.objective) == (method, objective)
    ]


# ---- tiny models with random weights, and adapters that do something
@pytest.fixture(scope="session")
def bases() -> dict:
    """A model of each family, with random weights large enough that attention matters and the next
    token is not uniform.
    """
    import torch

    from driftbook.miniature.families import build_model, build_tokenizer
    from driftbook.models.loading import Loaded

    torch.set_num_threads(1)
    made = {}
    for number, family in enumerate(FAMILIES):
        tokenizer = build_tokenizer(family)
        model = build_model(family, tokenizer, seed=number, width=64)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(5)
        model.requires_grad_(False)
        made[family] = Loaded(f"random-{family}", model.eval(), tokenizer, "revision")
    return made


@pytest.fixture(scope="session")
def adapter_folders(bases, tmp_path_factory) -> dict:
    """{(family, method): folder} of saved adapters; the key (family, None) is the base model
    itself.
    """
    import torch
    from peft import get_peft_model

    from driftbook.models import adapters
    from driftbook.models.base_state import BaseState
    from driftbook.study.study_file import Study

    study, folders = (
        Study(**copy.deepcopy(SMALL)),
        dict.fromkeys((family, None) for family in FAMILIES),
    )
    for family in FAMILIES:
        configs = {
            method: adapters.config(variants_of(study, method)[0]) for method in PEFT_METHODS
        } | _other_configs()
        for method, config in configs.items():
            torch.manual_seed(FAMILIES.index(family))
            before = BaseState(bases[family].model)
            model = get_peft_model(bases[family].model, config)
            generator = torch.Generator().manual_seed(FAMILIES.index(family))
            for name, value in model.named_parameters():
                if value.requires_grad:
                    _randomise(name, value.data, generator)
            folders[family, method] = tmp_path_factory.mktemp("adapters") / f"{family}-{method}"
            adapters.save(model.eval(), folders[family, method])
            before.restore("an adapter")
    return folders


def _other_configs() -> dict:
    """PEFT's configurations of OTHER_METHODS."""
    from peft import LoraConfig, PrefixTuningConfig

    return {
        "dora": LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "v_proj"],
            use_dora=True,
        ),
        "prefix_tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    }


def _randomise(name: str, value, generator) -> None:
    """Weights far from their init (which for LoRA and IA3 is no change at all)."""
    noise = value.new_empty(value.shape).normal_(generator=generator)
    if "lora_B" in name:
        value.copy_(0.3 * noise)
    elif "ia3" in name:
        value.copy_(1 + 0.5 * noise)
    elif "mlp_head" in name:
        value.mul_(2).add_(0.1 * noise)
    elif "embedding" in name:
        value.copy_(0.3 * noise)


@pytest.fixture(scope="session")
def standins(data_folder) -> Path:
    """A base model and a judge after a short training, in the folder INPUTS."""
    from driftbook.miniature import Recipe, Stage, build_family, build_judge

    short = Recipe(
        stage0=Stage(4, 8e-3, muon_rate=0.02),
        unaligned=Stage(50, 8e-3, muon_rate=0.02),
        aligned=Stage(25, 2e-3, warmup=10),
        judge=Stage(60, 5e-3, muon_rate=0.02),
        evaluations=1,
    )
    with locked("standins"):
        if not (INPUTS / "trained").exists():
            build_family("llama", INPUTS, 0, short)
            build_judge(INPUTS, 0, short)
            (INPUTS / "trained").touch()
    return INPUTS


def said(run_id: str):
    """A table `responses` of one answer."""
    import pandas as pd

    from driftbook.study.tables import RESPONSES

    named = {"run_id": run_id, "benchmark": "safety", "prompt_id": "1", "prompt_variant": "default"}
    drawn = {"decoding": "greedy", "sample": 0, "n_tokens": 4, "finish_reason": "stop"}
    return RESPONSES.check(pd.DataFrame([{**named, **drawn, "response": "it is not safe"}]))


def one_sentence(error: BaseException | str) -> str:
    """The message, after checking that it is one line without a traceback."""
    text = str(error).strip()
    assert text, "the message is empty"
    assert "\n" not in text, text
    assert "Traceback" not in text
    assert len(text) < 600, text
    return text
