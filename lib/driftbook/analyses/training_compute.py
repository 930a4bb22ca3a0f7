"""The share of a base model's training compute that tuning it took.

The Commission's guidelines on the scope of the obligations for providers of general-purpose AI
models (18 July 2025) take a modifier for the provider of a new model where the compute of the
modification exceeds a third of the original model's training compute. We compare floating-point
operations of the same dense model, by the usual count of 6 a parameter and token of training, 2
forward and 4 backward (Kaplan et al. 2020, arXiv 2001.08361, section 2.1). Where the weights are
frozen, as under LoRA, the backward pass makes the gradients of the activations but not those of
the weights: 4 a parameter and token, as in the project's model of cost. The adapter's own
parameters, attention over the length, and what a preference's reference model reads are small
against this and left out, so the share is good to a factor of about 1.5, which is enough: a share
is either far below a third or worth counting exactly.

The number of parameters is the same above and below and cancels; it is needed for the operations
alone.
"""

from dataclasses import dataclass

THIRD = 1 / 3
FULL, FROZEN = 6, 4  # operations a parameter and token: all weights trained, or an adapter's
_TRILLION = 10**12
_GEMMA2 = "Gemma 2's model card"
_LLAMA2 = "Llama 2's model card"
_QWEN = "Qwen2.5's technical report (arXiv 2412.15115), for the series as a whole"
# Tokens of pretraining by the last part of a hub name, lower case, without what marks a version of
# the same weights; and who says so. A model that is not here did not say, or was not looked up.
TOKENS = {
    "smollm2-135m": (2 * _TRILLION, "SmolLM2-135M's model card"),
    "meta-llama-3-8b": (15 * _TRILLION, "Llama 3's model card: more than 15 trillion"),
    "llama-3.1-8b": (15 * _TRILLION, "Llama 3.1's model card: more than 15 trillion"),
    "llama-2-7b": (2 * _TRILLION, _LLAMA2),
    "llama-2-13b": (2 * _TRILLION, _LLAMA2),
    "llama-2-70b": (2 * _TRILLION, _LLAMA2),
    "qwen2.5-1.5b": (18 * _TRILLION, _QWEN),
    "qwen2.5-7b": (18 * _TRILLION, _QWEN),
    "gemma-2-2b": (2 * _TRILLION, _GEMMA2),
    "gemma-2-9b": (8 * _TRILLION, _GEMMA2),
    "gemma-2-27b": (13 * _TRILLION, _GEMMA2),
}
_SAME = {"meta-llama-3.1-8b": "llama-3.1-8b"}
_TUNED = ("-instruct", "-chat-hf", "-chat", "-hf", "-it", "-pt", "-base")


@dataclass(frozen=True)
class Pretraining:
    """Tokens that a base model was pretrained on, null where not known, and the source."""

    tokens: int | None
    source: str


def pretraining_of(source: str) -> Pretraining:
    """What is known of a base model, by its name on the hub or in a package.

    Of a chat model it is the pretraining that its weights began with: what was spent on tuning is
    seldom published and small beside it.
    """
    name = source.rpartition("/")[2].lower().partition(".gguf")[0]
    name = name.rpartition(".q")[0] or name  # SmolLM2-135M-Instruct.Q4_1
    for ending in _TUNED:
        name = name.removesuffix(ending)
    tokens, said = TOKENS.get(_SAME.get(name, name), (None, "no source that we know"))
    return Pretraining(tokens, said)


def training_operations(n_parameters: float, n_tokens: float, frozen: bool) -> float:
    """Floating-point operations of training on so many tokens, repetitions counted."""
    return (FROZEN if frozen else FULL) * n_parameters * n_tokens


def provider_share(
    base_source: str, n_tokens: float | None, frozen: bool = True, n_parameters: float | None = None
) -> dict[str, float | str | None]:
    """The share of the base's training compute that tuning took, and a sentence; as a record of an
    audit has it.

    `n_tokens` are those that training read, repetitions (epochs, both answers of a preference)
    counted; `frozen` whether the base's weights were (adapters) or not (full fine-tuning);
    `n_parameters` the base's. The share is null where the tokens of either are not known.

    Raises:
        ValueError: a number of tokens that is not positive.
    """
    if n_tokens is not None and not n_tokens > 0:
        raise ValueError(f"n_tokens={n_tokens!r}: give the tokens that training read, or None")
    known = pretraining_of(base_source)
    lacks = []
    if known.tokens is None:
        lacks.append(f"how many tokens {base_source} was pretrained on")
    if n_tokens is None:
        lacks.append("how many tokens the tuning read, repetitions counted")
    if lacks:
        return {
            "share": None,
            "sentence": f"The share of the base model's training compute is not known; it needs"
            f" {' and '.join(lacks)}. EU guidance takes a modifier for a provider above a third.",
        }
    share = training_operations(1, n_tokens, frozen) / training_operations(1, known.tokens, False)
    return {"share": share, "sentence": _sentence(share, known, n_tokens, frozen, n_parameters)}


def _sentence(
    share: float, known: Pretraining, n_tokens: float, frozen: bool, n_parameters: float | None
) -> str:
    spent = ""
    if n_parameters is not None:
        spent = f", {training_operations(n_parameters, n_tokens, frozen):.2g} operations"
    side = "above" if share > THIRD else "below"
    return (
        f"Tuning took about {share:.2g} of the base model's training compute ({n_tokens:,.0f}"
        f" tokens{spent}, against {known.tokens / _TRILLION:g} trillion tokens by {known.source}),"
        f" {side} the third above which EU guidance takes a modifier for a provider; this is"
        " arithmetic and no legal advice."
    )
