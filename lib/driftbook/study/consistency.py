"""What is refused where sections of a study file do not fit each other, a check each."""

from collections import Counter
from typing import Any

from driftbook.study.anchors import Dro
from driftbook.study.content import Content
from driftbook.study.methods import (
    BESIDE_FACTORS,
    FROM_DATA,
    METHOD_CLASS,
    MITIGATION_KINDS,
    PEFT_METHODS,
    REWRITING,
    TEXT_INITS,
    unscored_setting,
)
from driftbook.study.sections import ITEM_FORMATS, PROMPT_FORMATS, Block, Mitigation

# notebooks that read again what others published, and the folders of outputs/ that they write
REREADING = {
    "20_original_study": "original_study",
    "22_peft_results": "peft_results",
    "23_adaptation_study": "adaptation_study",
    "24_original_claims": "original_study",
}
REREAD = tuple(dict.fromkeys(REREADING.values()))
# folders of outputs/ of no study
RESERVED = ("models", "published", "bench", "cache", "code", *REREAD)
TWIN = "twin:"
# settings of PEFT that are sizes, and how many entries a table of patterns may have
SIZES = ("r", "num_virtual_tokens", "encoder_hidden_size", "token_dim", "num_layers")
MOST_ENTRIES = 10_000
NOT_REPAIRED = ("parent", "base alone")  # notebook 14's names of runs that are no repairs
# what every study asks, and in which formats; others have names of their own
CORE = {
    "safety": PROMPT_FORMATS,
    "over_refusal": PROMPT_FORMATS,
    "bbq": ITEM_FORMATS,
    "utility": ("gsm8k", "answers", "summaries"),
}


def check_consistent(study: Content) -> None:
    """Raise a ValueError with one sentence for the first thing that does not fit."""
    _check_names(study)
    _check_twins(study)
    for block in study.grid:
        _check_settings_and_bases(study, block)
        _check_data_of(study, block)
    _check_mitigations(study)
    _check_repetitions(study)
    _check_primary(study)
    _check_methods(study)
    _check_benchmarks(study)
    _check_judges(study)
    _check_drift(study)
    _check_probes(study)


def _check_names(study: Content) -> None:
    if study.name in RESERVED:
        raise ValueError(f"name={study.name!r} is taken by a folder of outputs/; choose another")
    for name in study.bases:
        if "." in name:
            raise ValueError(f"base {name!r}: a name may hold no '.', which parts run_ids")
    if len(study.models) < len(study.bases) + len(study.judges) + len(study.raters):
        raise ValueError("a base model, a judge and a rater share a name; name each differently")
    counts = Counter(block.name for block in study.grid)
    if twice := [name for name, n in counts.items() if n > 1]:
        raise ValueError(f"the grid has two blocks of the name {twice[0]!r}; name them differently")


def _check_twins(study: Content) -> None:
    """Each twin is tuned from a base model that is none, on data that are there, and each that is
    named is declared.
    """
    for name, data in study.data.items():
        if name == "heldout" and (data.also or data.answers):
            raise ValueError("data.heldout is one set with answers of its own; no also, no answers")
        for other in data.also:
            if other in study.data and study.data[other].is_preference != data.is_preference:
                raise ValueError(f"data.{name}.also names {other!r}; only one of them has pairs")
            if other not in study.data or other in (name, "heldout") or study.data[other].also:
                what = "a set of data that is none of its own, not held out, and has no also itself"
                raise ValueError(f"data.{name}.also names {other!r}; it may name {what}")
    for name, twin in study.twins.items():
        if twin.of not in study.bases or study.bases[twin.of].source.startswith(TWIN):
            own = [one for one, base in study.bases.items() if not base.source.startswith(TWIN)]
            raise ValueError(f"twins.{name}.of = {twin.of!r}; expected one of {', '.join(own)}")
        if study.bases[twin.of].quantization:
            raise ValueError(f"twins.{name} is merged into weights, and {twin.of} is quantized")
        if twin.data not in study.data or twin.data == "heldout":
            raise ValueError(f"twins.{name}.data names {twin.data!r}, which is not under data")
    for base in study.bases.values():
        for source in (base, *base.checkpoints.values()):
            named = source.source.removeprefix(TWIN)
            if source.source.startswith(TWIN) and named not in study.twins:
                has = ", ".join(study.twins) or "none"
                raise ValueError(f"the source {source.source} names no twin; the study has {has}")


# ---- the grid
def _check_settings_and_bases(study: Content, block: Block) -> None:
    """Each method has settings, and base models on which it can be trained."""
    where = f"grid block {block.name!r}"
    for name in block.bases:
        if name not in study.bases:
            raise ValueError(
                f"{where} names the base {name!r}; the study has {', '.join(study.bases)}"
            )
    for method in block.methods:
        if method not in study.methods:
            raise ValueError(f"{where} uses {method}, which has no settings under methods")
        for name in study.bases_of(block):
            _check_precision(study, where, method, name)


def _check_precision(study: Content, where: str, method: str, name: str) -> None:
    """Norms are trained in fp32, and quantized base models by QLoRA alone of LoRA's forms."""
    base, wanted = study.bases[name], PEFT_METHODS[method].quantized
    if method == "ln_tuning" and base.dtype != "float32":
        small = "where small steps round to nothing; give it dtype: float32"
        raise ValueError(f"{where} trains the norms of {name} itself, in {base.dtype}, {small}")
    if wanted and base.quantization is None:
        give = "give that base model quantization: nf4, or name others under bases"
        raise ValueError(f"{where} trains {method} on {name}, which is not quantized; {give}")
    if not wanted and base.quantization and PEFT_METHODS[method].config == "LoraConfig":
        called = "there the method is called qlora"
        raise ValueError(f"{where} trains {method} on {name}, which is quantized; {called}")


def _check_data_of(study: Content, block: Block) -> None:
    where = f"grid block {block.name!r}"
    for objective in sorted(block.trained):
        for name in block.data or (objective,):
            if name == "heldout":
                raise ValueError(f"{where} trains on the held-out answers")
            if name not in study.data:
                raise ValueError(f"{where} trains by {objective}, but data has no {name}")
            if objective == "dpo" and not study.data[name].is_preference:
                lacks = "which has no chosen and rejected answers"
                raise ValueError(f"{where} trains by dpo on data.{name}, {lacks}")


def _check_repetitions(study: Content) -> None:
    drawn = any(one.samples for one in study.benchmarks.values())
    if study.base_repetitions > 1 and not drawn:
        none = "and no benchmark has samples; add samples, or remove it"
        raise ValueError(f"base_repetitions repeats base models for their drawn answers, {none}")


def _check_primary(study: Content) -> None:
    used = {method for block in study.grid for method in block.methods}
    for name, family in study.primary.items():
        if "unsafe" in family.outcomes and not study.judges:
            say = "say not_refused (harmful prompts answered without refusing)"
            no_judge = "which only a judge can say, and the study has none"
            raise ValueError(f"primary family {name!r} tests unsafe, {no_judge}; {say}")
    if study.primary and not used:
        nothing = "and the grid trains nothing; remove it"
        raise ValueError(f"primary declares tests of what training does, {nothing}")
    for name, family in study.primary.items():
        if strange := [method for method in family.methods if method not in used]:
            no_block = "which no block of the grid runs"
            raise ValueError(f"primary family {name!r} tests {strange[0]}, {no_block}")
        if family.test == "difference" and len(set(family.methods or used)) < 2:
            one = "compares methods with each other and has only one"
            raise ValueError(f"primary family {name!r} {one}; name two, or test its change")


def _check_methods(study: Content) -> None:
    for method, settings in study.methods.items():
        known = PEFT_METHODS[method]
        if "init" in settings and settings["init"] not in known.inits:
            may = " or ".join(known.inits) or "none: it has no prompt"
            raise ValueError(f"methods.{method}.init = {settings['init']!r}; expected {may}")
        if missing := [name for name in known.needs if name not in settings]:
            why = "which has no default that holds for all models; give it"
            raise ValueError(f"methods.{method} has no {missing[0]}, {why}")
        _check_init(method, settings)
        _check_ranges(method, settings)
        if fixed := [name for name in known.fixed if name in settings]:
            raise ValueError(
                f"methods.{method}.{fixed[0]} is what makes it {known.label}; remove it"
            )
    if study.inits & set(TEXT_INITS) and study.init_texts is None:
        keys = "a JSON file with the keys task and safety"
        raise ValueError(f"an init from text needs init_texts, {keys}")
    if "dro" in study.inits and study.dro is None:
        names = (
            "{harmful: NAME, harmless: NAME}, names under data of prompts that it is optimised on"
        )
        raise ValueError(f"the init dro needs dro: {names}")
    if study.dro is not None:
        _check_anchors(study, study.dro)


def _check_anchors(study: Content, dro: Dro) -> None:
    for role in ("harmful", "harmless"):
        name = getattr(dro, role)
        if name not in study.data or name == "heldout":
            has = ", ".join(one for one in study.data if one != "heldout")
            raise ValueError(f"dro.{role} = {name!r}; expected a set of prompts under data: {has}")
        if (n := study.data[name].n) < (least := 2 * dro.dimensions):
            few = f"too few for a space of {dro.dimensions} dimensions"
            raise ValueError(f"dro.{role} names data.{name}, whose n = {n} is {few}; give {least}")
    if dro.harmful == dro.harmless:
        raise ValueError(f"dro names data.{dro.harmful} twice; give harmful and harmless prompts")
    if "dro" not in study.inits:
        raise ValueError("dro is given, and no soft prompt begins so; name it under inits")


def _check_init(method: str, settings: dict[str, Any]) -> None:
    """Raise a ValueError where an adapter could not be trained or scored as its settings say."""
    if why := unscored_setting(settings):
        raise ValueError(f"methods.{method} has {why}")
    begins = str(settings.get("init_lora_weights", "")).lower()
    if begins in FROM_DATA:
        raise ValueError(
            f"methods.{method}.init_lora_weights = {begins}: PEFT computes it from data in a step"
            " that is not done here, and begins otherwise without it; take another"
        )


def _check_ranges(method: str, settings: dict[str, Any]) -> None:
    """Raise a ValueError where a number could not be trained with, as PEFT says only then."""
    for key, value in settings.items():
        where = f"methods.{method}.{key} = {value!r}"
        if key.endswith("dropout") and not (_is_number(value) and 0 <= value < 1):
            raise ValueError(f"{where}; a share of what is dropped is from 0 to below 1")
        if key in SIZES and not (type(value) is int and value > 0):  # true is no size
            raise ValueError(f"{where}; expected a whole number above 0")
        if isinstance(value, dict) and len(value) > MOST_ENTRIES:
            raise ValueError(f"methods.{method}.{key} has {len(value):,} entries; give a pattern")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---- what is asked, and who judges
def _check_benchmarks(study: Content) -> None:
    for name, formats in CORE.items():
        if name not in study.benchmarks:
            every = f"a study asks all of {', '.join(CORE)}, and any others"
            raise ValueError(f"benchmarks has no {name}; {every}")
        if (found := study.benchmarks[name].format) not in formats:
            may = ", ".join(formats)
            raise ValueError(f"benchmarks.{name}.format = {found!r}; expected one of {may}")
    if extra := [name for name in study.asked(ITEM_FORMATS) if name != "bbq"]:
        one = "a study asks one, under the name bbq"
        raise ValueError(f"benchmarks.{extra[0]} is a second BBQ; {one}")
    if "heldout" not in study.data:
        raise ValueError("data has no heldout: the dose is measured on held-out answers")


def _check_drift(study: Content) -> None:
    """A training is stopped by what is seen of it: unsafe answers by a judge, else non-refusals."""
    if study.drift is None:
        return
    if study.drift.stop_unsafe and not study.judges:
        say = "say stop_not_refused (harmful prompts answered without refusing)"
        raise ValueError(
            f"drift.stop_unsafe needs a judge, since nothing else calls an answer unsafe, and the"
            f" study has none; {say}"
        )
    if study.drift.stop_not_refused and study.judges:
        say = "where a judge reads the answers, say stop_unsafe"
        raise ValueError(f"drift.stop_not_refused is for a study without judges; {say}")


def _check_judges(study: Content) -> None:
    asked = study.asked(PROMPT_FORMATS)
    first = next(iter(study.judges), None)
    if first is None and "labels" in study.analyses:
        none = "and the study has no judge; give one, or remove it"
        raise ValueError(f"analyses names labels, which correct a judge, {none}")
    for name, judge in study.judges.items():
        if strange := [one for one in judge.benchmarks if one not in asked]:
            prompts = f"prompts are asked of {', '.join(asked)}"
            raise ValueError(f"judges.{name}.benchmarks names {strange[0]!r}; {prompts}")
        if name == first and judge.benchmarks:
            first = "is the first judge, by whom the study is scored, and so judges all benchmarks"
            raise ValueError(f"judges.{name} {first}; remove its benchmarks")
        if (judge.format == "classifier") != (judge.label is not None):
            needs = "needs label, the name of its label that counts as unsafe"
            raise ValueError(f"judges.{name}: a classifier, and nothing else, {needs}")


def _check_probes(study: Content) -> None:
    """What is looked for inside runs is made from two sets of prompts, neither trained on."""
    if study.probes is None:
        if "mechanisms" in study.analyses:
            none = "and the study has no probes; give some, or remove it"
            raise ValueError(f"analyses names mechanisms, which reads probes, {none}")
        return
    trained = {name for block in study.grid for name in block.data or block.trained}
    for key, name in (("harmful", study.probes.harmful), ("harmless", study.probes.harmless)):
        if name not in study.data or name == "heldout":
            have = ", ".join(one for one in study.data if one != "heldout")
            raise ValueError(f"probes.{key} = {name!r}; expected one of data: {have}")
        if name in trained or "answer" not in study.data[name].mapping:
            other = "a set of prompts with answers that no block trains on"
            raise ValueError(f"probes.{key} names data.{name}; it needs {other}")
        if study.data[name].n < study.probes.n:
            few = f"which has {study.data[name].n} examples of {study.probes.n} that probes.n asks"
            raise ValueError(f"probes.{key} names data.{name}, {few}")
    for name, mitigation in study.mitigations.items():
        if mitigation.kind == "mod":
            none = "which is a product of distributions and has no layers; take it to another study"
            raise ValueError(f"probes look into runs, and mitigation {name!r} makes one {none}")
        if mitigation.system_prompt:
            own = f"and mitigation {name!r} asks under another one; take it to a study of its own"
            raise ValueError(f"probes ask under the base model's system prompt, {own}")
    if study.probes.harmful == study.probes.harmless:
        raise ValueError(
            "probes.harmful and probes.harmless are one set, so they have no direction"
        )


# ---- repairs
def _check_mitigations(study: Content) -> None:
    if "safe_lora" in study.analyses and not study.mitigations:
        none = "and the study has no mitigations; give some, or remove it"
        raise ValueError(f"analyses names safe_lora, {none}")
    kinds = study.mitigations.values()
    if len({one.snapshots for one in kinds if one.kind == "average"}) > 1:
        same = "a training takes one number of them, so give both the same"
        raise ValueError(f"two mitigations average over different numbers of snapshots; {same}")
    blocks = {block.name: block for block in study.grid}
    for name, mitigation in study.mitigations.items():
        said = f"mitigation {name!r}"
        _check_named(said, name, mitigation, blocks)
        if MITIGATION_KINDS[mitigation.kind].when == "again":
            _check_again(study, said, mitigation, blocks)
        beside = [*filter(None, [mitigation.safety]), *mitigation.others]
        for block in (blocks[one] for one in (*mitigation.blocks, *beside)):
            if set(block.layers) != {"all"}:
                whole = "repairs are made of runs in all layers; name other blocks"
                raise ValueError(
                    f"{said} names the block {block.name!r}, which has layers: {whole}"
                )
        for block in (blocks[one] for one in mitigation.blocks):
            _check_applies(said, mitigation, block)
            if block.name in (mitigation.safety, *mitigation.others):
                safe = "give a block that was trained on other data, such as safety data"
                raise ValueError(f"{said} adds the block {block.name!r} to itself; {safe}")
            if MITIGATION_KINDS[mitigation.kind].when == "after":
                _check_repairable(study, said, mitigation, block)
            if mitigation.kind == "mod":
                _check_shared(study, said, block)
            if mitigation.data and mitigation.kind != "second_tuning":
                _check_data_named(study, said, mitigation, block)
            for base in study.bases_of(block) if mitigation.pair else ():
                _check_pair(study, said, mitigation.pair, base)


def _check_named(said: str, name: str, mitigation: Mitigation, blocks: dict[str, Block]) -> None:
    if mitigation.safety in mitigation.others:
        raise ValueError(
            f"{said} names {mitigation.safety!r} under safety and others; once is enough"
        )
    for wanted in (*mitigation.blocks, *filter(None, [mitigation.safety]), *mitigation.others):
        if wanted not in blocks:
            has = f"the grid has {', '.join(blocks)}"
            raise ValueError(f"{said} names the grid block {wanted!r}; {has}")
    if "," in name or name in NOT_REPAIRED:
        comma = "a name may hold no comma, behind which its controls are named"
        not_be = f"and not be {' or '.join(NOT_REPAIRED)}"
        raise ValueError(f"{said}: {comma}, {not_be}; give another name")


def _check_applies(said: str, mitigation: Mitigation, block: Block) -> None:
    """The kind can be done to the block's objectives and methods."""
    known = MITIGATION_KINDS[mitigation.kind]
    if wrong := sorted(set(block.objectives) - set(known.objectives), reverse=True):
        done = f"cannot be done to the block {block.name!r}, which has runs by {wrong[0]}"
        raise ValueError(f"{said} ({known.label}) {done}; name others")
    if wrong := [method for method in block.methods if method not in known.methods]:
        only = f"; it applies to {', '.join(known.methods)}"
        if METHOD_CLASS[wrong[0]] == "prompt" and "prompt_tuning" not in known.methods:
            kinds = MITIGATION_KINDS.items()
            apply = [kind for kind, one in kinds if wrong[0] in one.methods]
            only = f", which has no weight update; to it apply: {', '.join(apply)}"
        done = f"{known.label} cannot be done to {wrong[0]} (block {block.name!r})"
        raise ValueError(f"{said}: {done}{only}")


def _check_data_named(study: Content, said: str, mitigation: Mitigation, block: Block) -> None:
    data, mixed = mitigation.data, mitigation.kind == "mixing"
    said = f"{said} mixes in" if mixed else f"{said} has the alignment examples"
    if data == "heldout":
        raise ValueError(f"{said} data.heldout, the held-out answers")
    if data not in study.data:
        raise ValueError(f"{said} data.{data}, which the study does not have")
    if mixed and "dpo" in block.objectives and not study.data[data].is_preference:
        lacks = "and it has no chosen and rejected answers"
        raise ValueError(f"{said} mixes data.{data} into a training by dpo, {lacks}")


def _check_again(
    study: Content, said: str, mitigation: Mitigation, blocks: dict[str, Block]
) -> None:
    """What is tuned again is there, goes on as what it was, and has plain runs to be compared with;
    and so is what it is tuned on.
    """
    data, own = mitigation.data, study.mitigations
    if data == "heldout" or data not in study.data:
        some = ", ".join(name for name in study.data if name != "heldout")
        raise ValueError(f"{said} tunes again on data.{data}; expected one of {some}")
    known = [name for name, one in own.items() if one.kind != mitigation.kind]
    for name in mitigation.of:
        if name not in known:
            raise ValueError(f"{said} names {name!r} under of; expected some of {', '.join(known)}")
        if own[name].kind == "mod":
            none = "which is a product of distributions and has no weights to tune; name others"
            raise ValueError(f"{said} tunes {name} again, {none}")
        shared = [block for block in own[name].blocks if block in mitigation.blocks]
        if not shared:
            control = "so that no plain run tuned again stands beside it"
            raise ValueError(
                f"{said} tunes {name} again, which repairs none of its blocks"
                f" ({', '.join(mitigation.blocks)}), {control}; name other blocks"
            )
        methods = {method for block in shared for method in blocks[block].methods}
        if "ia3" in methods and MITIGATION_KINDS[own[name].kind].when == "after":
            other = "which may leave an adapter of LoRA, so that it and the plain run are not alike"
            raise ValueError(f"{said} tunes {name} again, a repair of ia3, {other}; name others")


def _check_pair(study: Content, said: str, name: str, base: str) -> None:
    """The base model has the pair, and its two checkpoints differ."""
    if name not in study.bases[base].pairs:
        give = f"give it under pairs: {{{name}: {{unaligned: {{source: ...}}}}}}"
        raise ValueError(
            f"{said} needs the pair {name!r}, and bases.{base} has no such twin; {give}"
        )
    pair = study.bases[base].pairs[name]
    both = [pair.aligned or study.bases[base], pair.unaligned]
    if len({(one.source, one.revision, one.path) for one in both}) == 1:
        zero = "so that V is zero and no direction of alignment; give two that differ"
        same = "has the same checkpoint as aligned and unaligned"
        raise ValueError(f"bases.{base}.pairs.{name} {same}, {zero}")


def _check_shared(study: Content, said: str, block: Block) -> None:
    """The runs of a product share the base's weights, so that none may write over them."""
    if eight := [one for one in study.bases_of(block) if study.bases[one].quantization == "int8"]:
        moved = "whose packed weights move in its first pass, so that no two parts can share them"
        raise ValueError(f"{said} is done to {eight[0]} in int8, {moved}; take nf4, or name others")
    for method in block.methods:
        settings = {"bias": "none", "init_lora_weights": "", **study.methods[method]}
        begins = str(settings["init_lora_weights"])
        key = "bias" if settings["bias"] != "none" else "init_lora_weights"
        if key == "bias" or begins.lower().startswith(REWRITING):
            writes = "which writes over weights of the base model that all parts share"
            take = f"take {key} from methods.{method}, or name other blocks"
            raise ValueError(f"{said}: {method} has {key} {settings[key]}, {writes}; {take}")


def _check_repairable(study: Content, said: str, mitigation: Mitigation, block: Block) -> None:
    """A repair leaves no part of an adapter as it was trained, and can be done to what the settings
    of each method make.
    """
    known = MITIGATION_KINDS[mitigation.kind]
    with_bias = known.keeps_bias and set(mitigation.controls) <= {"random subspace"}
    for method in block.methods:
        settings, where = study.methods[method], f"from methods.{method}"
        for key in BESIDE_FACTORS:
            value = settings.get(key)
            of_factors = key == "lora_bias" or (key, value) == ("bias", "lora_only")
            if value not in (None, False, "none", [], ()) and not (with_bias and of_factors):
                part = f"of which {known.label} or a control would leave a part as it was trained"
                raise ValueError(f"{said}: {method} trains {key}, {part}; take {key} {where}")
        begins = str(settings.get("init_lora_weights", ""))
        if begins.lower().startswith(REWRITING):
            changes = "which changes the base model itself, so that BA is not its update"
            take = f"take init_lora_weights {where}"
            raise ValueError(f"{said}: {method} begins as {begins}, {changes}; {take}")
        if settings.get("use_dora") and known.combines_factors:
            update = "whose update is no product of two factors"
            dora = "call the method dora and name other blocks"
            done = f"{known.label} cannot be done to {method} with use_dora"
            raise ValueError(f"{said}: {done}, {update}; {dora}")
