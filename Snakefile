# The one definition of the batch: a job is one notebook for one base model (or for all of them).
# Its input is its key (batch/plan.py), which changes with all that it depends on, and its only
# output is its mark.
import json
import sys
from pathlib import Path

from driftbook.batch import keys, plan
from driftbook.study.study_file import load

try:
    STUDY = load(config["study"])
    plan.write(STUDY)
except ValueError as error:
    sys.exit(f"driftbook: {error}")


workdir: STUDY.folder


STAGES, ANALYSES = keys.stages(STUDY), keys.analyses(STUDY)
MAKING = STAGES[:-4]  # the stages that make adapters
# the notebook writes the mark itself; :q quotes what a shell would read in a path
JOB = (
    "{sys.executable:q} -m driftbook.batch.warm notebook"
    " {params.notebook:q} {log:q} {params.parameters:q}"
)
NEEDED = {"judge": STUDY.judges, "utility": STUDY.raters}


def notebook(name):
    return str(keys.notebook(name))


def parameters(wildcards, stage=None, **more):
    """The notebook's parameters, as one JSON word of the shell."""
    if stage:
        variants = STUDY.of_stage(stage, wildcards.base)
        more = {"base_model": wildcards.base, "run_ids": [one.run_id for one in variants]}
    return json.dumps({"study": str(config["study"]), **more})


def made_before(stage):
    """The jobs whose results a stage reads."""
    making = MAKING[: STAGES.index(stage)]
    return [f"jobs/{one}/{{base}}.json" for one in (["respond"] if stage == "judge" else making)]


def unprepared(stage):
    """The models to make or check before a stage. A prepared one is no input of the stage: its
    content is in the stage's key, and notebook 01 shown anew trains nothing.
    """
    marks = {model: f"jobs/prepare/{model}.json" for model in STUDY.models}
    wanted = {name for name, mark in marks.items() if not Path(STUDY.folder, mark).exists()}
    others = [marks[name] for name in NEEDED.get(stage, ()) if name in wanted]
    return lambda wildcards: others + [marks[name] for name in wanted & {wildcards.base}]


rule all:
    input:
        "jobs/report.json",
        expand("jobs/prepare/{name}.json", name=STUDY.models),


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
        JOB


for stage in STAGES:

    rule:
        name:
            stage
        input:
            f"keys/{stage}/{{base}}.json",
            made_before(stage),
            unprepared(stage),
        output:
            f"jobs/{stage}/{{base}}.json",
        log:
            f"notebooks/{keys.NOTEBOOKS[stage]}.{{base}}.ipynb",
        params:
            notebook=notebook(keys.NOTEBOOKS[stage]),
            parameters=lambda wildcards, stage=stage: parameters(wildcards, stage),
        resources:
            gpu=1,
        shell:
            JOB


rule collect:
    input:
        key="keys/collect.json",
        jobs=expand("jobs/{stage}/{base}.json", stage=STAGES, base=STUDY.bases),
    output:
        "jobs/collect.json",
    log:
        "notebooks/08_collect.ipynb",
    params:
        notebook=notebook("08_collect"),
        parameters=lambda wildcards: parameters(wildcards),
    shell:
        JOB + " {input.key:q} {output:q}"


for analysis, name in ANALYSES.items():

    rule:
        name:
            analysis
        input:
            "jobs/collect.json",
            [f"jobs/{name}.json" for name in keys.AFTER.get(analysis, ()) if name in ANALYSES],
            key=f"keys/{analysis}.json",
        output:
            f"jobs/{analysis}.json",
        log:
            f"notebooks/{name}.ipynb",
        params:
            notebook=notebook(name),
            parameters=lambda wildcards: parameters(wildcards),
        shell:
            JOB + " {input.key:q} {output:q}"


rule report:
    input:
        expand("jobs/{analysis}.json", analysis=ANALYSES),
        key="keys/report.json",
    output:
        "jobs/report.json",
    params:
        study=str(config["study"]),
    shell:
        "{sys.executable:q} -m driftbook.publishing.report {params.study:q}"
        " && cp {input.key:q} {output:q}"
