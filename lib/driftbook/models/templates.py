"""Chat templates: what is asked, where an answer begins and how it ends, found by rendering.

A template may think, write today's date or end a turn in its own way, and what is asked must depend
on the study alone. So thinking is off wherever a template has a switch, the date is fixed, and a
prompt ends where the template puts the answer of a finished conversation.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache

import jinja2
import jinja2.ext
import jinja2.meta
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from driftbook.models.trees import common_prefix

Message = dict[str, str]
DATE = date(2024, 7, 26)  # the one that Llama 3's templates write where they know none
DIRECTIVES = [flag + letter for flag in ("", "-") for letter in "aAwdebBmyYHIpMSfjUWcxXGuVDFTR"]
THOUGHTS = {  # what opens a thought, and what closes it, in the chat models of the hub
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
    "◁think▷": "◁/think▷",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|channel|>analysis<|message|>": "<|channel|>final<|message|>",
    "<|channel>thought": "<channel|>",
}
_SWITCH = re.compile("think|reason|effort")
_DEGREE = re.compile("effort|mode|strength|level")  # switches that are set by a word
_LEAST = ("none", "off", "disabled", "no_think", "minimal", "low")  # words for the least thought
# what a system, a user, an assistant, and a user again say where a template is tried
PROBE = ("what to heed", "what is asked", "what is said", "what follows")


# ---- rendering
def fix_date(tokenizer: PreTrainedTokenizerBase, day: date | None) -> None:
    """Give the tokenizer's template the date that it writes; DATE where None."""
    tokenizer.date_of_template = day or DATE


def template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's chat template, the default one of several; None where it has none."""
    return tokenizer.get_chat_template() if getattr(tokenizer, "chat_template", None) else None


def render(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], generation: bool = False
) -> str:
    """The text of a conversation by the tokenizer's template, thinking off and the date fixed; with
    `generation`, up to where the template lets an answer begin.
    """
    template, day = str(template_of(tokenizer)), day_of(tokenizer)
    return _rendered(tokenizer, template, day, turns, generation, _switches(tokenizer, template))


def day_of(tokenizer: PreTrainedTokenizerBase) -> date:
    """The date that the tokenizer's template writes."""
    return getattr(tokenizer, "date_of_template", DATE)


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    day: date,
    turns: Sequence[Message],
    generation: bool,
    variables: dict[str, object],
) -> str:
    form = _in_parts if _reads_parts(tokenizer, template) else list
    return _applied(tokenizer, template, day, form(turns), generation, variables)


def _applied(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    day: date,
    turns: Sequence[Message],
    generation: bool,
    variables: dict[str, object],
) -> str:
    return tokenizer.apply_chat_template(
        list(turns),
        chat_template=_dated(template, day),
        tokenize=False,
        add_generation_prompt=generation,
        date_string=day.strftime("%d %b %Y"),
        **variables,
    )


def _in_parts(turns: Sequence[Message]) -> list[dict]:
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


@lru_cache(maxsize=32)
def _reads_parts(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether the template shows what a user says only in a list of parts, as one for images may,
    and would lose a plain text in silence.
    """
    turns = [{"role": "user", "content": PROBE[1]}]
    for form in (list, _in_parts):
        try:
            text = _applied(tokenizer, template, DATE, form(turns), True, {})
        except Exception:  # templates raise errors of many kinds
            continue
        if PROBE[1] in text:
            return form is _in_parts
    return False


@lru_cache(maxsize=32)
def _dated(template: str, day: date) -> str:
    """The template with a strftime_now of its own, which knows one day; transformers' is the
    clock's, and takes no other.
    """
    if "strftime_now" not in template:
        return template
    known = "".join(f".replace('%{one}', '{day.strftime('%' + one)}')" for one in DIRECTIVES)
    known += ".replace('%%', '%')"
    macro = "{% macro strftime_now(format) %}{{ format" + known + " }}{% endmacro %}"
    return macro + "\n" + template  # a line end behind a block is no output


@lru_cache(maxsize=32)
def _variables(template: str) -> dict[str, list[str]]:
    """The variables that a template reads and nobody sets, sorted, under `names`, and the words in
    it under `words`."""
    reader = jinja2.Environment(extensions=[_Generation, jinja2.ext.loopcontrols])
    tree = reader.parse(template)
    words = {str(one.value) for one in tree.find_all(jinja2.nodes.Const)}
    return {"names": sorted(jinja2.meta.find_undeclared_variables(tree)), "words": sorted(words)}


class _Generation(jinja2.ext.Extension):
    """The mark of what an assistant says, as transformers reads it."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=32)
def _switches(tokenizer: PreTrainedTokenizerBase, template: str) -> dict[str, object]:
    """The template's variables that turn thinking off, with the value that does: those named after
    thought that change a prompt.
    """
    found: dict[str, object] = {}
    try:
        read = _variables(template)
    except jinja2.TemplateError:  # transformers says what is wrong when it renders
        return found
    for name in filter(_SWITCH.search, read["names"]):
        least = [word for word in _LEAST if word in read["words"]]
        if "budget" in name:
            on, off = 1024, 0
        elif _DEGREE.search(name):
            on, off = None, least[0] if least else None
        else:
            on, off = True, False
        seen = [_prompts(tokenizer, template, {**found, name: value}) for value in (on, off)]
        if all(seen) and seen[0] != seen[1] and "False" not in str(seen[1]):
            found[name] = off
    return found


def _prompts(
    tokenizer: PreTrainedTokenizerBase, template: str, variables: dict[str, object]
) -> list[str]:
    """Prompts with these variables, without a system message and with one; none where the template
    refuses.
    """
    system, user = ({"role": "system", "content": PROBE[0]}, {"role": "user", "content": PROBE[1]})
    found = []
    for turns in ([user], [system, user]):
        try:
            found.append(_rendered(tokenizer, template, DATE, turns, True, variables))
        except Exception:  # templates raise errors of many kinds
            continue
    return found


# ---- where an answer begins, and how it ends
@dataclass(frozen=True)
class Place:
    """Where the template puts an answer, against the prompt that it renders.

    `asked` and `before` say what is taken off the end of that prompt and what is put there instead,
    so that it ends where an answer begins when it is asked for, and in a finished conversation.
    `lead` is white space between the two, `tail` what follows an answer, `behind` what the template
    writes once behind a whole conversation, `end` the token that ends a turn, if there is one, and
    `closed_by` this token where it is the first of the next turn (GLM).
    """

    asked: tuple[str, str] = ("", "")
    before: tuple[str, str] = ("", "")
    lead: str = ""
    tail: str = ""
    behind: str = ""
    end: int | None = None
    closed_by: str = ""


def place_of(tokenizer: PreTrainedTokenizerBase) -> Place:
    """Where the tokenizer's template puts an answer, found by rendering a conversation.

    Raises:
        ValueError: it puts every answer into a thought.
    """
    template = template_of(tokenizer)
    return Place() if template is None else _place(tokenizer, template)


@lru_cache(maxsize=32)
def _place(tokenizer: PreTrainedTokenizerBase, template: str) -> Place:
    _, user, answer, more = PROBE
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    longer = [*turns, {"role": "user", "content": more}]
    try:
        prompt = render(tokenizer, turns[:1], generation=True)
        before, found, after = render(tokenizer, turns).rpartition(answer)
    except Exception:  # a judge's template, or one that is refused when it is asked
        return Place()
    if not found or user not in before:
        return Place()
    try:
        following = render(tokenizer, longer).partition(answer)[2]
    except Exception:
        following = after
    asked, lead = _asked(prompt, before)
    if _opened(asked) is not None:
        raise ValueError(
            f"the chat template opens a thought before every answer ({asked[-20:]!r}) and has no"
            " switch that turns it off; give the base another one under template:"
        )
    ways, end = (_change(prompt, asked), _change(prompt, before)), _end(tokenizer, after)
    if end is None and not after.strip():
        end = _end(tokenizer, following)
        closed_by = "" if end is None else tokenizer.convert_ids_to_tokens(end)
        return Place(*ways, lead, after, "", end, closed_by)
    return Place(*ways, lead, after, _behind(tokenizer, after, following, end), end)


def _asked(prompt: str, before: str) -> tuple[str, str]:
    """Where a prompt has to end, and the white space up to an answer, from the template's own
    prompt and the text before an answer in a finished conversation.
    """
    opened = _opened(prompt)
    plain = prompt if opened is None else prompt[:opened]
    if before.startswith(plain):
        between = before[len(plain) :]
        return (before, "") if between.strip() or plain != prompt else (plain, between)
    if prompt.startswith(before) and opened is None:
        return prompt, ""  # a thought is closed in prompts, and left out of what was answered
    return plain, ""


def _opened(text: str) -> int | None:
    """Where the text opens a thought at its end, if it does."""
    ends = [text.rstrip().removesuffix(mark) for mark in THOUGHTS]
    found = [len(rest) for rest in ends if len(rest) < len(text.rstrip())]
    return min(found, default=None)


def _change(text: str, wanted: str) -> tuple[str, str]:
    """What is taken off the end of one text, and put there, to get another one."""
    shared = common_prefix(text, wanted)
    return text[shared:], wanted[shared:]


def changed(text: str, change: tuple[str, str]) -> str:
    """The text with another end; a ValueError where it has not the one that is to be changed."""
    off, on = change
    if not text.endswith(off):
        raise ValueError(
            f"the chat template ends its prompts in different ways ({text[-20:]!r} and {off!r}), so"
            " that it is not known where an answer begins; use another template"
        )
    return text.removesuffix(off) + on


def _end(tokenizer: PreTrainedTokenizerBase, after: str) -> int | None:
    """The added or special token that follows an answer, white space aside."""
    known = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    for token in tokenizer.encode(after, add_special_tokens=False):
        if token in known:
            return token
        if tokenizer.decode([token]).strip():
            return None
    return None


def _behind(tokenizer: PreTrainedTokenizerBase, after: str, following: str, end: int | None) -> str:
    """What follows the last answer of a conversation, and no other (Phi-3 writes one more end
    token).
    """
    last, other = (tokenizer.encode(text, add_special_tokens=False) for text in (after, following))
    shared = last[: common_prefix(last, other)]
    text = tokenizer.decode(shared, skip_special_tokens=False)
    rest = after.removeprefix(text) if end in shared else ""
    return rest if rest.strip() and after.startswith(text) else ""


def lead(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The white space that the chat template puts between a prompt and its answer (Mistral's has a
    space): what is read there begins with it.
    """
    return "" if tokenizer is None else place_of(tokenizer).lead


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's, the model's own, and the one with which the
    chat template ends a turn.
    """
    ends = model.generation_config.eos_token_id
    more = ends if isinstance(ends, list) else [ends]
    found = [tokenizer.eos_token_id, *more, place_of(tokenizer).end]
    return list(dict.fromkeys(one for one in found if one is not None))


def check_template(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ValueError where the tokenizer's template cannot be used to ask: it has none, it puts
    answers into thoughts, or it ends them with no token.
    """
    template = template_of(tokenizer)
    if template is None:
        raise ValueError(
            f"{name}: its tokenizer has no chat template; use the instruction-tuned model's"
            " tokenizer, or give one to the base in the study file, under template:"
        )
    if not any(PROBE[1] in text for text in _prompts(tokenizer, template, {})):
        raise ValueError(
            f"{name}: its chat template refuses what a user asks, or does not show it; give the"
            " base another one under template:"
        )
    try:
        place = place_of(tokenizer)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if place.end is None:
        raise ValueError(
            f"{name}: its chat template puts no special token behind an answer, but"
            f" {place.tail[:20]!r}, so that answers cannot be seen to end; give the base another"
            " one under template:"
        )


def notes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What is done to the tokenizer's template, a sentence each; none for most."""
    template, place = template_of(tokenizer) or "", place_of(tokenizer)
    read = [f"{name} = {value}" for name, value in _switches(tokenizer, template).items()]
    ends, eos = tokenizer.convert_ids_to_tokens(place.end or 0), tokenizer.eos_token
    off, on = place.asked
    said = {
        f"thinking is off ({', '.join(read)})": read,
        f"its prompts end without {off!r}, as its finished answers begin": off,
        f"its prompts go on with {on!r}, as its finished answers begin": on,
        f"the date that its template writes is {day_of(tokenizer)}": _writes_date(tokenizer),
        f"a turn ends with {ends}, which is not the tokenizer's {eos}": (
            place.end not in (None, tokenizer.eos_token_id)
        ),
    }
    return [sentence for sentence, so in said.items() if so]


def _writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    template = template_of(tokenizer) or ""
    days, found = (DATE, date(1999, 12, 31)), []
    for day in days:
        turns = [{"role": "user", "content": PROBE[1]}]
        found.append(_rendered(tokenizer, template, day, turns, True, {}))
    return found[0] != found[1]
