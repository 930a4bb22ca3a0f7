"""The rules of instructions agree with IFEval's reference on made-up responses."""

import importlib.util
import random
import sys
import types

import pytest

from driftbook.benchmarks import ifeval
from driftbook.benchmarks.ifeval import RULES, check

pytestmark = pytest.mark.slow

N = 400  # made-up responses of each instruction


PUNKT = {
    "length_constraints:number_sentences",
    "change_case:capital_word_frequency",
}  # need nltk's punkt model


LANGDETECT = {
    "language:response_language",
    "change_case:english_capital",
    "change_case:english_lowercase",
}


# least agreement: punkt's other words, and langdetect's errors on short or capital text; all other
# rules agree on every response
LEAST = {
    "length_constraints:number_sentences": 0.97,
    "change_case:english_capital": 0.9,
    "change_case:english_lowercase": 0.93,
}


@pytest.fixture(scope="module")
def peer():
    """lm-evaluation-harness's registry of IFEval. Where langdetect, immutabledict or punkt are
    missing, stand-ins let the other rules be imported; `absent` says which are."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip(
            "lm-evaluation-harness is not installed, so the rules have nothing to be compared with"
        )
    nltk = pytest.importorskip(
        "nltk", reason="nltk is not installed, and lm-evaluation-harness's rules need it"
    )
    absent = {
        name for name in ("langdetect", "immutabledict") if importlib.util.find_spec(name) is None
    }
    with pytest.MonkeyPatch.context() as patch:
        if "langdetect" in absent:
            patch.setitem(
                sys.modules,
                "langdetect",
                types.SimpleNamespace(detect=lambda text: "en", LangDetectException=RuntimeError),
            )
        else:
            import langdetect

            langdetect.DetectorFactory.seed = 0
        if "immutabledict" in absent:
            patch.setitem(sys.modules, "immutabledict", types.SimpleNamespace(immutabledict=dict))
        try:
            nltk.data.find("tokenizers/punkt_tab")
        except LookupError:
            absent.add("punkt")
            patch.setattr(nltk.data, "find", lambda name: name)  # else the import would fetch it
        try:
            from lm_eval.tasks.ifeval import instructions_registry
        except ImportError as error:
            pytest.skip(f"lm-evaluation-harness's rules cannot be imported ({error})")
        yield types.SimpleNamespace(rules=instructions_registry.INSTRUCTION_DICT, absent=absent)
        for name in (
            [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval")]
            if absent
            else []
        ):
            del sys.modules[name]  # they hold the stand-ins


def reference(peer, name: str, arguments: dict, response: str) -> bool:
    rule = peer.rules[name](name)
    rule.build_description(**arguments)
    return bool(response.strip() and rule.check_following(response))


PLAIN = [
    "The river runs past the old mill.",
    "Dr. Hill and Mrs. Brook came at 5 p.m. to see it.",
    "It cost $3.50, e.g. for bread!",
    "What is an oak?",
    "In 1990, the U.S. team won.",
    "They met in the U.S. The weather was fine.",
    "Wait... what happened then?",
    'She said, "Go home." He did.',
    "Oaks, elms, and so on grow here.",
    "We planted it in 2020. It grew well.",
    "Is it tall? Yes! Very.",
    "Visit www.trees.org for more.",
    "J. R. Brook wrote of trees (see p. 12).",
    "The path (it is long.) ends here.",
    "This is well-known; few doubt it.",
    "It's 3:15 now, isn't it?",
    "a small bird sang",
    "no one came.",
    "He works at Oak Inc. in town.",
    "Water boils at 100.5 degrees, as Prof. Reed says.",
    "I think so…",
    "Version 2.0. Next is 3.",
    (
        "We walked for miles; then we slept. Morning came. We woke up and ate bread, cheese and"
        " apples in the sun."
    ),
]


MARKED = [
    "# Trees",
    "**Oaks** are *tall*",
    "* an oak",
    "- an elm",
    "1. Begin with an oak",
    "** **",
    "***",
    "******",
    "<<Song of trees>>",
    "<< >>",
    "[name] lives in [place]",
    "[address]",
    "P.S. Write soon",
    "P.P.S. And again",
    "Section 1",
    "SECTION 2 more",
    "My answer is yes.",
    "My answer is no.",
    "Any other questions?",
    '{"tree": "oak"}',
    "```json",
    "```",
    '"A quoted line"',
    "NASA AND THE U.S. AGREE",
    "DON'T CALL US",
    "I'LL go to the BBC",
    "ALL CAPITALS HERE",
    "**Note.** See below",
    "Section 3",
    "Tree: an oak",
    "* * *",
    "--- AB/CD ---",
    "'TIS A B-C: YES",
    '"NO," HE SAID',
    "OK. X is Y & Z",
]


KEYS = ["oak", "river", "tree", "we", "U.S.", "well-known", "zebra"]


NOT_ENGLISH = [
    "Der Fluss fließt an der alten Mühle vorbei.",
    "La rivière coule près du vieux moulin.",
    "1 2 3",
]


def made_up(rng: random.Random) -> str:
    """A response of pieces of prose and markup, now and then in one case or in quotes."""
    pieces = [
        rng.choice(PLAIN if rng.random() < 0.65 else MARKED) for _ in range(rng.randint(1, 9))
    ]
    text = "".join(piece + rng.choice([" ", " ", "\n", "\n\n"]) for piece in pieces)[
        : None if rng.random() < 0.8 else rng.randint(0, 120)
    ]
    return rng.choice([str] * 8 + [str.upper, str.lower, lambda text: f'"{text.strip()}"'])(text)


def asked(name: str, rng: random.Random) -> dict:
    """Arguments of an instruction, such that responses of about the made-up ones' size may follow
    it or not.
    """
    relation, few = rng.choice(ifeval.RELATIONS), rng.randint(1, 4)
    return {
        "keywords:existence": {"keywords": rng.sample(KEYS, rng.randint(1, 2))},
        "keywords:frequency": {"keyword": rng.choice(KEYS), "frequency": few, "relation": relation},
        "keywords:forbidden_words": {"forbidden_words": rng.sample(KEYS, 2)},
        "keywords:letter_frequency": {
            "letter": rng.choice("aeoTz"),
            "let_frequency": rng.randint(1, 30),
            "let_relation": relation,
        },
        "language:response_language": {"language": rng.choice(["en", "en", "de", "fr"])},
        "length_constraints:number_sentences": {
            "num_sentences": rng.randint(2, 12),
            "relation": relation,
        },
        "length_constraints:number_paragraphs": {"num_paragraphs": rng.randint(1, 3)},
        "length_constraints:number_words": {"num_words": rng.randint(10, 60), "relation": relation},
        "length_constraints:nth_paragraph_first_word": {
            "num_paragraphs": few,
            "nth_paragraph": rng.randint(1, few),
            "first_word": rng.choice(["The", "she", "it", "dr", "we", "is"]),
        },
        "detectable_content:number_placeholders": {"num_placeholders": few},
        "detectable_content:postscript": {
            "postscript_marker": rng.choice(["P.S.", "P.P.S", "Note"])
        },
        "detectable_format:number_bullet_lists": {"num_bullets": rng.randint(1, 3)},
        "detectable_format:number_highlighted_sections": {"num_highlights": few},
        "detectable_format:multiple_sections": {
            "section_spliter": rng.choice(["Section", "SECTION", "Tree"]),
            "num_sections": rng.randint(1, 3),
        },
        "combination:repeat_prompt": {"prompt_to_repeat": rng.choice([*PLAIN, *MARKED])},
        "startend:end_checker": {"end_phrase": rng.choice([*PLAIN, "then?", 'home." He did.'])},
        "change_case:capital_word_frequency": {
            "capital_frequency": rng.randint(1, 14),
            "capital_relation": relation,
        },
    }.get(name, {})


def begun_with(arguments: dict, rng: random.Random) -> str:
    """Paragraphs of which one begins with the word asked for, or nearly so."""
    parts = [rng.choice(PLAIN) for _ in range(arguments["num_paragraphs"])]
    parts[arguments["nth_paragraph"] - 1] = (
        rng.choice(["", "'", '"'])
        + arguments["first_word"]
        + rng.choice([" ", ", ", "'s ", "-", "\n"])
        + "more"
    )
    return rng.choice(["\n\n", "\n\n", "\n\n\n\n", "\n\n \n\n"]).join(parts)


def json_or_nearly(rng: random.Random) -> str:
    return (
        rng.choice(["", "```json\n", "```JSON", "```\n"])
        + rng.choice(['{"a": [1, 2]}', "[1]", "{a: 1}", '"a"', "NaN"])
        + rng.choice(["", "\n```", "```"])
    )


def shaped(name: str, arguments: dict, rng: random.Random) -> str:
    """A made-up response, half of the time bent toward what the instruction asks for."""
    text = made_up(rng)
    if rng.random() < 0.5:
        return text
    match name:
        case "length_constraints:nth_paragraph_first_word":
            return begun_with(arguments, rng)
        case "length_constraints:number_paragraphs":
            return rng.choice(["\n***\n", " *** ", "***"]).join(
                rng.choice([*PLAIN, ""]) for _ in range(rng.randint(1, 4))
            )
        case (
            "length_constraints:number_sentences"
            | "keywords:forbidden_words"
            | "punctuation:no_comma"
        ):
            return " ".join(rng.choice(PLAIN) for _ in range(rng.randint(1, 5)))
        case "detectable_format:multiple_sections":
            return "\n".join(
                f"{arguments['section_spliter']}{rng.choice([' 1', '2', ' 3:', ' one'])}\n"
                f"{rng.choice(PLAIN)}"
                for _ in range(rng.randint(1, 4))
            )
        case "combination:two_responses":
            return rng.choice(["******", "\n******\n"]).join(
                rng.choice([*PLAIN[:3], ""]) for _ in range(rng.randint(2, 3))
            )
        case "combination:repeat_prompt":
            return rng.choice([str, str.upper])(arguments["prompt_to_repeat"]) + "\n" + text
        case "startend:end_checker":
            return text + arguments["end_phrase"] + rng.choice(["", "\n", '"', " more"])
        case "startend:quotation":
            return rng.choice(['"', ' "']) + text + rng.choice(['"', '"\n', ""])
        case "detectable_format:json_format":
            return json_or_nearly(rng)
        case "change_case:english_capital":
            return text.upper()
        case "change_case:english_lowercase":
            return text.lower()
        case "language:response_language":
            return rng.choice(NOT_ENGLISH)
    return "\n".join(rng.choice(MARKED) for _ in range(rng.randint(1, 8)))


def compared(peer, name: str) -> list[tuple[bool | None, bool, dict, str]]:
    """Of N made-up responses our verdict and the reference's, with arguments and response."""
    rng = random.Random(name)
    made = [(arguments := asked(name, rng), shaped(name, arguments, rng)) for _ in range(N)]
    return [
        (
            check(text, [(name, arguments)])[0],
            reference(peer, name, arguments, text),
            arguments,
            text,
        )
        for arguments, text in made
    ]


@pytest.mark.parametrize("name", RULES)
def test_the_rules_agree_with_the_references(peer, name):
    if name in PUNKT and "punkt" in peer.absent:
        pytest.skip("nltk's punkt_tab is not here, and lm-evaluation-harness's rule needs it")
    if name == "language:response_language" and "langdetect" in peer.absent:
        pytest.skip("langdetect is not installed, and both rules need it")
    found = compared(peer, name)
    followed = sum(theirs for _, theirs, *_ in found) / N
    assert 0.05 < followed < 0.95, followed
    differing = [(arguments, text) for ours, theirs, arguments, text in found if ours != theirs]
    assert 1 - len(differing) / N >= LEAST.get(name, 1), differing[:3]


@pytest.mark.parametrize("seed", range(4))
def test_several_instructions_are_checked_as_the_reference_does(peer, seed):
    from lm_eval.tasks.ifeval import utils

    rng, names = random.Random(seed), sorted(set(RULES) - PUNKT - LANGDETECT)
    for _ in range(50):
        chosen = [(name, asked(name, rng)) for name in rng.sample(names, 3)]
        text = shaped(*chosen[0], rng)
        inp = utils.InputExample(
            0, [name for name, _ in chosen], "a prompt", [arguments for _, arguments in chosen]
        )
        assert (
            check(text, chosen)
            == utils.test_instruction_following_strict(inp, text).follow_instruction_list
        )
