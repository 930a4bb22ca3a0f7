"""A model behind an OpenAI-compatible HTTP endpoint (vLLM, llama.cpp, transformers serve, a closed
one), asked by the same benchmarks as weights.

What an endpoint gives: answers in text, and, where the server sends `logprobs`, the probability of
a letter as the answer's first token. What no endpoint gives: the likelihood of a text that somebody
else wrote. `Endpoint.lacks` says what is missing and why, and benchmarks leave it null with that
reason.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from driftbook.models.conversations import chat_ids
from driftbook.models.kept_answers import KeptAnswers, request_digest
from driftbook.models.opening import OpenedModel, changed_since, check_name, opened
from driftbook.models.replies import FILTERED, answer_of, filtered_answer, letter_logprobs, top_of
from driftbook.models.requesting import Connection, Deployed, EndpointError, StatusError
from driftbook.models.sampling import Sampling
from driftbook.models.scoring import Answer
from driftbook.models.templates import Message, lead, place_of
from driftbook.study import progress

Context = list[Message] | str  # a conversation, or a text without template
NO_LOSSES = "an endpoint gives no likelihood of a text that it did not write"
NO_OPTIONS = "an endpoint gives the probability of an answer's first token only"
NO_LETTERS = "the server gives no log-probabilities, so that letters are read in text"


class Endpoint:
    """A deployed model, as far as benchmarks use a Scorer: ask, ask_turns, ask_raw, joined, lead,
    generate, choices and letters. Contexts are conversations, of which the server makes its own
    text by its own template.

    With a tokenizer, contexts are written here by its chat template and sent to /completions as
    text: a template of your own, and answers that are begun, of any server that has /completions.

    It is tried when it is made: see `opening.opened`. Every answer is kept in `kept` at once, and
    none is asked for twice, not in a later run either.
    """

    def __init__(
        self,
        settings: Deployed,
        kept: Path | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        self.settings, self.tokenizer = settings, tokenizer
        self.kept = KeptAnswers(kept)
        self.connection = Connection(settings)
        self.n_letters_bounded = 0
        self._begins: Mapping[str, Any] | None = None  # what makes the server go on with an answer
        try:
            self.server: OpenedModel = opened(self.connection, self.kept)
        except BaseException:
            self.close()
            raise

    @property
    def lead(self) -> str:
        """The white space between prompt and answer where contexts are written here."""
        return lead(self.tokenizer)

    @property
    def name(self) -> str:
        """The model's name at the server."""
        return self.server.model

    @property
    def decoding(self) -> str:
        """What the decoding of answers that are not drawn is called: greedy, or as deployed."""
        given = self.settings.decoding
        if given.get("temperature") == 0:
            return "greedy"
        return f"as deployed ({', '.join(f'{k} {v}' for k, v in given.items()) or 'as it comes'})"

    @property
    def notes(self) -> list[str]:
        """What should be said of this endpoint beside its results, in sentences."""
        found = list(self.server.notes)
        if self.connection.shows_key:
            found.append(f"the key travels unencrypted to {self.connection.url}")
        if self.n_letters_bounded:
            found.append(
                f"{self.n_letters_bounded} letters were not among the {self.server.n_top} likeliest"
                " tokens; the greatest probability that they can have stands for theirs"
            )
        return found

    @property
    def lacks(self) -> dict[str, str]:
        """Why something cannot be had of this endpoint: of losses, options, letters."""
        letters = {} if self.server.n_top else {"letters": NO_LETTERS}
        return {"losses": NO_LOSSES, "options": NO_OPTIONS, **letters}

    def changed(self) -> str | None:
        """A sentence where the server answers otherwise than when it was opened; to be asked when
        the work is done. None where it does not.
        """
        return changed_since(self.connection, self.server)

    def close(self) -> None:
        """Close connections and file."""
        self.connection.close()
        self.kept.close()

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ---- what is asked
    def ask(self, prompts: Sequence[str], system_prompt: str | None = None) -> list[Context]:
        """Conversations of one user prompt each, after the given system prompt, or the endpoint's
        own.

        Raises:
            ValueError: a prompt is empty.
        """
        return self.ask_turns(
            [[{"role": "user", "content": one}] for one in prompts], system_prompt
        )

    def ask_turns(
        self, conversations: Sequence[Sequence[Message]], system_prompt: str | None = None
    ) -> list[Context]:
        """Conversations that end with a user's turn; see `ask`."""
        if any(not turns or not turns[-1]["content"].strip() for turns in conversations):
            raise ValueError("a prompt is empty; remove it from the benchmark, or fill it in")
        given = self.settings.system_prompt if system_prompt is None else system_prompt
        system = [] if given is None else [{"role": "system", "content": given}]
        whole = [[*system, *turns] for turns in conversations]
        return whole if self.tokenizer is None else [self._written(turns) for turns in whole]

    def _written(self, turns: Sequence[Message]) -> str:
        """The text of a conversation by the tokenizer's template, without the token that the server
        puts before every text.
        """
        tokens, begin = chat_ids(self.tokenizer, turns), self.tokenizer.encode("x")[:-1]
        if begin and tokens[: len(begin)] == begin:
            tokens = tokens[len(begin) :]
        shown = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return self.tokenizer.decode(tokens, **shown)

    def ask_raw(self, prompts: Sequence[str]) -> list[Context]:
        """Texts that are continued without any template, by /completions."""
        return list(prompts)

    def joined(
        self, context: Context, texts: Sequence[str], stem: str = ""
    ) -> tuple[Context, list[str]]:
        """The context with the answer begun by the stem, and the texts.

        Raises:
            EndpointError: the server does not go on with an answer that is begun.
        """
        if not stem:
            return context, list(texts)
        if isinstance(context, str):
            return context + stem, list(texts)
        self._find_beginning()
        return [*context, {"role": "assistant", "content": stem}], list(texts)

    # ---- answers
    def generate(
        self, contexts: Sequence[Context], max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[Answer]:
        """The answer to each context by the settings' decoding, or drawn; n_tokens are words where
        the server does not count tokens.

        A drawn answer's seed follows from the context, the sampling's seed and sample number; only
        a server that minds the seed gives the same one again.

        Raises:
            EndpointError: the server gives no answer; what it answered before is kept.
        """
        requests = [self._request(one, max_new_tokens, sampling) for one in contexts]
        found = self._answered(requests, answer_of, "written")
        return [Answer(**one) for one in found]

    def letters(self, contexts: Sequence[Context], letters: Sequence[str] = "ABC") -> np.ndarray:
        """Log-probabilities [n, k] of single characters as the answer's first token, NaN where the
        server lists no token (it answers nothing): see `replies.letter_logprobs`.

        Raises:
            ValueError: the server gives no log-probabilities, or not of what is asked for.
        """
        letters = [letter.strip() for letter in letters]
        if any(len(letter) != 1 for letter in letters):
            raise ValueError(f"{NO_OPTIONS}; ask for letters in place of whole options")
        if not self.server.n_top:
            raise ValueError(f"{NO_LETTERS}; ask for answers in text")
        # of the model's own distribution, whatever decoding it is deployed with
        more = {"logprobs": True, "top_logprobs": self.server.n_top, "temperature": 0}
        requests = [self._request(one, 1, None, more) for one in contexts]
        tops = self._answered(requests, lambda reply: {"top": top_of(reply)}, "read")
        rows = [letter_logprobs(one.get("top", []), letters) for one in tops]
        self.n_letters_bounded += sum(missing for _, missing in rows)
        return np.array([row for row, _ in rows]).reshape(len(rows), len(letters))

    def choices(
        self,
        contexts: Sequence[Context],
        options: Sequence[Sequence[str]],
        stem: str | Sequence[str] = "",
    ) -> np.ndarray:
        """`letters` of options that are the same single characters for every context, after each
        stem.

        Raises:
            ValueError: other options; or see `letters`.
        """
        if not contexts:
            return np.empty((0, 0))
        if any(list(row) != list(options[0]) for row in options):
            raise ValueError(f"{NO_OPTIONS}; ask for letters in place of whole options")
        stems = [stem] * len(contexts) if isinstance(stem, str) else stem
        begun = [self.joined(one, [""], more)[0] for one, more in zip(contexts, stems, strict=True)]
        return self.letters(begun, options[0])

    # ---- requests
    def _request(
        self,
        context: Context,
        max_new_tokens: int,
        sampling: Sampling | None,
        more: Mapping[str, Any] | None = None,
    ) -> tuple[str, dict]:
        """Path and body of a request."""
        body: dict[str, Any] = {"model": self.name, **self.settings.extra_body}
        body |= self.settings.decoding if sampling is None else _drawing(sampling, context)
        body |= {self.server.limit: max_new_tokens, **(more or {})}
        if isinstance(context, str):
            return "/completions", self._as_text(body) | {"prompt": context}
        if context[-1]["role"] == "assistant":
            body |= self._begins or {}
        return "/chat/completions", body | {"messages": context}

    def _as_text(self, body: dict) -> dict:
        """The fields of a request to /completions, which has no template, and other names."""
        kept = {name: value for name, value in body.items() if not name.startswith("chat_template")}
        kept["max_tokens"] = kept.pop(self.server.limit)
        if kept.get("logprobs") is True:
            kept["logprobs"] = kept.pop("top_logprobs")
        end = None if self.tokenizer is None else place_of(self.tokenizer).end
        if end is not None and end != self.tokenizer.eos_token_id:
            kept["stop"] = [self.tokenizer.decode([end])]
        return kept

    def _answered(
        self, requests: Sequence[tuple[str, dict]], read: Callable[[dict], dict], what: str
    ) -> list[dict]:
        """The answers to requests, each sent once and kept when it comes; those that are kept
        already are not sent.
        """
        keys = [request_digest(self.connection.url, *one) for one in requests]
        new = {key: one for key, one in zip(keys, requests, strict=True) if not self.kept.get(key)}

        def work(key: str) -> None:
            self.kept.keep(key, self.sent(*new[key], read))
            progress.advance(what, 1)

        self.connection.at_once(work, list(new))
        return [self.kept.get(key) or {} for key in keys]

    def sent(self, path: str, body: dict, read: Callable[[dict], dict]) -> dict:
        """What is read of the reply to one request, by the right model; a prompt that a provider's
        filter does not let through is an answer too.
        """

        def checked(reply: dict) -> dict:
            check_name(self.connection, self.name, reply.get("model"))
            return read(reply)

        try:
            return self.connection.post(path, body, checked)
        except StatusError as error:
            if error.code in FILTERED:
                return filtered_answer()
            if error.status == 404 and path == "/completions":
                raise EndpointError(
                    f"{self.connection.url} has no /completions, so that nothing can be asked"
                    " without a chat template; leave that out"
                ) from None
            raise

    # ---- answers that are begun
    def _find_beginning(self) -> None:
        """Find out what makes the server go on with an answer that is begun: nothing more, or the
        fields of vLLM. A greedy answer's first half must be followed by its second.
        """
        if self._begins is not None:
            return
        for begins in ({}, {"add_generation_prompt": False, "continue_final_message": True}):
            self._begins, found = begins, False
            try:
                found = self._goes_on()
            finally:
                self._begins = begins if found else None
            if found:
                return
        raise EndpointError(
            f"{self.connection.url} does not go on with an answer that is begun, but begins another"
            " one; leave out what begins answers (a stem, or a short prefill)"
        )

    def _goes_on(self) -> bool:
        greedy = {"temperature": 0}
        for prompt in self.server.probes:
            context: list[Message] = [{"role": "user", "content": prompt}]
            path, body = self._request(context, 24, None)
            words = self.sent(path, body | greedy, answer_of)["text"].split(" ")
            first, rest = " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])
            if len(words) < 4 or rest in first:
                continue
            path, body = self._request(
                [*context, {"role": "assistant", "content": first}], 24, None
            )
            try:
                said = self.connection.post(path, body | greedy, answer_of, attempts=1)["text"]
            except EndpointError:
                return False
            return bool(said) and (said.startswith(rest) or rest.startswith(said))
        return False


def _drawing(sampling: Sampling, context: Context) -> dict[str, Any]:
    seed = zlib.crc32(repr((sampling.seed, sampling.sample, context)).encode()) & 0x7FFFFFFF
    return {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": seed}
