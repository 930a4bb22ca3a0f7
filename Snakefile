# The one definition of the batch: a job is one notebook for a shard of the variants of one base
# model, or for all of them. Its input is its key, which changes with all that it depends on, and
# its only output is its mark. `make study` plans before it runs this file (batch/plan.py): here
# only what it planned is read, so that a node of a cluster that reads the file again changes
# nothing.
import json
import sys
from pathlib import Path
from urllib.parse import unquote

from driftbook.batch import keys, shards
from driftbook.study.study_file import load

try:
    STUDY_FILE = unquote(config["study"])  # quoted, so that no shell and no YAML reads it otherwise
    STUDY = load(STUDY_FILE)
    if (SHARDS := shards.read_shards(STUDY)) is None:
        raise ValueError(f"the study {STUDY.name} is not planned; run make study")
except ValueError as error:
    sys.exit(f"driftbook: {error}")


workdir: STUDY.folder


STAGES, ANALYSES = keys.stages(STUDY), keys.analyses(STUDY)
JOBS = [job for stage in STAGES for base in STUDY.bases for job in SHARDS.jobs(stage, base)]
# :q quotes what a shell would read in a path
JOB = (
    "{sys.executable:q} -m driftbook.batch.warm notebook"
    " {params.notebook:q} {log:q} {params.parameters:q}"
)
MARKED = JOB + " {input.key:q} {output:q}"
# what a job asks of a cluster, where make study wrote it
REQUESTS = Path("requests.json")
ASKED = json.loads(REQUESTS.read_text()) if REQUESTS.exists() else {}
NEEDED = {"judge": STUDY.judges, "utility": STUDY.raters}


def notebook(name):
    return str(keys.notebook(name))


def parameters(**more):
    """The notebook's parameters, as one JSON word of the shell."""
    return json.dumps({"study": STUDY_FILE, **more})


def of_base(stage):
    """The parameters of a stage's jobs, each for its base model."""
    return lambda wildcards: parameters(base_model=wildcards.base, **keys.parameters(stage))


def made_before(stage):
    """The marks of the jobs whose results a job of a stage reads."""
    return lambda wildcards: [
        f"jobs/{job}.json"
        for job in SHARDS.before(f"{stage}/{wildcards.base}/{wildcards.shard}", STUDY)
    ]


def unprepared(stage):
    """The models to make or check before a stage. A prepared one is no input of the stage: its
    content is in the stage's key, and notebook 01 shown anew trains nothing.
    """
    marks = {model: f"jobs/prepare/{model}.json" for model in STUDY.models}
    wanted = {name for name, mark in marks.items() if not Path(STUDY.folder, mark).exists()}
    others = [marks[name] for name in NEEDED.get(stage, ()) if name in wanted]
    return lambda wildcards: others + [marks[name] for name in wanted & {wildcards.base}]


def asks(stage):
    """The resources of a rule's jobs: on a cluster from the plan, and on one machine a GPU each."""
    jobs = {job: one for job, one in ASKED.items() if job.partition("/")[0] == stage}
    if not jobs:
        return {"gpu": 1} if stage in STAGES else {}

    def value(wildcards, name):
        return jobs["/".join([stage, *wildcards])][name]

    return {
        name: lambda wildcards, name=name: value(wildcards, name)
        for name in next(iter(jobs.values()))
    }


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
        parameters=lambda wildcards: parameters(models=[wildcards.name]),
    resources:
        **asks("prepare"),
    shell:
        JOB


for stage in STAGES:

    rule:
        name:
            stage
        input:
            made_before(stage),
            unprepared(stage),
            key=f"keys/{stage}/{{base}}/{{shard}}.json",
        output:
            f"jobs/{stage}/{{base}}/{{shard}}.json",
        log:
            f"notebooks/{keys.page(stage)}.{{base}}.{{shard}}.ipynb",
        params:
            notebook=notebook(keys.NOTEBOOKS[stage]),
            parameters=of_base(stage),
        resources:
            **asks(stage),
        shell:
            MARKED


rule collect:
    input:
        key="keys/collect.json",
        jobs=expand("jobs/{job}.json", job=JOBS),
    output:
        "jobs/collect.json",
    log:
        "notebooks/08_collect.ipynb",
    params:
        notebook=notebook("08_collect"),
        parameters=lambda wildcards: parameters(),
    resources:
        **asks("collect"),
    shell:
        MARKED


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
            parameters=lambda wildcards: parameters(),
        resources:
            **asks(analysis),
        shell:
            MARKED


rule report:
    input:
        expand("jobs/{analysis}.json", analysis=ANALYSES),
        key="keys/report.json",
    output:
        "jobs/report.json",
    params:
        study=STUDY_FILE,
    resources:
        **asks("report"),
    shell:
        "{sys.executable:q} -m driftbook.publishing.report {params.study:q}"
        " {input.key:q} {output:q}"
