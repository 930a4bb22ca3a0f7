"""What a study needs before it starts: the miniature's models and data, random models, or access to
the real ones.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from filelock import FileLock

from driftbook.batch import plan
from driftbook.benchmarks.data import items, prompts, training_examples
from driftbook.study.consistency import TWIN
from driftbook.study.files import (
    OUTPUTS,
    check_safetensors,
    check_writable,
    remedy_of,
    replacing_folder,
    write_json,
)
from driftbook.study.methods import TEXT_INITS, is_encoded
from driftbook.study.sections import PROMPT_FORMATS, Base, Judge
from driftbook.study.sources import MODELS, identity, locate, made_folder, twin_folder
from driftbook.study.study_file import Study
from driftbook.study.variants import Variant

CURVES = "learning_curve.parquet"


@dataclass(frozen=True)
class Prepared:
    """A model that is there: its name, what its content is known by, its learning curve where it
    was trained here, and the key of the job that prepared it.
    """

    name: str
    identity: str
    curve: pd.DataFrame | None
    key: dict


def prepare(name: str, study: Study) -> Prepared:
    """Make a base model or judge of the study if it is made here and not there yet; else check that
    it can be had.

    Raises:
        ValueError: no such model in the study, or it is not to be had, or the training data of the
            study are not.
    """
    source = study.models.get(name)
    if source is None:
        raise ValueError(f"models={name!r}; the study {study.name} has {', '.join(study.models)}")
    kind, _, rest = source.source.partition(":")
    made_with_sets = kind == "miniature" and source.local is None
    if not made_with_sets:  # before a model is fetched or tuned
        _check_sets(study)
    curve, key = None, plan.job_key(study, f"prepare/{name}")
    _twins(source, study)
    made_here = kind in ("miniature", "random") and source.local is None
    if made_here:
        MODELS.mkdir(parents=True, exist_ok=True)
        with FileLock(
            MODELS / f"{made_folder(study, kind).name}-{rest.partition('/')[0]}.lock"
        ):  # two parts of a study may need one model
            curve = (
                _miniature(rest.partition("/")[0], study)
                if kind == "miniature"
                else _random(rest, study)
            )
            _branches(source, study)
    if made_with_sets:
        _check_sets(study)
    path = locate(source, study)
    for file in Path(path).rglob("*.safetensors") if isinstance(path, Path) else ():
        check_safetensors(file, remedy_of(file.parent))
    check_model(name, source, study)
    _check_twins(source, study)
    return Prepared(name, identity(source, study), curve, key)


def _check_sets(study: Study) -> None:
    """Raise a ValueError where a set that is trained on or asked is not to be had or read."""
    for name in study.data:
        training_examples(name, study)
    for name, benchmark in study.benchmarks.items():
        (prompts if benchmark.format in PROMPT_FORMATS else items)(name, study)


def check_model(name: str, source: Base | Judge, study: Study) -> None:
    """Raise a ValueError where the model's tokenizer does not fit, PEFT does not know a setting of
    the study's methods, or an answer cannot be as long as the study asks.
    """
    from driftbook.models import adapters, loading

    loading.check_source(source, name, study)
    if name not in study.bases:
        return
    variants = study.of_base(name)
    methods = {(one.method, one.layers): one for one in variants if one.method != "none"}
    shell = loading.without_weights(source, name, study)
    front = _check_starts(name, source, study)
    _check_room_for_answers(name, study, loading.context_length(shell), front)
    for variant in methods.values():
        made = adapters.placed(adapters.config(variant), variant, shell)
        adapters.check_targets(variant.method, made, shell)
    if encoded := next((one for one in variants if is_encoded(one.method, one.init)), None):
        _check_encoder(encoded, shell.get_input_embeddings().embedding_dim)


def _check_encoder(variant: Variant, width: int) -> None:
    from driftbook.models import adapters, starts

    try:
        starts.check_encoder(adapters.config(variant), width)
    except ValueError as error:
        raise ValueError(f"methods.{variant.method}: {error}") from None


def _check_starts(name: str, source: Base, study: Study) -> int:
    """Raise a ValueError where a soft prompt cannot begin as the study says: a text is missing or
    has no tokens, or a safety prompt would be optimised on what a benchmark asks. How many tokens
    are frozen in front of one.
    """
    if not (wanted := study.inits & set(TEXT_INITS)):
        return 0
    from driftbook.models import loading, starts
    from driftbook.training import examples

    tokenizer = loading.tokenizer_of(source, name, study)
    texts = {init: examples.start_text(init, study) for init in sorted(wanted)}
    lengths = {init: len(starts.token_ids(tokenizer, text)) for init, text in texts.items()}
    for role in ("harmful", "harmless") if study.dro else ():
        examples.check_apart(f"dro.{role} is", getattr(study.dro, role), study)
    return lengths.get("safety_frozen", 0)


def _check_room_for_answers(name: str, study: Study, context: int, front: int) -> None:
    used = {variant.method for variant in study.of_base(name)} - {"none"}
    asked = {f"benchmarks.{key}": one.max_new_tokens for key, one in study.benchmarks.items()}
    asked |= {"drift": study.drift.max_new_tokens} if study.drift else {}
    soft = max((study.methods[one].get("num_virtual_tokens") or 0 for one in used), default=0)
    soft += front if "prompt_tuning" in used else 0
    for where, n in asked.items():
        if n + soft >= context:
            with_soft = f" with {soft} virtual tokens" if soft else ""
            raise ValueError(
                f"{where}.max_new_tokens = {n}{with_soft} leaves no room for a prompt: {name} reads"
                f" {context} tokens"
            )


def _check_twins(source: Base | Judge, study: Study) -> None:
    """Raise a ValueError where a checkpoint of the model's pairs cannot be read as one; what is on
    the hub is fetched now, before hours of training.
    """
    from driftbook.training.checkpoints import open_checkpoint
    from driftbook.training.mitigations import checkpoint

    for name, twin in getattr(source, "checkpoints", {}).items():
        open_checkpoint(checkpoint(twin, study), name)


def _twins(source: Base | Judge, study: Study) -> None:
    """Tune the twins that a base model is, or that its pairs name, and that are not there yet."""
    for one in (source, *getattr(source, "checkpoints", {}).values()):
        kind, _, name = one.source.partition(":")
        if one.source.startswith(TWIN) and one.local is None:
            TUNERS[kind](name, study)


def _tune(name: str, study: Study) -> None:
    """Make a twin that is not there yet; what it is tuned on is compared with what is asked now,
    whenever it was made.
    """
    from driftbook.training.twins import build, check_disjoint

    check_disjoint(name, study)
    locate(study.bases[study.twins[name].of], study)
    folder = twin_folder(study, name)
    check_writable(MODELS)
    with FileLock(MODELS / f"{folder.name}.lock"):
        if not folder.exists():
            with replacing_folder(folder) as scratch:
                build(name, study, scratch)


# looked up by the kind of a source, so that the code that tunes makes no other model
# (code.closure); what it made is known by it (sources.twin_folder)
TUNERS = {"twin": _tune}


def _random(name: str, study: Study) -> None:
    """Make a random model that is not there yet."""
    if not (made_folder(study, "random") / name).exists():
        from driftbook.batch.random_models import build

        build(name, study)


def _miniature(part: str, study: Study) -> pd.DataFrame:
    """The learning curve of a family or the judge of the miniature, which are trained and kept if
    they are not there yet.
    """
    folder = made_folder(study, "miniature")
    write_data(folder)
    if not (folder / part / CURVES).exists():
        from driftbook.miniature.building import build_family
        from driftbook.miniature.judge import build_judge

        check_writable(OUTPUTS, 20_000_000)
        with replacing_folder(folder / f"{part}.building") as scratch:
            curve = (
                build_judge(scratch, study.seed)
                if part == "judge"
                else build_family(part, scratch, study.seed)
            )
            curve.to_parquet(scratch / part / CURVES)
            (scratch / part).replace(folder / part)
        (folder / f"{part}.building").rmdir()
    return pd.read_parquet(folder / part / CURVES)


def _branches(source: Base | Judge, study: Study) -> None:
    """Make what branches off the miniature's unaligned checkpoints, and is not there yet: that a
    base model is, or that its pairs name (placebos, planted alignment).
    """
    from driftbook.miniature.building import BRANCHES, build_branch

    folder = made_folder(study, "miniature")
    for one in (source, *getattr(source, "checkpoints", {}).values()):
        name, _, branch = one.source.removeprefix("miniature:").partition("/")
        named = one.local is None and one.source.startswith("miniature:") and branch in BRANCHES
        if named and not (folder / name / branch).exists():
            with replacing_folder(folder / f"{name}.{branch}") as scratch:
                (scratch / name).mkdir()
                whole = (folder / name / "unaligned").resolve()
                (scratch / name / "unaligned").symlink_to(whole)
                build_branch(name, branch, scratch, study.seed)
                (scratch / name / branch).replace(folder / name / branch)
            shutil.rmtree(folder / f"{name}.{branch}")


def write_data(folder: Path) -> None:
    """The miniature's benchmarks and training data, in folder/data, whole or not at all."""
    from driftbook.miniature.benchmarks import write_data as write

    if not (folder / "data").exists():
        with replacing_folder(folder / "data") as scratch:
            write(scratch)


def measured(name: str, study: Study) -> pd.DataFrame:
    """A miniature base model on the whole benchmarks, beside its goals: measure, value, ci_low,
    ci_high, n.

    Raises:
        ValueError: it is so far from its goals that the study would measure nothing.
    """
    from driftbook.miniature.measuring import check_goals, measure
    from driftbook.models.loading import load

    base = load(study.bases[name], name, study)
    found = measure(base.model, base.tokenizer, made_folder(study, "miniature") / "data")
    check_goals(study.bases[name].family, {measure: values[0] for measure, values in found.items()})
    return (
        pd.DataFrame(found, index=["value", "ci_low", "ci_high", "n"])
        .T.rename_axis("measure")
        .reset_index()
    )


def mark_prepared(prepared: Prepared, study: Study) -> Path:
    """Write the mark of the job that prepared a model."""
    path = plan.job_mark(study, f"prepare/{prepared.name}")
    write_json(path, {**prepared.key, "identity": prepared.identity})
    return path
