"""Result files in PEFT's form, of made-up numbers."""

import json

import pytest

from driftbook.rereading import peft_results

KINDS = {
    "LORA": {"r": 8},
    "IA3": {},
    "PROMPT_TUNING": {"num_virtual_tokens": 20, "prompt_tuning_init": "RANDOM"},
    "P_TUNING": {"num_virtual_tokens": 20},
    "ODDMENT": {"r": 2},
    "OTHER_THING": {"adapter_len": 5},
    "THIRD": {},
    "FOURTH": {},
    "FIFTH": {},
}


def learning_curve(valid) -> list[dict]:
    """Metrics of each validation, from how many of its 50 answers were right."""
    return [
        {
            "step": 250 * (i + 1),
            "valid accuracy": share / 50,
            "train loss": 1.0 / (i + 1),
            "train samples": 1000 * (i + 1),
            "train time": 30.0,
            "tokens / sec": 7000.0,
        }
        for i, share in enumerate(valid)
    ]


def last_metrics(k, lost, n_validations) -> dict:
    """Metrics of the test after training, with `k` right answers of 1319."""
    return {
        "step": 250 * n_validations,
        "test accuracy": k / 1319,
        "train loss": 0.5,
        "train samples": 1000 * n_validations,
        "train total tokens": 630_000,
        "forgetting": lost,
    }


def run_info(method, variant, rate, status) -> dict:
    config = None if method is None else {"peft_type": method, "peft_version": "0", **KINDS[method]}
    return {
        "created_at": "2026-07-15T05:41:18+00:00",
        "total_time": 200.0,
        "experiment_name": f"{(method or 'full').lower()}/made-1B-{variant}",
        "error_msg": "" if status == "success" else "out of memory\nat a place",
        "train_config": {
            "model_id": "maker/Made-1B",
            "seed": 0,
            "max_steps": 750,
            "batch_size": 4,
            "query_template": "{query}",
            "optimizer_type": "AdamW",
            "optimizer_kwargs": {"lr": rate},
        },
        "peft_config": config,
    }


def result(
    method="LORA",
    variant="rank8",
    k=600,
    lost=0.05,
    n_trainable=1_000_000,
    rate=1e-4,
    memory=22 * 10**9,
    valid=(10, 15, 20),
    status="success",
) -> dict:
    """The content of one result file; a run without success has no last metrics."""
    curve = learning_curve(valid)
    last = last_metrics(k, lost, len(valid))
    return {
        "run_info": run_info(method, variant, rate, status),
        "train_info": {
            "accelerator_memory_max": memory,
            "accelerator_memory_reserved_avg": 14e9,
            "train_time": 150.0,
            "file_size": 4_000_000,
            "num_trainable_params": n_trainable,
            "status": status,
            "metrics": [*curve, last] if status == "success" else curve,
        },
        "meta_info": {
            "model_info": {"sha": "a" * 40},
            "dataset_info": {"metamath": {"sha": "b" * 40}, "gsm8k": {"sha": "c" * 40}},
            "package_info": {"peft-version": "0"},
            "system_info": {"accelerator": "a card"},
        },
    }


def write(folder, **records: dict):
    folder.mkdir(exist_ok=True)
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def few(tmp_path):
    """Three runs, one of which failed."""
    return write(
        tmp_path / "results",
        one=result(),
        two=result("P_TUNING", "default", k=0, lost=0.2),
        three=result("LORA", "rank8-lost", status="canceled"),
    )


@pytest.fixture(scope="module")
def real(shared):
    """PEFT's own files."""
    folder = shared / peft_results.PEFT_NAME
    if not folder.is_dir():
        pytest.skip(f"no result files of PEFT at {folder}")
    return folder
