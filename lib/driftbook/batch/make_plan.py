"""`make plan`: what a study is, what it needs and what it will cost, before any work."""

import os
import sys
from collections import Counter

import pandas as pd

from driftbook.batch import checking, cluster, costing, gpus, keys, plan, rates, schedule, sizes
from driftbook.batch.cluster import Cluster
from driftbook.batch.lengths import is_here
from driftbook.batch.plan import read_mark
from driftbook.batch.rates import USUAL, Rates
from driftbook.batch.shards import dealt
from driftbook.study import access
from driftbook.study.commands import command
from driftbook.study.sections import Source
from driftbook.study.study_file import Study, load


def finished(study: Study, on: str | None = None) -> pd.Series:
    """Variants whose result is there and still holds, by stage; `on` is the kind of device on which
    jobs run, where it is not this machine's.
    """
    counts = dict.fromkeys(keys.stages(study), 0)
    for stage in counts:
        if not any((study.folder / "runs").glob(f"*/{stage}.done.json")):
            continue  # what a key is made of may have to be fetched first
        for base_model in study.bases:
            try:
                shared = keys.settings(stage, study, base_model, on=on)
            except ValueError:  # a model or set that is not there yet: nothing can be finished
                continue
            for variant in study.of_stage(stage, base_model):
                path = study.folder / "runs" / variant.run_id / f"{stage}.done.json"
                mark = read_mark(path) or {}
                counts[stage] += mark.get("key") == keys.result_key(shared, variant)
    return pd.Series(counts)


def needed(study: Study) -> list[tuple[str, str, Source]]:
    """Every source that a study reads: name, kind (model or dataset), source."""
    models = [(name, "model", one) for name, one in study.models.items()]
    models += [
        (f"{name}, {part}", "model", one)
        for name, base in study.bases.items()
        for part, one in base.checkpoints.items()
    ]
    data = [(f"data.{name}", "dataset", study.data[name]) for name in _read_data(study)]
    asked = [(f"benchmarks.{name}", "dataset", one) for name, one in study.benchmarks.items()]
    return models + data + asked


def _read_data(study: Study) -> list[str]:
    """The names under `data` that are read: by a training or a repair, and the held-out answers."""
    read = {variant.dataset for variant in study.variants}
    read |= {one.data for one in study.mitigations.values()} | {"heldout"}
    return [name for name in study.data if name in read]


def chosen_rates(name: str | None, study: Study, asked: Cluster | None = None) -> Rates:
    """The rates of a device by name; where none is given those of a cluster's GPU, as published, or
    of this machine, which are measured where they are not known yet.

    Raises:
        ValueError: its rates are not known.
    """
    name = name or ("L40S" if asked and asked.gpu_memory else None)
    known = {"here": None, "L40S": rates.published_rates}
    if name and name not in known:
        raise ValueError(
            f"DEVICE={name!r}: its rates are not known, only those of {', '.join(known)} (this"
            " machine); run make plan there, which measures it"
        )
    if name == "L40S" and not (rates.PUBLISHED / "runs.parquet").is_file():
        raise ValueError(
            "DEVICE='L40S': the published runs that its rates are read from are not here; leave"
            " DEVICE out, and this machine is measured"
        )
    if name == "L40S":
        return rates.published_rates()
    from driftbook.batch import calibrating

    return calibrating.machine_rates(study)


# ---- the page
LONG = 100.0  # hours on a CPU, beyond which a study is one for a GPU


def pages(
    study: Study, found: Rates, price: float | None, to_run: str = "", asked: Cluster | None = None
) -> str:
    """The plan in words and tables, for this machine or for a cluster."""
    on, memory = (asked.device, asked.memory) if asked else (None, gpus.gpu_memory())
    parts = [
        [f"{study.name}: {study.note}", *_variants(study)],
        _hours(study, found, price, asked),
        [*_doubts(study), *_resources(study, found.on_cpu)],
        [_finished(study, on), *([f"jobs to run: {to_run}"] if to_run else [])],
        *_sources(study, memory),
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def _variants(study: Study) -> list[str]:
    rows = pd.DataFrame([variant.row() for variant in study.variants])
    made = Counter(one.made_in for one in study.variants if one.made_in != "train" or one.dataset)
    trained, repaired, again = (made[stage] for stage in ("train", "mitigate", "retune"))
    untrained, n_bases = int((rows.objective == "untrained").sum()), len(study.bases)
    bases = "the base model itself" if n_bases == 1 else f"the {n_bases} base models themselves"
    counted = (
        f"{len(rows)} variants: {trained} runs to train"
        + (f", {repaired} repairs of them" if repaired else "")
        + (f", {again} second tunings" if again else "")
        + (f", {untrained} adapters as they are initialised" if untrained else "")
        + f", and {bases}"
        + (f", {study.base_repetitions} times" if study.base_repetitions > 1 else "")
    )
    by_method = rows.groupby(["base_model", "method"], sort=False).size().unstack(fill_value=0)
    return [counted, "", by_method.to_string()]


def _hours(study: Study, found: Rates, price: float | None, asked: Cluster | None) -> list[str]:
    table = costing.hours(study, found)
    n, where = _at_once(found, asked)
    plan = schedule.jobs(study, found, dealt(study, n, keep=False))
    total = sum(job.seconds for job in plan.values()) / 3600
    money = f", {_short(price * total)} at {price:g} an hour" if price else ""
    unit = "one core" if found.on_cpu else "one device"
    at_once = schedule.finish(plan, n) / 3600
    return [
        f"planned for {found.name} ({found.how})"
        + ("; DEVICE=L40S plans for that GPU" if found.on_cpu and at_once > LONG else ""),
        f"hours of {unit}",
        table.assign(all=table.sum(axis=1)).map(_short).to_string(),
        "",
        f"in all {_short(total)} hours of {unit}, with preparing and analyses"
        + (money or " (PRICE=... of an hour gives money)"),
        f"about {_duration(at_once)} on {where}, at the end of which the report is there",
    ]


def _at_once(found: Rates, asked: Cluster | None) -> tuple[int, str]:
    """How many jobs run at a time where these rates hold, and where that is in words."""
    if asked:
        return asked.jobs, f"the cluster, {asked.jobs} jobs at a time, once they have begun"
    if found.on_cpu:
        return (n := os.cpu_count() or 1), f"{n} cores"
    n = 1 if found.name == rates.PUBLISHED_GPU else gpus.at_once()
    return n, "one device" if n == 1 else f"{n} devices"


def _duration(hours: float) -> str:
    return f"{_short(hours)} hours" if hours >= 2 else f"{60 * hours:.0f} minutes"


def _doubts(study: Study) -> list[str]:
    """What is guessed or bounded in the plan, in sentences."""
    unknown = [
        name
        for name in _read_data(study)
        if name != "heldout" and not is_here(study.data[name], study)
    ]
    guessed = [name for name, one in study.models.items() if not sizes.size(one, study).known]
    found = {
        f"at most, since the length of {', '.join(unknown)} is not known before it is there:"
        f" examples are taken as {study.training.max_length} tokens long": unknown,
        f"sizes guessed from the names of {', '.join(guessed)}: their configuration is not"
        " here": guessed,
    }
    return [sentence for sentence, holds in found.items() if holds]


def _resources(study: Study, on_cpu: bool) -> list[str]:
    memory = "memory of a job, GiB" if on_cpu else "memory of the device, GiB"
    found = {memory: costing.memory(study, on_cpu), "disk, GB": costing.disk(study)}
    return [
        f"{what}: " + ", ".join(f"{part} {value:.1f}" for part, value in values.items())
        for what, values in found.items()
    ]


def _finished(study: Study, on: str | None) -> str:
    counts = (
        f"{stage} {n} of {sum(len(study.of_stage(stage, base)) for base in study.bases)}"
        for stage, n in finished(study, on).items()
    )
    return "finished: " + ", ".join(counts)


def _sources(study: Study, memory: float | None) -> tuple[list[str], list[str]]:
    """Whether each model and set can be had and would be used, and a last line on all of them."""
    found = access.check_all(needed(study), workers=32)
    refused = checking.refusals(study, costing.disk(study), memory)
    reasons = {**dict(zip(found.name[~found.ok], found.sentence[~found.ok], strict=True))}
    reasons = {name: refused[name] for name in refused if name not in reasons} | reasons
    rows = [
        f"{_mark(one, reasons)} {one.name}: {reasons.get(one.name, one.sentence)}"
        for one in found.itertuples()
    ]
    rows += [f"NO {name}: {reasons[name]}" for name in reasons if name not in set(found.name)]
    lost, unsure = len(reasons), int(found.state.eq("not checked").sum())
    end = "every model and set can be had"
    if lost:
        end = f"{lost} of {len(rows)} models and sets cannot be used: see NO above"
    if unsure:
        end += f"; {unsure} from GitHub or a package registry are fetched when used (??)"
    return rows, [end]


def _mark(one, reasons: dict[str, str]) -> str:
    return "NO" if one.name in reasons else "??" if one.state == "not checked" else "ok"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def to_run(study: Study, asked: Cluster | None = None) -> str:
    """The jobs that make study would run here or on a cluster, counted by stage and analysis."""
    workers, memory = (asked.jobs, asked.memory) if asked else (gpus.at_once(), None)
    try:
        shards = dealt(study, workers, keep=False)
        rest = plan.due(study, shards, memory)
    except ValueError as error:
        return f"not known ({error})"
    jobs = schedule.jobs(study, USUAL, shards)
    for name, job in jobs.items():  # in the order of the data: what a job waits for comes first
        if rest.intersection(job.after):
            rest.add(name)
    counts = Counter(name.split("/")[0] for name in jobs if name in rest)
    return ", ".join(f"{name} {n}" for name, n in counts.items()) or "none: the study is finished"


@command(wrong=2)
def main(name: str, device: str = "", price: str = "", profile: str = "local") -> None:
    """Print the plan of a study."""
    study, amount, asked = load(name), _price(price), cluster.read(profile)
    found = chosen_rates(device or None, study, asked)
    print(pages(study, found, amount, to_run(study, asked), asked))


def _price(text: str) -> float | None:
    try:
        value = float(text) if text else None
    except ValueError:
        value = -1.0
    if value is not None and value < 0:
        raise ValueError(
            f"PRICE={text!r}; give the price of an hour of the device as a number, as PRICE=2.5"
        )
    return value


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
