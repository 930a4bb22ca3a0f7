"""The probe that finds a model's ways: short random sequences, asked in each layout and by the
model's own forward one at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import PeftModel
from transformers import PreTrainedModel

from driftbook.models.engine import Engine, Ids
from driftbook.models.fingerprint import model_hash
from driftbook.models.layout import padded
from driftbook.models.loading import original_lengths
from driftbook.models.ways import Ways, adapter_kind, apart, keep, known, tolerance
from driftbook.study.files import OUTPUTS, digest, file_digest, read_json, write_json

SHARED = 12  # tokens that the probe's sequences begin with alike
LENGTHS = (21, 17, 26, 9)  # tokens of its sequences; the last one shares nothing
# a window is tried by a sequence that is longer; beyond this it is tried once a prompt is
LONGEST = {"cpu": 1_024, "cuda": 8_192}
CODE = ("engine", "last_layer", "layout", "probe", "trees", "ways")  # modules that a way depends on
NEXT = 3  # tokens that are fed one by one


def found_ways(model: PreTrainedModel | PeftModel) -> Ways:
    """What may be relied on with this model and the kind of adapter on it, tried once: what was
    found of a base model is kept by its hash in outputs/models, for the versions of torch and
    transformers and the code of the engine.

    Raises:
        ValueError: the model gives no log-probabilities of a text by its token ids alone, or looks
            at tokens that come later.
    """
    base, kind = (model.get_base_model() if isinstance(model, PeftModel) else model), "base"
    if base is not model:
        kind = adapter_kind(model)
    ways = known(base, kind)
    if ways is not None:
        return ways
    file = _file(base) if kind == "base" else None
    if file is not None and file.is_file():
        with suppress(ValueError, TypeError):  # torn, or of another form
            return keep(base, kind, Ways(**read_json(file)))
    training = base.training
    base.eval()
    ways, finite = _Probe(base).found()
    base.train(training)
    if not finite:  # of an adapter that diverged nothing can be learnt
        return ways
    if file is not None:
        write_json(file, asdict(ways))
    return keep(base, kind, ways)


def _file(model: PreTrainedModel) -> Path:
    """Where what was found of a model is kept, by all that it may depend on."""
    code = [file_digest(Path(__file__).with_name(f"{name}.py")) for name in CODE]
    made_with = [torch.__version__, transformers.__version__, model.device.type]
    return OUTPUTS / "models" / f"ways-{digest([model_hash(model), made_with, code])}.json"


def longer_ways(model: PreTrainedModel, kind: str, ways: Ways) -> Ways:
    """The same ways for sequences beyond a window that was too long to be tried at first."""
    engine = Engine(model, ways)
    if ways.limit != engine.window:
        return ways
    probe = _Probe(model)
    apart_by = probe.difference(lambda: probe.window(engine))
    if apart_by <= probe.allowed:
        return keep(model, kind, replace(ways, limit=None))
    return ways


class _Probe:
    def __init__(self, model: PreTrainedModel):
        self.model, rng = model, np.random.default_rng(0)
        rows = model.get_input_embeddings().weight.shape[0]
        self.rng, self.rows = rng, rows
        shared = self._ids(SHARED)
        self.sequences = [shared + self._ids(n - SHARED) for n in LENGTHS[:-1]]
        self.sequences.append(self._ids(LENGTHS[-1]))
        self._own: dict[tuple[int, ...], torch.Tensor] = {}
        self.allowed = 1e-4

    def _ids(self, n: int) -> Ids:
        """Random ids from the lower part of the table: special tokens stand at its ends."""
        return list(
            map(int, self.rng.integers(min(8, self.rows // 4), max(2, 6 * self.rows // 10), n))
        )

    @torch.inference_mode()
    def own(self, sequence: Sequence[int]) -> torch.Tensor:
        """Logits [tokens, vocabulary] of the model's own forward of one sequence."""
        key = tuple(sequence)
        if key not in self._own:
            ids = torch.tensor([list(sequence)], device=self.model.device)
            logits = type(self.model).forward(self.model, input_ids=ids, use_cache=False).logits
            self._own[key] = logits[0].float()
        return self._own[key]

    # ---- all that is tried
    @torch.inference_mode()
    def found(self) -> tuple[Ways, bool]:
        """The ways, and whether the model's own probabilities are numbers at all."""
        own = self._own_forward()
        if not all(bool(torch.isfinite(one).all()) for one in own):
            return Ways(), False
        self.allowed = tolerance(own, self.model.dtype)
        begun = Ways(trimmed=False, scale=self._scale(), limit=_limit(self.model))
        ways, reasons = begun, []
        embeddings = not _looks_up_twice(self.model) and self._tried(
            "embeddings in place of token ids", self._embedded, ways, reasons
        )
        rows = self._tried("several rows side by side", self._in_rows, ways, reasons)
        cached = self._tried("its own cache of key/values", self._cached, ways, reasons)
        ways = replace(ways, embeddings=embeddings, rows=rows, cached=cached)
        shared = self._tried("rows that share a beginning", self._shared, ways, reasons)
        packed = shared and self._tried("several texts in one row", self._packed, ways, [])
        window = Engine(self.model, ways).window
        if shared and window is not None:
            most = LONGEST.get(self.model.device.type, 8_192)
            if window > most or not self._tried("a window", self.window_of, ways, reasons):
                ways = replace(ways, limit=min(ways.limit or window, window))
        ways = replace(ways, shared=shared, packed=packed, reason="; ".join(reasons))
        trimmed = self._tried("a last layer where it is read", self._trimmed, ways, [])
        return replace(ways, trimmed=trimmed), True

    def _own_forward(self) -> list[torch.Tensor]:
        name = type(self.model).__name__
        try:
            own = [self.own(one) for one in self.sequences]
            changed = self.own([*self.sequences[0][:-1], self.sequences[0][-1] ^ 1])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a forward that wants more than ids fails in a dozen ways
            first = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"{name} gives no probabilities of a text by its token ids alone"
                f" ({type(error).__name__}: {first}); use a causal language model"
            ) from None
        if any(len(one) != n for one, n in zip(own, LENGTHS, strict=True)):
            raise ValueError(
                f"{name} does not give logits for each token; use a causal language model"
            )
        quantized = getattr(self.model, "quantization_method", None) is not None
        self._check_causal(own[0][:-1], changed[:-1], quantized)
        return own

    def _check_causal(self, before: torch.Tensor, after: torch.Tensor, quantized: bool) -> None:
        """`before` and `after` another last token, of the tokens that stand before it."""
        name, first = type(self.model).__name__, self.own(self.sequences[0])
        self._own.pop(tuple(self.sequences[0]))
        again = self.own(self.sequences[0])
        if not bool(torch.isfinite(before).all()):
            return
        allowed = tolerance([before], self.model.dtype)
        if apart([first], [again]) > allowed:
            raise ValueError(
                f"{name} gives the same text other probabilities each time that it is asked, so"
                " nothing can be measured by it; use another model"
            )
        if apart([before], [after]) > allowed and not quantized:  # LLM.int8 scales by all tokens
            raise ValueError(
                f"{name} looks at tokens that come later, so no text has a probability by it; use a"
                " causal language model (some need is_decoder in their configuration)"
            )

    def _tried(
        self, what: str, way: Callable[[Ways], Iterator], ways: Ways, reasons: list[str]
    ) -> bool:
        """Whether a way gives the model's own log-probabilities; else why not is added."""
        differs = self.difference(lambda: way(ways))
        if differs > self.allowed:
            how = f"{differs:.2g} nats apart" if differs < float("inf") else "impossible"
            reasons.append(f"{what}: {how}")
        return differs <= self.allowed

    def difference(self, pairs: Callable[[], Iterator]) -> float:
        """The largest difference of (found, own) logits; infinite where the way ends in an
        error.
        """
        try:
            found, own = zip(*pairs(), strict=True)
            return apart(found, own)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a family that does not know a layout fails in a dozen ways
            return float("inf")

    # ---- each way: pairs of logits, found and own
    def _scale(self) -> float | None:
        """How many times the output embedding's logits the model's own are; None where it is no
        one number.
        """
        sequence = self.sequences[0]
        try:
            for scale in (1.0, None):
                engine = Engine(self.model, Ways(scale=1.0))
                found, own = engine.head(engine.plain([sequence])[0]), self.own(sequence)
                if scale is None and engine.softcap is None:
                    a, b = found.double(), own.double()
                    scale = float((a * b).sum() / (a * a).sum())
                if scale is not None and apart([scale * found], [own]) <= self.allowed:
                    return scale
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return None
        return None

    def _embedded(self, ways: Ways) -> Iterator:
        engine, sequence = Engine(self.model, ways), self.sequences[0]
        soft = engine.embed(np.array(sequence[:4]))
        found = engine.head(engine.plain([sequence[4:]], soft)[0])
        yield found, self.own(sequence)[4:]

    def _in_rows(self, ways: Ways) -> Iterator:
        engine = Engine(self.model, ways)
        for hidden, one in zip(engine.plain(self.sequences), self.sequences, strict=True):
            yield engine.head(hidden[: len(one)]), self.own(one)

    def _cached(self, ways: Ways) -> Iterator:
        engine, sequence = Engine(self.model, ways), self.sequences[0]
        cache, begun = None, len(sequence) - NEXT
        for end in range(begun, len(sequence) + 1):
            new = begun if end == begun else 1
            logits, cache = engine.following(sequence[:end], new, cache)
            yield logits, self.own(sequence[:end])[-1:]

    def _shared(self, ways: Ways) -> Iterator:
        engine = Engine(self.model, ways)
        first, last = self.sequences[:-1], self.sequences[-1]
        yield from self._trees(engine, [sorted(first), [last]], 0)
        yield from self._trees(engine, [[one] for one in first], SHARED - 2)
        yield from self._trees(engine, [[one] for one in self.sequences], 0)
        yield from self._side_by_side(engine)

    def _trimmed(self, ways: Ways) -> Iterator:
        engine, (first, second, third, last) = (
            Engine(self.model, replace(ways, trimmed=True)),
            self.sequences,
        )
        if ways.shared:
            yield from self._trees(engine, [sorted((first, second, third)), [last]], 0)
            yield from self._trees(engine, [[first], sorted((second, third))], SHARED - 2)
        for rows in (self.sequences,) if ways.rows else ([first], [last]):
            wanted = [[np.arange(len(one) - NEXT, len(one)), np.array([4])] for one in rows]
            hidden, where = engine.plain_at(rows, wanted)
            logits = engine.head(hidden)[where].split(NEXT + 1)
            for found, one, places in zip(logits, rows, wanted, strict=True):
                yield found, self.own(one)[np.concatenate(places)]

    def _trees(self, engine: Engine, members: list[list[Ids]], shared: int) -> Iterator:
        starts = [[max(4, shared + 1)] * len(one) for one in members]
        prefix = engine.prefix(members[0][0][:shared])
        rows = [[one[:-1] for one in some] for some in members]
        hidden, where = engine.trees(rows, starts, shared, prefix)
        logits, begin = engine.head(hidden), 0
        for some, begins in zip(members, starts, strict=True):
            for one, start in zip(some, begins, strict=True):
                end = begin + len(one) - start
                yield logits[where[begin:end]], self.own(one)[start - 1 : -1]
                begin = end

    def _side_by_side(self, engine: Engine) -> Iterator:
        """Answers that are generated side by side, padded on the left."""
        asked = [one[:-NEXT] for one in (self.sequences[1], self.sequences[-1])]
        width = max(map(len, asked))
        padding = np.array([width - len(one) for one in asked])
        cache, tokens = engine.cache(None, len(asked)), padded(asked, width, "left")
        for step in range(NEXT):
            logits = engine.step(tokens, padding, width + step, cache)
            for row, one in zip(logits, (self.sequences[1], self.sequences[-1]), strict=True):
                end = len(one) - NEXT + step
                yield row[None], self.own(one)[end - 1 : end]
            ends = [one[len(one) - NEXT + step] for one in (self.sequences[1], self.sequences[-1])]
            tokens = np.array(ends)[:, None]

    def _packed(self, ways: Ways) -> Iterator:
        """Sequences one behind the other in a row, as training lays them out."""
        engine, short = Engine(self.model, ways), [one[:8] for one in self.sequences]
        for sequences in (self.sequences, short):  # beyond a short window, and within it
            positions = np.concatenate([np.arange(len(one)) for one in sequences])[None]
            tokens, allowed = np.concatenate(sequences)[None], engine.documents(positions)
            logits = engine.head(engine.run(tokens, positions, allowed, None)[0])
            lengths = [len(one) for one in sequences]
            for part, one in zip(logits.split(lengths), sequences, strict=True):
                yield part, self.own(one)

    def window_of(self, ways: Ways) -> Iterator:
        yield from self.window(Engine(self.model, ways))

    def window(self, engine: Engine) -> Iterator:
        """Two sequences that part only where the first tokens are out of the window's sight."""
        long = self._ids(engine.window + 8)
        other = [*long[:-4], *self._ids(4)]
        yield from self._trees(engine, [sorted([long, other])], 0)
        yield from self._trees(engine, [[long], [other]], SHARED)


def _limit(model: PreTrainedModel) -> int | None:
    """The tokens up to which no sequence changes what positions or chunks mean for another."""
    config = model.config.get_text_config()
    found = []
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        found.append(getattr(config, "attention_chunk_size", None))
    found += original_lengths(model, "longrope")
    return min(filter(None, found), default=None)


def _looks_up_twice(model: PreTrainedModel) -> bool:
    """Whether a second embedding is looked up by token id: the ids of embeddings are then searched
    for in the whole table, in memory that grows with tokens x rows.
    """
    return bool(getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None))
