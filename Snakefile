# The one definition of the batch: a job is one notebook for one base model (or for all of them), and its only output is its mark.
import json
import sys
from pathlib import Path

from driftbook.batch import plan
from driftbook.batch.keys import AFTER, analyses, stages
from driftbook.study import code
from driftbook.study.files import ROOT
from driftbook.study.study_file import load

try:
    STUDY = load(config["study"])
    plan.write(STUDY)
except ValueError as error:
    sys.exit(f"driftbook: {error}")

workdir: STUDY.folder


NOTEBOOKS = Path(ROOT, "notebooks")
RUN = f"{sys.executable} -m driftbook.batch.warm notebook"
NAMES = {"train": "02_train", "mitigate": "03_mitigate", "respond": "04_respond", "judge": "05_judge", "answer": "06_answer", "utility": "07_utility"}
STAGES = {stage: NAMES[stage] for stage in stages(STUDY)}
MADE = list(STAGES)[:-4]  # the stages that make adapters
NEEDED = {"judge": [f"jobs/prepare/{judge}.json" for judge in STUDY.judges], "utility": [f"jobs/prepare/{rater}.json" for rater in STUDY.raters]}


def notebook(name):
    return str(NOTEBOOKS / f"{name}.ipynb")


def read_by(name):
    """The files of the library that a notebook's results depend on, found by its imports."""
    return [str(code.path(module)) for module in sorted(code.closure(code.of_notebook(NOTEBOOKS / f"{name}.ipynb")))]


def parameters(wildcards, stage=None, **more):
    """The notebook's parameters, as one JSON word of the shell."""
    if "base" in wildcards.keys():
        more |= {"base_model": wildcards.base, "run_ids": [variant.run_id for variant in STUDY.of_stage(stage, wildcards.base)]}
    return json.dumps({"study": str(config["study"]), **more})


rule all:
    input:
        "jobs/report.json",


rule prepare:
    input:
        "keys/prepare/{name}.json",
    output:
        "jobs/prepare/{name}.json",
    log:
        "notebooks/01_prepare.{name}.ipynb",
    params:
        notebook=notebook("01_prepare"),
        parameters=lambda wildcards: parameters(wildcards, models=[wildcards.name]),
    shell:
        "{RUN} {params.notebook} {log} {params.parameters:q}"


for stage, name in STAGES.items():
    rule:
        name:
            stage
        input:
            f"keys/{stage}/{{base}}.json",
            "jobs/prepare/{base}.json",
            ["jobs/respond/{base}.json"] if stage == "judge" else [f"jobs/{made}/{{base}}.json" for made in MADE if list(STAGES).index(made) < list(STAGES).index(stage)],
            NEEDED.get(stage, []),
        output:
            f"jobs/{stage}/{{base}}.json",
        log:
            f"notebooks/{name}.{{base}}.ipynb",
        params:
            notebook=notebook(name),
            parameters=lambda wildcards, stage=stage: parameters(wildcards, stage),
        resources:
            gpu=1,
        shell:
            "{RUN} {params.notebook} {log} {params.parameters:q}"


rule collect:
    input:
        "keys/analysis.json",
        notebook("08_collect"),
        read_by("08_collect"),
        expand("jobs/{stage}/{base}.json", stage=STAGES, base=STUDY.bases),
    output:
        "jobs/collect.json",
    log:
        "notebooks/08_collect.ipynb",
    params:
        notebook=notebook("08_collect"),
        parameters=lambda wildcards: parameters(wildcards),
    shell:
        "{RUN} {params.notebook} {log} {params.parameters:q} && echo '{{}}' > {output}"


for analysis, name in analyses(STUDY).items():
    rule:
        name:
            analysis
        input:
            "jobs/collect.json",
            notebook(name),
            read_by(name),
            [f"jobs/{earlier}.json" for earlier in AFTER.get(analysis, ()) if earlier in analyses(STUDY)],
        output:
            f"jobs/{analysis}.json",
        log:
            f"notebooks/{name}.ipynb",
        params:
            notebook=notebook(name),
            parameters=lambda wildcards: parameters(wildcards),
        shell:
            "{RUN} {params.notebook} {log} {params.parameters:q} && echo '{{}}' > {output}"


rule report:
    input:
        expand("jobs/{analysis}.json", analysis=analyses(STUDY)),
        [str(code.path(module)) for module in sorted(code.closure(["driftbook.publishing.report"]))],
    output:
        "jobs/report.json",
    params:
        study=str(config["study"]),
    shell:
        "{sys.executable} -m driftbook.publishing.report {params.study:q} && echo '{{}}' > {output}"
