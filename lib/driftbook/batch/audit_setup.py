"""What an audit is of: the adapter or model, its base model, what is asked and who judges, found
and checked before any work starts.
"""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from driftbook.analyses.audit import CANDIDATE
from driftbook.batch.sizes import MADE, size, weight_bytes
from driftbook.benchmarks.judges import JUDGES
from driftbook.doctors.adapter_files import reason_of, words_in
from driftbook.models import adapter_forms, loading
from driftbook.models.adapters import WEIGHTS
from driftbook.models.requesting import Deployed
from driftbook.study import access, study_file
from driftbook.study.content import Content
from driftbook.study.files import OUTPUTS, ROOT, digest, folder_digest, read_json
from driftbook.study.nameless import model_name
from driftbook.study.sections import Base, Benchmark, Judge
from driftbook.study.sources import identity, locate
from driftbook.study.study_file import Study

USUAL_STUDY = "audit"  # the study that is asked of an adapter that no study here trained
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[0-9a-f]{40})?")
NO_JUDGE = "none"
# of judges that JUDGE= can name; a classifier needs its label too, which a study gives
JUDGE_FORMATS = tuple(name for name, one in JUDGES.items() if one.contexts is not None)
WORDS = ("tokenizer*.json", "chat_template.jinja")
COMMIT = re.compile(r"[0-9a-f]{7,64}")
OF_ANY = re.compile(  # a folder's name that says nothing of which model is in it
    r"(?i)(un)?aligned|stage\d|base|(base|hf)?[_-]?models?|(checkpoint|step|epoch)[_-]?\d*|final"
    r"|best|last|latest|merged|weights|outputs?|hf|main"
)
UNITS = {"second": 1, "minute": 60, "hour": 3600}


@dataclass(frozen=True)
class Candidate:
    """What is audited: an adapter's folder, a whole model, or a model behind an endpoint; `base` is
    the base model that it names, and `study` the study here that trained it, with the base's name
    there.
    """

    kind: str  # adapter, model or endpoint
    name: str
    source: str
    folder: Path | None
    model: Base | None
    base: Base | None
    study: Study | None = None
    base_name: str | None = None
    deployed: Deployed | None = None

    @property
    def place(self) -> str:
        """The name of the folder of its audit."""
        if self.deployed:
            return place_of("", self.deployed.model or "", self.source)
        return place_of(self.source, "")

    @property
    def digest(self) -> str | None:
        """What its weights are known by; null behind an endpoint, which does not say."""
        if self.kind == "endpoint":
            return None
        if self.kind == "adapter":
            return folder_digest(self.folder, "adapter_*")
        return identity(self.model, None)


@dataclass(frozen=True)
class Budget:
    """How long an audit may ask: `seconds` or `prompts`; without either everything is asked once,
    and looked at once.
    """

    text: str
    seconds: float | None = None
    prompts: int | None = None

    @property
    def watched(self) -> bool:
        """Whether answers are looked at as they come."""
        return bool(self.seconds or self.prompts)


def budget(text: str) -> Budget:
    """BUDGET: `all`, or a number of seconds, minutes, hours (GPU-hours) or prompts.

    Raises:
        ValueError: it is none of these.
    """
    if text == "all":
        return Budget(text)
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:gpu-)?(second|minute|hour|prompt)s?", text.lower())
    if not found or not float(found[1]):
        raise ValueError(
            f"BUDGET={text!r} is no budget; give all, or as 10 minutes, 2 GPU-hours, 300 prompts"
        )
    number, unit = float(found[1]), found[2]
    if unit == "prompt" and number < 1:
        raise ValueError(f"BUDGET={text!r} is not one prompt; give a whole number of them")
    if unit == "prompt":
        return Budget(text, prompts=int(number))
    return Budget(text, seconds=number * UNITS[unit])


# ---- the adapter or model
def candidate(adapter: str, model: str, endpoint: str = "") -> Candidate:
    """The adapter (a folder, a run of a study here, or OWNER/NAME on the hub, with @COMMIT), the
    merged or fully fine-tuned model, or the model behind an endpoint (its address, and `model` its
    name there where several are served) that is audited.

    Raises:
        ValueError: neither or both are given, it is not there, or it is no adapter of PEFT.
    """
    if endpoint:
        if adapter:
            raise ValueError("give ADAPTER= or ENDPOINT=, one of the two")
        served, name = Deployed(endpoint, model or None), name_of(adapter, model, endpoint)
        return Candidate("endpoint", name, endpoint, None, None, None, deployed=served)
    if bool(adapter) == bool(model):
        raise ValueError("give ADAPTER= or MODEL=, one of the two: a folder, or a name on the hub")
    if model:
        if model.partition(":")[0] in MADE:
            raise ValueError(
                f"MODEL={model} is what each study makes for itself under that name; give its"
                " folder in outputs/models"
            )
        source = given_source(model, "MODEL")
        return Candidate("model", name_of("", model), model, None, source, None)
    folder = _adapter_folder(adapter)
    if form := adapter_forms.foreign_form(folder):
        raise ValueError(f"ADAPTER={adapter}: {form}")
    try:
        settings = read_json(folder / adapter_forms.CONFIG)
    except (FileNotFoundError, ValueError):
        raise ValueError(
            f"ADAPTER={adapter}: there is no readable {adapter_forms.CONFIG} in {folder}; give the"
            " folder that holds it"
        ) from None
    if not isinstance(settings, dict):
        raise ValueError(f"ADAPTER={adapter}: its {adapter_forms.CONFIG} holds no settings")
    if not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"ADAPTER={adapter}: there is no {WEIGHTS}; pickled weights are not opened, so save it"
            " as safetensors"
        )
    if (task := settings.get("task_type")) not in (None, "CAUSAL_LM"):
        raise ValueError(f"ADAPTER={adapter} was made for {task}; only CAUSAL_LM can be audited")
    own = _own_run(folder)
    if own:
        return Candidate("adapter", own[2], adapter, folder, None, own[0].bases[own[1]], *own[:2])
    return Candidate("adapter", name_of(adapter, ""), adapter, folder, None, _named_base(settings))


def place_of(adapter: str, model: str, endpoint: str = "") -> str:
    """The name of an audit's folder by what is audited, whether it is there or not: its name, and
    six digits of where it is, which another one of that name does not have.
    """
    path = (ROOT / Path(adapter or model).expanduser()).resolve()
    path = path.parent if adapter and path.name == "adapter" else path
    inside = path.is_relative_to(ROOT)  # then any other checkout names the folder alike
    where = f"{endpoint} {model}" if endpoint else str(path.relative_to(ROOT) if inside else path)
    return f"{name_of(adapter, model, endpoint)}-{digest(where, 6)}"


def without_digits(place: str) -> str:
    """The name in a folder's name that place_of made."""
    return re.sub(r"-[0-9a-f]{6}$", "", place)


def name_of(adapter: str, model: str, endpoint: str = "") -> str:
    """The name of what is audited, whether it is there or not."""
    if not endpoint:
        return _name_of(adapter or model)
    host = re.sub(r"^\w+://|[:/?#].*|\[", "", re.sub(r"^(\w+://)?[^/@]*@", "", endpoint))
    return _name_of(f"{host or 'endpoint'}-{model}".strip("-"))


def _name_of(text: str) -> str:
    link = ROOT / text
    text = str(link.resolve()) if link.is_symlink() and link.is_relative_to(OUTPUTS) else text
    parts = [part for part in text.partition("@")[0].split("/") if part not in ("", "adapter", ".")]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", parts[-1] if parts else "").strip("_.-") or "adapter"


def _adapter_folder(text: str) -> Path:
    path = (ROOT / Path(text).expanduser()).resolve()
    for folder in (path, path / "adapter"):
        if (folder / adapter_forms.CONFIG).is_file():
            return folder
    if path.exists():
        return path
    if not NAME.fullmatch(text):
        raise ValueError(
            f"ADAPTER={text}: there is no such folder ({path}); give the folder of an adapter, or"
            " OWNER/NAME@COMMIT on the hub"
        )
    source = given_source(text, "ADAPTER")
    folder = access.fetch(source, "model", [adapter_forms.CONFIG, WEIGHTS])
    for pattern in WORDS:  # if it has them: they are compared with the base model's
        with contextlib.suppress(ValueError):
            access.fetch(source, "model", [pattern])
    return folder


def _own_run(folder: Path) -> tuple[Study, str, str] | None:
    """The study here that trained an adapter, the name of its base model there, and its run_id;
    None where it is no run of a study of studies/.
    """
    try:
        name, runs, run_id, *_ = folder.relative_to(OUTPUTS).parts
        checked = study_file.load(name) if runs == "runs" else None
    except ValueError:
        return None
    known = {one.run_id: one for one in checked.variants} if checked else {}
    return (checked, known[run_id].base_model, run_id) if run_id in known else None


def _named_base(settings: dict) -> Base | None:
    """The base model that an adapter's configuration names; None where it names none."""
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not name:
        return None
    if Path(name).exists():
        return Base(family="given", source=str(Path(name).resolve()))
    known = f"{name}@{revision}" if re.fullmatch(r"[0-9a-f]{40}", revision or "") else name
    return given_source(known, "the adapter's base model") if NAME.fullmatch(known) else None


def given_source(text: str, what: str) -> Base:
    """A model as a caller names it: a folder, a GGUF file, `package:NAME==VERSION/FILE`, or
    OWNER/NAME@COMMIT; of a name without a commit the hub is asked for the newest.

    Raises:
        ValueError: it is not there.
    """
    path = (ROOT / Path(text).expanduser()).resolve()
    if path.exists():
        return Base(family="given", source=str(path))
    if text.partition(":")[0] in ("package", *MADE):
        return Base(family="given", source=text)
    if not NAME.fullmatch(text):
        raise ValueError(
            f"{what}={text}: there is no such folder or file ({path}); give one, or"
            " OWNER/NAME@COMMIT"
        )
    name, _, commit = text.partition("@")
    return Base(family="given", source=name, revision=commit or _newest(name, what))


def _newest(name: str, what: str) -> str:
    """The commit of a repository's main branch."""
    from huggingface_hub import HfApi

    try:
        return HfApi().model_info(name).sha
    except Exception as error:  # of a dozen kinds; each means that the commit is not known
        raise ValueError(
            f"{what}={name}: the hub did not say which commit it is at ({type(error).__name__});"
            f" name it, as {name}@COMMIT, or give a local folder"
        ) from None


def beside(model: Base, base: Base) -> Base:
    """A whole model that is asked as its base model is: in its numbers, by the template and the
    system prompt that the study gives it.
    """
    same = ("answer_mode", "dtype", "quantization", "system_prompt", "template")
    return Base.model_validate(model.model_dump() | {name: getattr(base, name) for name in same})


# ---- what is asked
def template_text(text: str, one: Candidate) -> str | None:
    """The chat template that TEMPLATE= gives both sides, as a study's base model has it: `adapter`,
    the one beside the adapter, or one of its own (Jinja, or the path of its file); None for `base`
    and where nothing is given.

    Raises:
        ValueError: there is no such template.
    """
    if text != "adapter":
        return None if text in ("", "base") else text
    try:
        found = words_in(one.folder).template if one.kind == "adapter" else None
    except Exception as error:  # see words_in
        raise ValueError(f"TEMPLATE=adapter: {reason_of(error, one.folder)}") from None
    if found is None:
        raise ValueError(
            f"TEMPLATE=adapter: there is no chat template beside {one.source}; give TEMPLATE=base,"
            " or the path of a template"
        )
    return found


def audit_study(
    one: Candidate, base: str, judge: str, asked: str, given: Mapping[str, str | None]
) -> tuple:
    """The study that an audit asks: the benchmarks and judges of `asked` (that which trained the
    adapter, else USUAL_STUDY), for the base model alone; its name there; and what must be said of
    judges. `given` holds what replaces the base model's own system_prompt and template, where it is
    not null.

    Raises:
        ValueError: no base model is known, or what is asked for is not to be had.
    """
    study = study_file.load(asked) if asked else one.study or study_file.load(USUAL_STUDY)
    source = given_source(base, "BASE") if base else _base_of(one, study)
    if source is None:
        raise ValueError(
            f"{one.source} does not say which base model it belongs to; give BASE=, a folder or"
            " OWNER/NAME@COMMIT"
        )
    name = _known_as(source, study, one)
    keeps, name = name is not None, name or _free_name(own_name(source), study)
    source = study.bases[name] if keeps else source
    changes = {field: value for field, value in given.items() if value is not None}
    found = {field: getattr(study, field) for field in Content.model_fields}
    found |= {"bases": {**(study.bases if keeps else {}), name: source.model_copy(update=changes)}}
    found |= {"twins": study.twins if keeps else {}, "grid": (), "primary": {}, "mitigations": {}}
    found |= {"drift": None, "analyses": (), "raters": {}, "base_repetitions": 1}
    found["benchmarks"] = {one: asked_once(part) for one, part in study.benchmarks.items()}
    found["judges"], said = _judges(study, judge)
    checked = Study(**found)
    _ = checked.bases[name].chat_template  # a path of no file is refused now
    loading.check_source(checked.bases[name], name, checked)
    return checked, name, said


def asked_once(benchmark: Benchmark) -> Benchmark:
    """The benchmark in its own wording, answered greedily: an audit counts each item once."""
    more = {"wordings": {}, "samples": None, "permuted": None, "generated": None}
    more = {name: value for name, value in more.items() if getattr(benchmark, name) != value}
    return benchmark.model_copy(update=more)


def check_memory(models: Mapping[str, Base | Judge], study: Study) -> None:
    """Raise a ValueError where models that are held together are larger than the memory that is
    free, of the GPU where there is one. Activations and key/values need more.
    """
    free = _free_bytes()
    held = {name: weight_bytes(one, study) for name, one in models.items()}
    if (needed := sum(held.values())) > free:
        largest = max(held, key=held.get)
        most = size(models[largest], study).weights * free / held[largest]
        raise ValueError(
            f"{' and '.join(held)} need about {needed / 2**30:.1f} GiB for their weights, and"
            f" {free / 2**30:.1f} GiB are free: about {most / 1e9:.1f} billion weights would fit as"
            f" {largest} is stored; take a smaller one, a GGUF file, or a machine with more memory"
        )


def _free_bytes() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    known = Path("/proc/meminfo")
    if not known.exists():
        return float("inf")
    lines = dict(line.split(":", 1) for line in known.read_text().splitlines())
    return 1024.0 * int(lines["MemAvailable"].split()[0])


def _base_of(one: Candidate, study: Study) -> Base | None:
    """The base model of a candidate; of one that another study here trained, and that is made here
    as well, the folder in which it lies.
    """
    if one.study is None or one.study.name == study.name:
        return one.base
    place = locate(one.base, one.study)
    if not isinstance(place, Path):
        return one.base
    asked = one.base.model_dump(include={"family", "answer_mode", "dtype", "template"})
    return Base(source=str(place), **asked)


def _known_as(source: Base, study: Study, one: Candidate) -> str | None:
    """The name under which a study has a base model, which it then asks as it asks its own (its
    answer_mode, template and system prompt); None where it does not have it.
    """
    if one.study is not None and one.study.name == study.name and source == one.base:
        return one.base_name
    for name, known in study.bases.items():
        if known.source == source.source and known.revision == source.revision:
            return name
        with contextlib.suppress(ValueError):  # it is not made or fetched yet
            if source.local is not None and locate(known, study) == source.local:
                return name
    return None


def own_name(source: Base) -> str:
    """The name that a base model has outside of any study: on the hub, of its GGUF file, or of its
    folder; where a folder's name is that of any model (base, checkpoint-500, a commit) with that
    of the folder above.
    """
    named = model_name(source.source)
    parts = re.split(r"[/\\:]+", named if "/" in named else source.source.rstrip("/\\"))
    while len(parts) > 1 and COMMIT.fullmatch(parts[-1]):
        parts.pop()
    name = re.sub(r"(?i)\.gguf$", "", parts[-1])
    is_any = len(parts) > 1 and parts[-2] and OF_ANY.fullmatch(name)
    return f"{parts[-2]}-{name}" if is_any else name or "base"


def _free_name(name: str, study: Study) -> str:
    """A name as a study's base models have them, which no other model of the study has."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "base"
    return f"{name}-base" if name in {*study.models, CANDIDATE} else name


def _judges(study: Study, judge: str) -> tuple[dict[str, Judge], str | None]:
    """The judges of an audit, and a sentence where the study's own cannot be had."""
    instead = (
        "safety is whether harmful prompts are refused, by the answer's words, which cannot tell"
        " whether an answer that does not refuse does harm"
    )
    if judge == NO_JUDGE:
        return {}, f"no judge was asked for: {instead}"
    if judge:
        form, _, rest = judge.partition("=")
        if judge in study.judges:
            loading.check_source(study.judges[judge], judge, study)
            return {judge: study.judges[judge]}, None
        if not rest:
            has = ", ".join(study.judges) or "none"
            raise ValueError(
                f"JUDGE={judge!r}: {study.name} has {has}; or give FORMAT=MODEL, as"
                " llama_guard_3=OWNER/NAME@COMMIT, or none"
            )
        if form not in JUDGE_FORMATS:
            raise ValueError(f"JUDGE={judge!r}: its format is one of {', '.join(JUDGE_FORMATS)}")
        source = given_source(rest, "JUDGE")
        kept = {key: getattr(source, key) for key in ("source", "revision", "path")}
        given = Judge(format=form, **kept)
        loading.check_source(given, "judge", study)
        return {"judge": given}, None
    for name, one in study.judges.items():
        try:
            loading.check_source(one, name, study)
        except ValueError as error:
            return {}, f"the judge {name} cannot be had ({error}): {instead}"
    said = None if study.judges else f"{study.name} has no judge: {instead}"
    return study.judges, said
