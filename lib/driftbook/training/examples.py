"""What variants train on, and what their dose is measured on: examples in a base model's tokens."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from driftbook.benchmarks.data import for_sft, items, prompts, training_examples
from driftbook.doctors.data import DATA_COLUMNS, equal_answers, examine_data
from driftbook.models.conversations import NOTHING, conversation_ids, counted_ids, without
from driftbook.models.loading import Loaded, check_ids, context_length
from driftbook.models.scoring import Ids, Scorer
from driftbook.models.starts import token_ids
from driftbook.study.files import digest, read_object
from driftbook.study.methods import TEXT_INITS
from driftbook.study.sections import ITEM_FORMATS, PROMPT_FORMATS, UTILITY_FORMATS
from driftbook.study.sources import locate
from driftbook.study.study_file import Study
from driftbook.study.variants import Variant
from driftbook.training import steps
from driftbook.training.objectives import Change
from driftbook.training.steps import Conversation, Pair

OVERLAPS = ("benchmark_overlap", "near_benchmark")  # the data doctor's findings
Way = tuple[str, str, Change | None, int]
TRAINED_ON = ("mixing",)  # kinds whose data are trained on with the others


@dataclass(frozen=True)
class Prepared:
    """What all variants of one base model, objective and data train on, tokenised once; `packs` are
    the numbers of the examples that the trainer draws together (one by one where the study does not
    pack), `note` says what was cut or left out, `lengths` are the tokens of each example before it
    was cut (of a pair, of the longer one). Of a second objective its own examples are in
    `alignment`, of which `n_aligned` are seen at a step.
    """

    examples: list[Conversation] | list[Pair]
    packs: list[list[int]]
    revision: str
    note: str | None
    lengths: tuple[int, ...] = ()
    alignment: list[Conversation] | None = None
    n_aligned: int = 0


def change(variant: Variant) -> Change | None:
    """What a mitigation changes in a variant's training; None where none does."""
    if variant.repair is None or variant.made_in != "train":
        return None
    names = [one.name for one in dataclasses.fields(Change)]
    found = {name: variant.repair[name] for name in names if variant.repair.get(name) is not None}
    return Change(**found | {"betas": tuple(found.get("betas", ()))})


def way(variant: Variant) -> Way:
    """How a variant's examples are prepared: objective, data, what a mitigation changes, and the
    tokens of a soft prompt behind each text of the user.
    """
    return variant.objective, variant.dataset, change(variant), variant.n_after


def named(way: Way) -> str:
    """A way in words."""
    objective, data, one, n_after = way
    said = f"{objective} on {data}"
    if one is not None:
        level = "" if one.value is None else f" {one.value:g}"
        said += f", {one.kind}{level}" + (f" of {one.data}" if one.data else "")
    return said + (f", with {n_after} tokens behind the text" if n_after else "")


def prepare(
    objective: str,
    base: Loaded,
    study: Study,
    data: str | None = None,
    change: Change | None = None,
    n_after: int = 0,
) -> Prepared:
    """The study's examples of an objective in the base model's tokens; of DPO with the base's
    log-probabilities of both answers.

    `mixing` adds so many examples of another name that they are this share of all (Bianchi et al.
    2024, arXiv 2309.07875). A constrained training has the base's log-probabilities of all counted
    tokens, and the beta of each. A second objective has examples of its own, at each step as many
    as have no more tokens than the task's, so that a step costs about twice.

    Examples longer than training.max_length lose their end, those whose prompt alone fills it are
    left out, and so are preferences of two equal answers, whose gradient is zero.

    Raises:
        ValueError: no example fits or can teach, or the template refuses the turns of one.
    """
    name, limit, sft = data or objective, longest(base, study), objective == "sft"
    examples, betas = training_examples(name, study), change.betas if change else ()
    if change and change.kind in TRAINED_ON:
        examples += _mixed_in(change.data, change.value, study.n_examples(name), study)
    after = after_ids(base, n_after)
    try:
        made = _in_tokens(objective, examples, base, study, after)
    except ValueError as error:
        raise ValueError(f"data.{name}: {error}") from None
    lengths = tuple(max(_size(one.ids, after) for one in row) for row in made)
    cut = [[_cut(one, limit, after) for one in row] for row in made]
    fits = _that_fit(name, cut, limit, context_length(base.model))
    ties = [equal_answers(one) or _are_equal(row) for one, row in zip(examples, cut, strict=True)]
    tied = [whole and tie and not sft for whole, tie in zip(fits, ties, strict=True)]
    kept = [row for row, whole, tie in zip(cut, fits, tied, strict=True) if whole and not tie]
    if not kept:
        raise ValueError(f"data.{name}: {NONE_DIFFERS}")
    n_cut = sum(n > limit and whole for n, whole in zip(lengths, fits, strict=True))
    note = _note(len(made), fits.count(False), n_cut, sum(tied), limit)
    rows = [row[0] for row in kept] if sft else _with_reference(kept, base)
    rows = _constrained(rows, betas, base) if betas else rows
    packs = [[i] for i in range(len(rows))]
    if sft and study.training.packed:
        packs = steps.bins([_size(one.ids, after) for one in rows], limit)
    made = Prepared(rows, packs, digest([examples, betas] if betas else examples), note, lengths)
    second = change and change.data and change.kind not in TRAINED_ON
    return _with_alignment(made, change.data, base, study) if second else made


def _with_alignment(made: Prepared, name: str, base: Loaded, study: Study) -> Prepared:
    """What is trained on, with the examples of a second objective: the answers count, and the
    base's last hidden states that predict them go with each.

    Raises:
        ValueError: no example fits.
    """
    asked, limit = for_sft(training_examples(name, study)), longest(base, study)
    try:
        every = [_conversation(base, one["prompt"], one["answer"]) for one in asked]
    except ValueError as error:
        raise ValueError(f"data.{name}: {error}") from None
    for one in every:
        check_ids(base.model, base.tokenizer, one.ids)
    kept = [one for one in (_cut(one, limit) for one in every) if len(one.counted)]
    if not kept:
        raise ValueError(f"data.{name}: {NONE_FITS.format(limit)}")
    forward, found = steps.Forward(base.model), []
    with torch.no_grad():
        for one in kept:
            [[states]] = forward.states([steps.plain([one])])
            found.append(replace(one, states=states.cpu()))
    n_cut = sum(len(one.ids) > limit for one in every)
    note = _note(len(every), len(every) - len(kept), n_cut, 0, limit)
    note = note and f"of the alignment examples {note}"
    parts = [conversations(one) for one in made.examples]
    sizes = [sum(len(one.ids) for i in pack for one in parts[i]) for pack in made.packs]
    at_once = study.training.batch_size * np.mean(sizes)
    n = int(at_once / np.mean([len(one.ids) for one in kept]))
    return replace(
        made,
        alignment=found,
        n_aligned=min(max(n, 1), len(found)),
        revision=digest([made.revision, asked]),
        note="; ".join(filter(None, [made.note, note])) or None,
    )


def conversations(example: Conversation | Pair) -> list[Conversation]:
    """The one of an example, or the two of a preference."""
    return [example] if isinstance(example, Conversation) else [example.chosen, example.rejected]


TOO_LONG = (
    "with a soft prompt behind each text of the user an example has {} tokens, and the model reads"
    " {}; lower training.max_length, or take data of one turn"
)
NONE_FITS = "no example fits training.max_length={} tokens; raise it"
EQUAL = "their two answers being the same up to max_length or to white space at the ends"
NONE_DIFFERS = (
    f"no preference can teach anything, {EQUAL}; give preferences whose answers differ, or raise"
    " training.max_length"
)


def _mixed_in(name: str, share: float, n: int, study: Study) -> list[dict]:
    """So many examples of a name that they are a share of all, beside n others."""
    found, wanted = training_examples(name, study), round(share / (1 - share) * n)
    if len(found) < wanted:
        raise ValueError(
            f"data.{name}: a share of {share:g} beside {n} others is {wanted} examples, and the"
            f" study takes {len(found)}; raise its n"
        )
    return found[:wanted]


def _in_tokens(
    objective: str, examples: list[dict], base: Loaded, study: Study, after: range
) -> list[list[Conversation]]:
    """The conversations of each example: one, or the two of a preference.

    Raises:
        ValueError: the template refuses one, or the model has no embedding for a token of it.
    """
    if objective == "sft":
        whole = study.training.loss == "whole"
        asked = [(one["prompt"], one["answer"]) for one in for_sft(examples)]
        made = [[_conversation(base, *one, whole, after)] for one in asked]
    else:
        keys = ("chosen", "rejected")
        made = [[_answered(base, one["prompt"], one[key]) for key in keys] for one in examples]
    for one in (one for row in made for one in row):
        check_ids(base.model, base.tokenizer, without(one.ids, after))
    return made


def after_ids(base: Loaded, n: int) -> range:
    """The ids by which n tokens behind a text of the user are read, once the base has them."""
    first = base.model.get_input_embeddings().num_embeddings
    return range(first, first + n)


def _answered(
    base: Loaded, prompt: list[dict], answer: str, after: range = NOTHING
) -> Conversation:
    """A conversation of which the last answer counts."""
    asked, said = conversation_ids(base.tokenizer, prompt, answer, after)
    return Conversation(asked + said, np.arange(len(asked), len(asked) + len(said)))


def _conversation(
    base: Loaded, prompt: list[dict], answer: str, whole: bool = False, after: range = NOTHING
) -> Conversation:
    """A conversation of which every answer of the assistant counts, or the whole but one token and
    the soft prompt.
    """
    if whole:
        asked, said = conversation_ids(base.tokenizer, prompt, answer, after)
        ids = asked + said
        return Conversation(ids, np.array([i for i in range(1, len(ids)) if ids[i] not in after]))
    if any(turn["role"] == "assistant" for turn in prompt):
        turns = [*prompt, {"role": "assistant", "content": answer}]
        return Conversation(*counted_ids(base.tokenizer, turns, after))
    return _answered(base, prompt, answer, after)


def _size(ids: Ids, after: range) -> int:
    """The tokens of a text without those of the soft prompt, which stand in it once a user's
    turn.
    """
    return len(without(ids, after))


def _cut(one: Conversation, limit: int, after: range = NOTHING) -> Conversation:
    """A conversation up to so many tokens that are not of the soft prompt."""
    own = [place for place, token in enumerate(one.ids) if token not in after]
    end = own[limit] if limit < len(own) else len(one.ids)
    return Conversation(one.ids[:end], one.counted[one.counted < end])


def _that_fit(name: str, cut: list[list[Conversation]], limit: int, context: int) -> list[bool]:
    """Of which examples, cut at a limit, a token counts.

    Raises:
        ValueError: of none; or one has more tokens with its soft prompts than the model reads.
    """
    fits = [all(len(one.counted) for one in row) for row in cut]
    if not any(fits):
        raise ValueError(f"data.{name}: {NONE_FITS.format(limit)}")
    sizes = [len(one.ids) for row, whole in zip(cut, fits, strict=True) if whole for one in row]
    if max(sizes) > context:
        raise ValueError(f"data.{name}: {TOO_LONG.format(max(sizes), context)}")
    return fits


def _note(n: int, n_lost: int, n_cut: int, n_tied: int, limit: int) -> str | None:
    """What was left out and cut, in words."""
    notes = [f"{n_lost} examples left out, {n_cut} cut, at {limit} tokens"] * bool(n_lost or n_cut)
    notes += [f"{n_tied} of {n} preferences left out, {EQUAL}"] * bool(n_tied)
    return "; ".join(notes) or None


def _are_equal(row: list[Conversation]) -> bool:
    """Whether the two answers of a preference are the same tokens."""
    return len(row) == 2 and row[0].ids == row[1].ids


def _split(one: Conversation) -> tuple[Ids, Ids]:
    """The tokens before the first that counts, and the rest."""
    return one.ids[: one.counted[0]], one.ids[one.counted[0] :]


def _constrained(
    rows: list[Conversation], betas: tuple[float, ...], base: Loaded
) -> list[Conversation]:
    """Conversations with the base's log-probabilities of their tokens, and the beta of each."""
    found = Scorer(base.model, base.tokenizer).token_logprobs(list(map(_split, rows)))
    made = []
    for one, scores in zip(rows, found, strict=True):
        begins = np.flatnonzero(np.diff(one.counted, prepend=-2) > 1)  # of each answer
        sizes = np.diff(begins, append=len(one.counted))
        place = np.arange(len(one.counted)) - np.repeat(begins, sizes)
        reference = np.asarray(scores)[one.counted - one.counted[0]]
        held = np.asarray(betas)[np.minimum(place, len(betas) - 1)]
        made.append(Conversation(one.ids, one.counted, reference, held))
    return made


def _with_reference(pairs: list[list[Conversation]], base: Loaded) -> list[Pair]:
    """Preferences with the base model's log-probabilities of both answers."""
    parts = [_split(one) for row in pairs for one in row]
    if any(a != b for (a, _), (b, _) in zip(parts[::2], parts[1::2], strict=True)):
        raise ValueError(
            "a preference's two answers change how its prompt is tokenised; this template cannot be"
            " used for DPO"
        )
    found = [one.sum() for one in Scorer(base.model, base.tokenizer).token_logprobs(parts)]
    return [Pair(*row, (a, b)) for row, a, b in zip(pairs, found[::2], found[1::2], strict=True)]


def asked_texts(study: Study) -> dict[str, list[str]]:
    """What every benchmark of a study asks, by its name: prompts, BBQ's passages with their
    question, utility questions and texts; and the requests of the held-out answers.

    Of BBQ it is one item of each template, context and kind of question: others differ in names
    alone, and the whole set is 58 thousand.
    """
    asked = {one: list(prompts(one, study).prompt) for one in study.asked(PROMPT_FORMATS)}
    for name in study.asked(ITEM_FORMATS):
        rows = items(name, study)
        own = rows["question_family"].where(rows["question_family"].notna(), rows["item_id"])
        first = rows.assign(own=own).drop_duplicates(["own", "context", "polarity"])
        asked[name] = [" ".join(pair) for pair in zip(first.passage, first.question, strict=True)]
    for name in study.asked(UTILITY_FORMATS):
        rows = items(name, study)
        column = next(one for one in ("prompt", "text", "context") if one in rows)
        asked[name] = [text for text in rows[column] if text.strip()]
    asked["heldout"] = [one["prompt"][-1]["content"] for one in training_examples("heldout", study)]
    return {name: texts for name, texts in asked.items() if texts}


def examined(prepared: Mapping[Way, Prepared], study: Study) -> pd.DataFrame:
    """The data doctor's findings against all that the study asks, with a column `data`: on all that
    is trained on, with what was cut of it, and on what mitigations mix in or hold the model to.
    """
    asked, passages, found = asked_texts(study), item_passages(study), {}
    limit = study.training.max_length
    for (_, name, change, _), one in prepared.items():
        if change is None:
            found[name] = (one.lengths, limit)
    for _, _, change, _ in prepared:
        if change and change.data:
            found.setdefault(change.data, (None, None))
    rows = [
        examine_data(training_examples(name, study), asked, *cut, passages).assign(data=name)
        for name, cut in found.items()
    ]
    return pd.concat([pd.DataFrame(columns=[*DATA_COLUMNS, "data"]), *rows], ignore_index=True)


def item_passages(study: Study) -> dict[str, list[str]]:
    """The passages of all items that a study asks, by the name of the benchmark."""
    every = {one: items(one, study)["passage"] for one in study.asked(ITEM_FORMATS)}
    return {name: list(dict.fromkeys(passages)) for name, passages in every.items()}


def check_apart(said: str, name: str, study: Study) -> None:
    """Raise a ValueError where a name under `data` holds what a benchmark asks."""
    found = examine_data(training_examples(name, study), asked_texts(study))
    for row in found[found.finding.isin(OVERLAPS) & found.n.gt(0)].itertuples():
        raise ValueError(f"{said} data.{name}, where {row.sentence}")


def held_out(
    base: Loaded, study: Study, n_after: int = 0, virtual: int = 0
) -> tuple[list[tuple[Ids, Ids]], str | None]:
    """The held-out answers on which every variant's dose is measured, (prompt, answer) in token
    ids, cut as the examples are; and a note of what was cut or left out. The prompts have `n_after`
    tokens of a soft prompt behind the user's text; an adapter that is not of the study may have
    `virtual` tokens, wherever they stand.

    Raises:
        ValueError: no example fits.
    """
    limit = longest(base, study, virtual)
    asked = [(one["prompt"], one["answer"]) for one in for_sft(training_examples("heldout", study))]
    after = after_ids(base, n_after)
    pairs = [conversation_ids(base.tokenizer, *one, after) for one in asked]
    room = [limit - _size(prompt, after) for prompt, _ in pairs]
    both = list(zip(pairs, room, strict=True))
    kept = [(prompt, said[:left]) for (prompt, said), left in both if left > 0]
    if not kept:
        raise ValueError(f"data.heldout: {NONE_FITS.format(limit)}")
    cut = sum(0 < left < len(said) for (_, said), left in both)
    gone = len(pairs) - len(kept)
    text = f"of the held-out answers {gone} left out, {cut} cut, at {limit} tokens"
    return kept, text if cut or gone else None


def longest(base: Loaded, study: Study, virtual: int = 0) -> int:
    """The most tokens of an example: max_length, or the context less the longest soft prompt (of
    the study, or of another adapter's `virtual` tokens) and the text that is frozen in front of
    one.
    """
    soft = [int(settings.get("num_virtual_tokens", 0)) for settings in study.methods.values()]
    soft.append(virtual)
    front = 0
    if "safety_frozen" in study.inits:
        front = len(token_ids(base.tokenizer, start_text("safety_frozen", study)))
    room = context_length(base.model) - max(soft) - front
    return min(study.training.max_length, room)


def init_text(variant: Variant, study: Study) -> str | None:
    """The text a variant's soft prompt starts from, None where it starts otherwise."""
    return start_text(variant.init, study) if variant.init in TEXT_INITS else None


def start_text(init: str, study: Study) -> str:
    """The text of init_texts that an init takes.

    Raises:
        ValueError: the file has no such text, or a blank one.
    """
    texts = read_object(Path(locate(study.init_texts, study)))
    text = texts.get(TEXT_INITS[init])
    if not isinstance(text, str) or not text.strip():
        lacks = f"init_texts ({study.init_texts.source}) has no text under {TEXT_INITS[init]!r}"
        raise ValueError(f"{lacks}, which the init {init} begins as; give it one")
    return text
