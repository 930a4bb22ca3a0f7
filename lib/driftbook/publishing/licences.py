"""The licences of the models and sets that a study names, and what may leave the machine under
them.

Rates leave where every licence is known; rows of single items (an id and its scores) where every
licence behind them allows it as well; text of prompts, answers and examples never, whatever a
licence allows (publishing and exporting see to that). The register is data/licences.yaml, and for
benchmarks the file of each format in driftbook/benchmarks; a study file states the licence of what
is not in it, under `licences`, and cannot restate one that is.
"""

from collections.abc import Iterable
from functools import cache

import pandas as pd

from driftbook.benchmarks.format import FACTS, Licence
from driftbook.benchmarks.formats import FORMATS
from driftbook.study.files import ROOT
from driftbook.study.nameless import nameless
from driftbook.study.reading import yaml_value
from driftbook.study.sections import PROMPT_FORMATS, UTILITY_FORMATS, Source
from driftbook.study.study_file import Study

REGISTER = ROOT / "data" / "licences.yaml"
COLUMNS = ("name", "role", "source", *FACTS, "known")
STATED = "As the study file states it; it is in no register of ours."


# ---- the register
@cache
def register() -> dict[str, Licence]:
    """Every entry of data/licences.yaml and of the benchmarks' own files, by the source that it
    covers.
    """
    content = yaml_value(REGISTER)
    declared = [licence for one in FORMATS.values() for licence in one.licences]
    entries = {licence.source: licence for licence in declared}
    return entries | {source: _entry(source, **facts) for source, facts in content.items()}


def _entry(source: str, seen: dict[str, bool], **facts) -> Licence:
    return Licence(
        source=source, seen=frozenset(fact for fact, was_read in seen.items() if was_read), **facts
    )


def covers(name: str, source: str) -> bool:
    """Whether an entry's name covers a source: it is the same, or stands above it (NAME/...), or
    ends in ':' or '*' and begins it.
    """
    name, source = name.casefold(), source.casefold()  # the hub and GitHub do not tell case apart
    if name.endswith((":", "*")):
        return source.startswith(name.removesuffix("*"))
    return source == name or source.startswith(f"{name}/")


def of(source: str) -> Licence | None:
    """The registered licence of a source, by the longest name that covers it, or None."""
    entries = register()
    found = max((name for name in entries if covers(name, source)), key=len, default=None)
    return None if found is None else entries[found]


# ---- a study's
def of_study(study: Study) -> pd.DataFrame:
    """One row per model and set of a study: name, role, source, the licence's facts, and `known`:
    whether it is in the register.

    The facts are null where neither the register nor the study file has the licence. A local `path`
    changes nothing: the licence is that of the source.
    """
    rows = []
    for role, name, part in _parts(study):
        facts = {fact: getattr(_licence(study, part), fact, None) for fact in FACTS}
        rows.append(
            {
                "name": name,
                "role": role,
                "source": part.source,
                **facts,
                "known": of(_tuned_from(study, part).source) is not None,
            }
        )
    types = dict.fromkeys(COLUMNS, "string") | {
        "items": "boolean",
        "text": "boolean",
        "known": "bool",
    }
    return pd.DataFrame(rows, columns=COLUMNS).astype(types)


def _parts(study: Study) -> list[tuple[str, str, Source]]:
    """Every source of a study with its role and its name there."""
    sections = {
        "base model": study.bases,
        "judge": study.judges,
        "rater": study.raters,
        "training data": study.data,
        "benchmark": study.benchmarks,
    }
    parts = [
        (role, name, part) for role, section in sections.items() for name, part in section.items()
    ]
    parts += [
        ("checkpoint", f"{name}, {which}", part)
        for name, base in study.bases.items()
        for which, part in base.checkpoints.items()
    ]
    return parts + ([("init texts", "init_texts", study.init_texts)] if study.init_texts else [])


def _tuned_from(study: Study, part: Source) -> Source:
    """The base model of a twin, under whose terms it is; any other source itself."""
    kind, _, name = part.source.partition(":")
    return study.bases[study.twins[name].of] if kind == "twin" else part


def _licence(study: Study, part: Source) -> Licence | None:
    """The register's licence, else the one that the study file states: rows of items are then its
    word's to give, text is not.
    """
    part = _tuned_from(study, part)
    stated = study.licences.get(part.source)
    return (
        of(part.source)
        or (stated and Licence(part.source, stated, None, None, STATED, items=True, text=False))
        or None
    )


def _behind(study: Study, benchmark: str) -> list[Source]:
    """Whose licences a row of an item of a benchmark hangs on: the set, the models that answer, and
    those that score the answers.
    """
    asked = study.benchmarks[benchmark]
    judges = [
        judge
        for judge in study.judges.values()
        if asked.format in PROMPT_FORMATS
        and (not judge.benchmarks or benchmark in judge.benchmarks)
    ]
    raters = study.raters.values() if asked.format in UTILITY_FORMATS else ()
    return [asked, *study.bases.values(), *judges, *raters]


def _withheld(study: Study) -> dict[str, str]:
    """The benchmarks whose rows of items may not leave, each with the first source that forbids it
    or whose licence is not known.
    """
    found = {}
    for benchmark in study.benchmarks:
        for part in _behind(study, benchmark):
            licence = _licence(study, part)
            if licence is None or not licence.items:
                found[benchmark] = (
                    f"{part.source}, {licence.licence if licence else 'licence not known'}"
                )
                break
    return found


def allowed_items(study: Study) -> tuple[str, ...]:
    """The benchmarks whose rows of single items may leave the machine, in the study's order."""
    withheld = _withheld(study)
    return tuple(name for name in study.benchmarks if name not in withheld)


def check_export(study: Study, items: bool) -> None:
    """Refuse an export that the licences do not allow; `items`: whether it would hold rows of
    single items of all benchmarks.

    Raises:
        ValueError: a source is in neither the register nor the study file's `licences`, or a
            licence forbids rows of single items.
    """
    unknown = list(
        dict.fromkeys(part.source for _, _, part in _parts(study) if _licence(study, part) is None)
    )
    if unknown:
        others = f" and of {len(unknown) - 1} more" if unknown[1:] else ""
        raise ValueError(
            f"the licence of {unknown[0]}{others} is not known, so nothing of the study"
            f" {study.name} is exported; "
            f'say so in the study file under licences: {{"{unknown[0]}": NAME of its licence}}'
        )
    withheld = _withheld(study) if items else {}
    if withheld:
        names = "; ".join(f"{benchmark} ({why})" for benchmark, why in withheld.items())
        raise ValueError(
            f"a licence forbids publishing rows of single items: {names}; such a benchmark is"
            " exported as rates only"
        )


# ---- what stands beside an export
def notice(study: Study) -> str:
    """The text of the file NOTICE beside an export: whom to name, what leaves of each benchmark,
    terms on outputs and on adapters.
    """
    sections = {
        "Made with": _made_with(study),
        "Rows of single items": _rows_of_items(study),
        "Terms on what the models say": _terms(study, "outputs", study.models.values()),
        "What a published adapter on a base model must carry": _terms(
            study, "adapters", study.bases.values()
        ),
        "Not read on the licence's page, to be checked there": _unseen(study),
    }
    head = (
        f"NOTICE for the study {study.name}, exported by Driftbook: ids, scores and settings, and"
        " no text of a prompt, an answer or an example."
    )
    body = [
        f"{title}\n" + "\n".join(f"- {line}" for line in lines or ["none"])
        for title, lines in sections.items()
    ]
    return nameless("\n\n".join([head, *body]) + "\n")


def _by_source(study: Study, parts: Iterable[Source]) -> dict[str, Licence | None]:
    return {part.source: _licence(study, part) for part in parts}


def _made_with(study: Study) -> list[str]:
    """A line per licence: the sources under it and what they are in the study, who may use them,
    whom to name, the page.
    """
    named: dict[Licence | None, dict[str, list[str]]] = {}
    for role, name, part in _parts(study):
        roles = named.setdefault(_licence(study, part), {}).setdefault(part.source, [])
        roles.append(role if name == role.replace(" ", "_") else f"{role} {name}")
    lines = []
    for licence, sources in named.items():
        said = f"{licence.licence}. {licence.use}" if licence else "licence not known."
        more = [text for text in (licence and licence.credit, licence and licence.url) if text]
        names = ", ".join(f"{source} ({', '.join(roles)})" for source, roles in sources.items())
        lines.append("\n  ".join([f"{names}: {said}", *more]))
    return lines


def _rows_of_items(study: Study) -> list[str]:
    withheld = _withheld(study)
    return [
        f"{name}: "
        + (f"as rates only ({withheld[name]})" if name in withheld else "ids with scores")
        for name in study.benchmarks
    ]


def _terms(study: Study, fact: str, parts: Iterable[Source]) -> list[str]:
    """A line per licence that has such terms, with the sources that are under it."""
    found: dict[str, list[str]] = {}
    for source, licence in _by_source(study, parts).items():
        if licence and (terms := getattr(licence, fact)):
            found.setdefault(f"{licence.licence}: {terms}", []).append(source)
    return [f"{', '.join(sources)}, {terms}" for terms, sources in found.items()]


def _unseen(study: Study) -> list[str]:
    """A line per source with facts to be checked; not whether its text may leave, since it does
    not.
    """
    lines = []
    for source, licence in _by_source(study, [part for _, _, part in _parts(study)]).items():
        if licence and (facts := [fact for fact in licence.unseen if fact != "text"]):
            lines.append(f"{source}: {', '.join(facts)}")
    return lines
