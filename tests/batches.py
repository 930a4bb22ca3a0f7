"""One small study with everything in it, run once through the real Snakefile for all tests that
need a finished one.
"""

import contextlib
import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import SMALL, local, locked, write_study
from driftbook.study.files import OUTPUTS, ROOT

BLOCK = {"methods": ["lora"], "objectives": ["sft"], "epochs": [1], "seeds": [1]}
RATES = {"lora": 5.0e-3, "ia3": 2.0e-2, "prompt_tuning": 2.0e-2, "p_tuning": 5.0e-3}


def block(name: str, *methods: str, base: str = "tiny-llama", **more) -> dict:
    """A block of the grid: some methods at the small study's rates."""
    rates = {method: [RATES[method]] for method in methods}
    return BLOCK | {
        "name": name,
        "bases": [base],
        "methods": list(methods),
        "learning_rates": rates,
        **more,
    }


def few(name: str) -> dict:
    """A source of a few of a benchmark's categories (conftest.write_few)."""
    return local(f"data/few/{name}")


SAFE_LORA = {"kind": "safe_lora", "blocks": ["main"], "pair": "alignment", "select": "top"}
MITIGATIONS = {
    "safe_lora": SAFE_LORA
    | {
        "values": [2],
        "controls": [
            "same norm",
            "same modules zeroed",
            "random modules zeroed",
            "random subspace",
            "noise",
        ],
    },
    "of_all": SAFE_LORA | {"values": [4], "controls": ["same modules zeroed"]},
    "of_ia3": SAFE_LORA | {"blocks": ["ia3"], "values": [2], "controls": ["same norm"]},
    "subspace": {
        "kind": "safe_lora",
        "blocks": ["main"],
        "pair": "instruction",
        "operator": "subspace",
        "rank": 8,
        "values": [0.5],
        "controls": ["random subspace"],
    },
    "exact": {
        "kind": "safe_lora",
        "blocks": ["main"],
        "pair": "placebo",
        "operator": "exact",
        "values": [1.0],
    },
    "zero": SAFE_LORA | {"kind": "zero", "values": [1]},
    "rescale": {"kind": "rescale", "blocks": ["main"], "values": [0.25, 0.75]},
    "average": {"kind": "average", "blocks": ["main"], "values": [1.0], "snapshots": 2},
    "resta": {"kind": "resta", "blocks": ["main"], "safety": "safe", "values": [0.5]},
    "safe_merge": SAFE_LORA | {"kind": "safe_merge", "safety": "safe", "values": [2]},
    "intruders": {"kind": "reduce_intruders", "blocks": ["main"], "values": [0.75]},
    "template": {
        "kind": "template",
        "blocks": ["main", "prompts"],
        "system_prompt": "please be careful and help people .",
    },
    "mixing": {"kind": "mixing", "blocks": ["main"], "data": "safety", "values": [0.2]},
    "constrained": {"kind": "constrained_sft", "blocks": ["main", "prompts"]},
    "soup": {"kind": "soup", "blocks": ["main"], "safety": "safe", "values": [0.5]},
    "mod": {"kind": "mod", "blocks": ["main"], "safety": "safe", "values": [0.5]},
    "safegrad": {"kind": "safegrad", "blocks": ["main"], "data": "safety", "values": [1.0]},
    "again": {
        "kind": "second_tuning",
        "blocks": ["main"],
        "of": ["resta", "mixing"],
        "data": "sft",
        "values": [5.0e-3],
    },
}

SMOKE = copy.deepcopy(SMALL) | {"name": "smoke", "mitigations": MITIGATIONS}
SMOKE["bases"]["tiny-llama"]["pairs"] = {
    "alignment": {"unaligned": local("llama/unaligned")},
    "instruction": {"unaligned": local("llama/stage0")},
    "placebo": {"aligned": local("llama/unaligned"), "unaligned": local("llama/stage0")},
}
SMOKE["bases"]["tiny-other"] = {
    "family": "llama",
    "answer_mode": "letters",
    **local("llama/unaligned"),
}
SMOKE["primary"] = {"safety": {"test": "change", "outcomes": ["unsafe"]}}
SMOKE["data"]["safety"] = {"format": "alpaca", "n": 16, **local("data/safety_sft.json")}
SMOKE["grid"] = [
    block("main", "lora"),
    block("ia3", "ia3"),
    block("prompts", "prompt_tuning"),
    block("safe", "lora", data=["safety"]),
    block("p_tuning", "p_tuning"),
    block("preferences", *RATES, objectives=["dpo"]),
    block("other", "lora", base="tiny-other", seeds=[1, 2]),
    block("untrained", "prompt_tuning", objectives=["untrained"], inits=["safety_text"]),
]
SMOKE["judges"]["tiny-guard"]["min_mass"] = 0.1  # it was trained for seconds
SMOKE["benchmarks"]["gain"] = {"format": "answers", "n": 12, **local("data/heldout.json")}
for _name, _sizes in {
    "safety": {"n": 22, "truth": "miniature:data/safety_truth.csv", **few("safety")},
    "over_refusal": {"n": 15, "max_new_tokens": 6, **few("over_refusal.csv")},
    "bbq": {
        **few("bbq"),
        "n": 36,
        "permuted": 8,
        "generated": 4,
        "max_new_tokens": 4,
        "min_mass": 0.0,
    },
    "utility": {"n": 10, "max_new_tokens": 4},
}.items():
    SMOKE["benchmarks"][_name] |= _sizes


class Batch:
    """A study and how to run it as `make study` does, in an output folder."""

    profile = "local"

    def __init__(self, outputs: Path, content: dict):
        self.outputs, self.content = outputs, copy.deepcopy(content)
        outputs.mkdir(parents=True, exist_ok=True)
        self.folder, self.file = outputs / content["name"], write_study(outputs, content)
        # by its folder all processes of a batch are found
        self.environment = {**os.environ, "DRIFTBOOK_OUTPUTS": str(outputs)}

    def edit(self, change) -> None:
        """Change the content and write the study file again."""
        change(self.content)
        write_study(self.outputs, self.content)

    def command(self, *targets: str) -> list[str]:
        return [
            sys.executable,
            "-m",
            "driftbook.batch.make_study",
            str(self.file),
            self.profile,
            *targets,
        ]

    def run(self, *targets: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(*targets),
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
        )

    def start(self, *targets: str) -> subprocess.Popen:
        """A batch that goes on in the background, in a process group of its own."""
        with (self.outputs / "driver.log").open("a") as log:
            return subprocess.Popen(
                self.command(*targets),
                env=self.environment,
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def processes(self) -> list[int]:
        """Every process that was started for this batch and still runs, however it is related to
        the driver.
        """
        mark, found = f"DRIFTBOOK_OUTPUTS={self.outputs}\0".encode(), []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (
                    mark in (path / "environ").read_bytes() + b"\0"
                    and int(path.name) != os.getpid()
                    and "Z" not in (path / "stat").read_text().rpartition(")")[2][:3]
                ):
                    found.append(int(path.name))
        return found

    def study(self):
        from driftbook.study.study_file import load

        return load(self.file)

    def of(self, method: str, objective: str = "sft"):
        """The first variant of a method."""
        return next(
            v
            for v in self.study().variants
            if v.method == method and v.objective in (objective, "none") and not v.mitigation
        )

    def run_folder(self, variant) -> Path:
        return self.folder / "runs" / variant.run_id

    def marks(self, stage: str) -> dict[str, int]:
        """When the mark of each run in a stage was written, in nanoseconds."""
        return {
            path.parent.name: path.stat().st_mtime_ns
            for path in sorted(self.folder.glob(f"runs/*/{stage}.done.json"))
        }

    def tables(self) -> dict:
        """The comparable form of each table that the batch collected."""
        from driftbook.study.tables import TABLES

        present = [
            table for table in TABLES.values() if table.path(self.folder / "tables").exists()
        ]
        return {
            table.name: table.comparable(table.read(self.folder / "tables")) for table in present
        }


@pytest.fixture(scope="session")
def new_batch(standins):
    """Makes a batch of a study in an output folder."""
    return Batch


def run_once() -> dict:
    """How the study's first run ended, by whichever of the session's workers came first."""
    from driftbook.batch.preparing import write_data
    from driftbook.study.files import read_json, write_json
    from driftbook.study.sources import made_folder

    with locked("smoke"):
        record = OUTPUTS / "smoke.first.json"
        if not record.exists():
            batch = Batch(OUTPUTS, SMOKE)
            write_data(made_folder(batch.study(), "miniature"))  # the truth is looked up there
            ended = batch.run()
            shutil.copytree(batch.folder, OUTPUTS / "finished")
            words = {"stdout": ended.stdout, "stderr": ended.stderr}
            write_json(record, {"status": ended.returncode, **words})
        return read_json(record)


@pytest.fixture(scope="session")
def smoke(standins) -> Batch:
    """The study after its first run; tests/test_batch.py alone edits it and runs it again."""
    first = run_once()
    batch = Batch(OUTPUTS, SMOKE)
    batch.first = first
    return batch


@pytest.fixture(scope="session")
def finished(standins) -> Batch:
    """A copy of what the study's first run left, under another name, for all other tests."""
    ended = run_once()
    assert ended["status"] == 0, ended["stdout"][-2000:] + ended["stderr"][-3000:]
    batch = Batch(OUTPUTS / "of_finished", SMOKE | {"name": "finished"})
    batch.folder = OUTPUTS / "finished"
    return batch


def said(ended: subprocess.CompletedProcess) -> str:
    """How a batch ended, for the message of a failed test."""
    return f"exit {ended.returncode}\n{ended.stdout[-2000:]}\n{ended.stderr[-3000:]}"
