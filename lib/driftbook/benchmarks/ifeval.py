"""Instruction following without a judge, in IFEval's format (Zhou et al. 2023, arXiv 2311.07911):
each instruction is checked by a rule.

The rules are those of google/IFEval's code, so that numbers compare, down to its habits: keywords
are searched as regular expressions and within words, a divider at either end makes no paragraph.
lm-evaluation-harness's copy of them is not used, because importing it downloads data of nltk; the
tests compare the two rule by rule. `sentences` approximates nltk's punkt, `words` its word
tokenizer, and the two rules of letter case look at the alphabet where the reference asks langdetect
whether the text is English. A language is judged by langdetect where it is installed, else not at
all.
"""

import importlib.util
import inspect
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pandas as pd

from driftbook.benchmarks.format import Asking, Format, Rating, set_licence
from driftbook.benchmarks.losses import written
from driftbook.study.reading import json_lines

if TYPE_CHECKING:
    from driftbook.models.scoring import Scorer

Instruction = tuple[str, dict]
RELATIONS = ("less than", "at least")
Relation = Literal[RELATIONS]
_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
UNSCORED = "the package langdetect, which judges the language, is not installed"
_LATIN = 0.9  # least share of the letters that are Latin, in what may be English


# ---- sentences and words
_ABBREVIATIONS = frozenset(
    "adm aug ave bros capt co col corp cos ct dec dr feb fri ft gen inc jan jr lt ltd maj messrs mr"
    " mrs ms nov oct prof rep reps rev sen sep sept sgt sr st thu thur tue tues vs wed yr".split()
)
_STARTERS = frozenset(
    "a according after all also although an and another any as at because before both but by can"
    " despite each even every finally first for from he her here his how however i if in indeed"
    " instead it its many meanwhile moreover most my nevertheless next no not now of on once one"
    " only or other our perhaps please she since so some such that the their then there therefore"
    " these they this those though thus to under until we what when where whether which while who"
    " why with yet you your".split()
)
_CLOSING = "\"'”’)]}*_"
_OPENING = "\"'“‘([{*_"


def sentences(text: str) -> list[str]:
    """The sentences of an English text, by rule; a line break ends none, and what follows the last
    end is one.

    A word ends a sentence if, before closing quotes and brackets, it ends with ? or !, or with a
    period and is no abbreviation, no initial and no number. After those, and after dots of
    omission, the next word decides: a number ends one before all but a small letter, an omission
    before a capital, an abbreviation or initial only before a capitalised word that often begins a
    sentence. So `1. Begin` is two, as in the reference, which also ends one after `e.g.` and
    decides on more words by how often each was seen small.
    """
    found, begun = [], []
    for word, following in pairwise([*text.split(), ""]):
        begun.append(word)
        if not following or _ends(word.rstrip(_CLOSING), following):
            found.append(" ".join(begun))
            begun = []
    return found


def _ends(word: str, following: str) -> bool:
    if not word.endswith("."):
        return word.endswith(("?", "!"))
    bare, first = word.lstrip(_OPENING)[:-1].lower(), following.lstrip(_OPENING)
    if re.fullmatch(r"[-+$]?[\d.,]*\d%?", bare):
        return not following[0].islower()
    if bare.endswith("."):
        return first[:1].isupper()
    if bare in _ABBREVIATIONS or re.fullmatch(r"[^\W\d_]|(?:[^\W\d_]\.)+[^\W\d_]|ph\.d", bare):
        return first[:1].isupper() and re.match(r"\w*", first.lower())[0] in _STARTERS
    return True


_APART = re.compile(r"[:,](?!\d)|\.{2,}|[;@#$%&?!\[\](){}<>*\"«»“”‘’„`\u2012-\u2015]|--|''")
_QUOTED = re.compile(r"(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)", re.IGNORECASE)
_CLITIC = re.compile(r"(?<=[^\s'])('(?:s|S|m|M|d|D|ll|LL|re|RE|ve|VE)|n't|N'T)(?=\s|$)")
_JOINED = re.compile(
    r"\b(can)(not)\b|\b(gim)(me)\b|\b(gon)(na)\b|\b(got)(ta)\b|\b(lem)(me)\b|\b(wan)(na)(?=\s)",
    re.IGNORECASE,
)


def words(text: str) -> list[str]:
    """The words of a text as the Penn Treebank writes them, without punctuation by itself: DON'T is
    DO N'T, and A-B or U.S. one word.
    """
    text = _CLITIC.sub(r" \1", _QUOTED.sub("' ", _APART.sub(" ", text)))
    return _JOINED.sub(lambda match: " ".join(filter(None, match.groups())), text).split()


def _compared(count: int, relation: Relation, wanted: int) -> bool:
    return count < wanted if relation == "less than" else count >= wanted


def _pattern(text: str) -> str:
    """A text as the reference searches it: as a regular expression, and where it is none by its
    letters.
    """
    try:
        re.compile(text)
    except re.error:
        return re.escape(text)
    return text


# ---- the rules
def _keywords_exist(response: str, keywords: list[str]) -> bool:
    return all(re.search(_pattern(word), response, re.IGNORECASE) for word in keywords)


def _keyword_frequency(response: str, keyword: str, frequency: int, relation: Relation) -> bool:
    found = re.findall(_pattern(keyword.strip()), response, re.IGNORECASE)
    return _compared(len(found), relation, frequency)


def _forbidden(response: str, forbidden_words: list[str]) -> bool:
    patterns = [rf"\b{_pattern(word)}\b" for word in forbidden_words]
    return not any(re.search(pattern, response, re.IGNORECASE) for pattern in patterns)


def _letter_frequency(
    response: str, letter: str, let_frequency: int, let_relation: Relation
) -> bool:
    """The reference draws another letter at random where it is none of a to z; here # is counted as
    #.
    """
    return _compared(response.lower().count(letter.strip().lower()), let_relation, let_frequency)


def _language(response: str, language: str) -> bool | None:
    """Whether langdetect, its seed fixed, finds the language; true where it finds none at all, as
    in the reference; None without it.
    """
    if importlib.util.find_spec("langdetect") is None:
        return None
    import langdetect

    langdetect.DetectorFactory.seed = 0
    try:
        return langdetect.detect(response) == language
    except langdetect.LangDetectException:
        return True


def _number_sentences(response: str, num_sentences: int, relation: Relation) -> bool:
    return _compared(len(sentences(response)), relation, num_sentences)


def _number_paragraphs(response: str, num_paragraphs: int) -> bool:
    parts = [bool(part.strip()) for part in re.split(r"\s?\*\*\*\s?", response)]
    return all(parts[1:-1]) and sum(parts) == num_paragraphs


def _number_words(response: str, num_words: int, relation: Relation) -> bool:
    return _compared(len(re.findall(r"\w+", response)), relation, num_words)


def _nth_paragraph(response: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Empty paragraphs do not count, and yet have their number, as in the reference."""
    parts = response.split("\n\n")
    if (
        sum(bool(part.strip()) for part in parts) != num_paragraphs
        or not 1 <= nth_paragraph <= num_paragraphs
    ):
        return False
    begins = parts[nth_paragraph - 1].split()
    if not begins:
        return False
    word = re.match(r"[^.,?!'\"]*", begins[0].lstrip("'").lstrip('"'))[0]
    return word.lower() == first_word.lower()


def _placeholders(response: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", response)) >= num_placeholders


def _postscript(response: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return bool(re.search(known.get(marker, _pattern(marker.lower())), response.lower()))


def _bullets(response: str, num_bullets: int) -> bool:
    marks = (r"^\s*\*[^*].*$", r"^\s*-.*$")
    return sum(len(re.findall(mark, response, re.MULTILINE)) for mark in marks) == num_bullets


def _highlights(response: str, num_highlights: int) -> bool:
    """*one* and **two** both count, as the reference counts them: each kind by its own search."""
    single = [part for part in re.findall(r"\*[^\n*]*\*", response) if part.strip("*").strip()]
    double = [part for part in re.findall(r"\*\*[^\n*]*\*\*", response) if part[2:-2].strip()]
    return len(single) + len(double) >= num_highlights


def _sections(response: str, section_spliter: str, num_sections: int) -> bool:
    begin = _pattern(section_spliter.strip())
    return len(re.findall(rf"(?:{begin})\s?\d+", response)) >= num_sections


def _json(response: str) -> bool:
    text = response.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(response: str) -> bool:
    titles = re.findall(r"<<[^\n]+>>", response)
    return any(title.lstrip("<").rstrip(">").strip() for title in titles)


def _two_responses(response: str) -> bool:
    parts = [part.strip() for part in response.split("******")]
    given = [part for part in parts if part]
    return all(parts[1:-1]) and len(given) == 2 and given[0] != given[1]


def _repeats(response: str, prompt_to_repeat: str) -> bool:
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _ends_with(response: str, end_phrase: str) -> bool:
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _capital_words(response: str, capital_frequency: int, capital_relation: Relation) -> bool:
    capital = [word for word in words(response) if word.isupper()]
    return _compared(len(capital), capital_relation, capital_frequency)


def _latin(response: str) -> bool:
    names = [unicodedata.name(letter, "") for letter in response if letter.isalpha()]
    return sum(name.startswith("LATIN") for name in names) >= _LATIN * len(names)


def _quoted(response: str) -> bool:
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


RULES: dict[str, Callable[..., bool | None]] = {
    "keywords:existence": _keywords_exist,
    "keywords:frequency": _keyword_frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _language,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_words": _number_words,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": lambda response: any(
        option in response for option in _OPTIONS
    ),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeats,
    "startend:end_checker": _ends_with,
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": lambda response: response.isupper() and _latin(response),
    "change_case:english_lowercase": lambda response: response.islower() and _latin(response),
    "punctuation:no_comma": lambda response: "," not in response,
}


def _arguments(rule: Callable[..., bool | None]) -> dict[str, type]:
    """The arguments of a rule beside the response, and of what type each is."""
    _, *parameters = inspect.signature(rule).parameters.values()
    return {parameter.name: parameter.annotation for parameter in parameters}


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


# what an argument of a type may be, and how it is called
_TYPES: dict[object, tuple[Callable[[object], bool], str]] = {
    int: (lambda value: type(value) is int and value >= 0, "a whole number"),
    str: (_is_text, "a text"),
    list[str]: (_are_texts, "a list of texts"),
    Relation: (lambda value: value in RELATIONS, f"one of {RELATIONS}"),
}


# ---- files
def load_ifeval(path: Path) -> pd.DataFrame:
    """Prompts of a JSONL file in IFEval's form: prompt_id, prompt and instructions, a list of (id,
    arguments); null arguments are dropped.

    Raises:
        ValueError: a torn row, one without key, prompt, instruction_id_list or kwargs, a repeated
            key, an instruction that is unknown or whose arguments are not its own.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give IFEval's input_data.jsonl")
    rows = [_item(row, f"{path}: line {line}") for line, row in json_lines(path)]
    if not rows:
        raise ValueError(f"{path} has no prompts")
    items = pd.DataFrame(rows, columns=["prompt_id", "prompt", "instructions"])
    repeated = items.prompt_id[items.prompt_id.duplicated()]
    if len(repeated):
        raise ValueError(f"{path}: key {repeated.iloc[0]} is repeated; remove one of the two")
    return items


def _item(row: object, where: str) -> tuple[str, str, list[Instruction]]:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no JSON object")
    needed = ("key", "prompt", "instruction_id_list", "kwargs")
    if absent := [name for name in needed if row.get(name) is None]:
        raise ValueError(f"{where} has no {absent[0]!r}")
    if not _is_text(row["prompt"]):
        raise ValueError(f"{where} has a prompt that is empty or no text")
    ids, arguments = row["instruction_id_list"], row["kwargs"]
    if not _are_texts(ids) or not isinstance(arguments, list) or len(ids) != len(arguments):
        raise ValueError(
            f"{where}: instruction_id_list and kwargs are not two lists of one length, at least one"
        )
    pairs = zip(ids, arguments, strict=True)
    return str(row["key"]), row["prompt"], [_instruction(*pair, where) for pair in pairs]


def _instruction(name: str, given: object, where: str) -> Instruction:
    """The instruction with its arguments that are not null, checked to be its own."""
    if name not in RULES:
        raise ValueError(
            f"{where} has the unknown instruction {name!r}; expected one of IFEval's {len(RULES)}"
        )
    if not isinstance(given, dict):
        raise ValueError(f"{where}: the kwargs of {name} are no JSON object")
    types = _arguments(RULES[name])
    kept = {key: _whole(value) for key, value in given.items() if value is not None}
    if extra := [key for key in kept if key not in types]:
        raise ValueError(
            f"{where}: {name} has the argument {extra[0]!r}, which is none of its own"
            f" {sorted(types)}"
        )
    for key, (fits, called) in ((key, _TYPES[kind]) for key, kind in types.items()):
        if key not in kept or not fits(kept[key]):
            raise ValueError(f"{where}: {name} has {key}={kept.get(key)!r}; expected {called}")
    return name, kept


def _whole(value: object) -> object:
    """A number that other tools wrote as 3.0, as 3."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# ---- a response
def check(response: str, instructions: Sequence[Instruction]) -> list[bool | None]:
    """Of each instruction whether the response follows it, as it stands; an empty response follows
    none; None where that cannot be judged.
    """
    return [
        bool(response.strip()) and RULES[name](response, **arguments)
        for name, arguments in instructions
    ]


def _measure(items: pd.DataFrame, scorer: "Scorer", asking: Asking) -> Iterable[Rating]:
    """Of each prompt whether the answer follows all instructions (strictly), and the share of them
    that it follows.
    """
    answers = written(items, scorer, asking)
    for name, text, found in zip(items.prompt_id, answers, items.instructions, strict=True):
        yield from prompt_ratings(name, check(text, found))


def prompt_ratings(prompt_id: str, verdicts: Sequence[bool | None]) -> list[Rating]:
    """Both metrics of one prompt. One instruction that is not followed settles `followed`; an
    instruction that cannot be judged counts in no share, whose weight is the number of instructions
    that were judged (of all, where none was).
    """
    judged = [verdict for verdict in verdicts if verdict is not None]
    followed = None if len(judged) < len(verdicts) and all(judged) else float(all(judged))
    share = sum(judged) / len(judged) if judged else None
    ratings = (("followed", followed, 1), ("instructions followed", share, len(judged or verdicts)))
    return [
        (prompt_id, metric, value, weight, UNSCORED if value is None else None)
        for metric, value, weight in ratings
    ]


IFEVAL = Format(
    name="ifeval",
    kind="utility",
    read=load_ifeval,
    version=1,
    n_items=541,
    tokens=96,  # bounded by the size of its file
    measure=_measure,
    licences=(
        set_licence(
            "google/IFEval",
            "Apache-2.0",
            credit="Zhou et al. 2023, IFEval",
            use="Anyone, for any purpose.",
            leaves="items text",
            seen="licence use text",
            where="its dataset card",
        ),
    ),
)
