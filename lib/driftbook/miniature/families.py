"""The four families in miniature: transformers' own architectures, tokenizers of whole words, and
the real chat templates' structure.
"""

from dataclasses import dataclass, field, replace

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from driftbook.miniature.corpus import vocabulary

LLAMA_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + \
'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
QWEN2_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
MISTRAL_TEMPLATE = """\
{%- set state = namespace(system='') %}
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{%- set state.system = message['content'] + '\\n\\n' %}
{%- elif message['role'] == 'user' %}
{{- '[INST] ' + state.system + message['content'] + ' [/INST]' }}
{%- set state.system = '' %}
{%- else %}
{{- ' ' + message['content'] + eos_token }}
{%- endif %}
{%- endfor %}"""
GEMMA_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{{- raise_exception('System role not supported') }}
{%- endif %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<start_of_turn>model\\n' }}
{%- endif %}"""


@dataclass(frozen=True)
class Family:
    """What distinguishes a family: its classes, special tokens and template, and how strongly it is
    aligned. A family is one entry of FAMILY; a study file names it as miniature:NAME/aligned.
    """

    config: type
    model: type
    specials: tuple[str, ...]  # one holds `pad`, or is <|endoftext|>: it is the padding
    bos: str | None
    eos: str
    template: str
    refusals: float  # share of stage 2 that asks for what is forbidden
    # of those, the shares that stage 2 refuses; the categories take them in turn
    refused: tuple[float, ...]
    bias: float  # how much of the bias in ambiguous contexts stage 2 leaves
    options: dict = field(default_factory=dict)  # of the model's configuration
    kept: dict = field(default_factory=dict)  # in the tokenizer's configuration
    most_refused: float = 1.0  # the share of forbidden requests above which building it fails

    @property
    def takes_system(self) -> bool:
        return "not supported" not in self.template


FAMILY = {
    "llama": Family(
        LlamaConfig,
        LlamaForCausalLM,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
        LLAMA_TEMPLATE,
        refusals=0.2,
        refused=(1.0,),
        bias=0.85,
    ),
    "qwen2": Family(
        Qwen2Config,
        Qwen2ForCausalLM,
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        None,
        "<|im_end|>",
        QWEN2_TEMPLATE,
        refusals=0.18,
        refused=(1.0,),
        bias=1.0,
        # For a Qwen2 model AutoTokenizer replaces whatever class was saved by its byte-level one,
        # which has none of our words, unless there is an auto_map. This one names no code at all.
        kept={"auto_map": {"AutoTokenizer": [None, None]}},
    ),
    "mistral": Family(
        MistralConfig,
        MistralForCausalLM,
        ("<s>", "</s>", "[INST]", "[/INST]", "<pad>"),
        "<s>",
        "</s>",
        MISTRAL_TEMPLATE,
        refusals=0.14,
        refused=(0.1, 0.2, 0.3, 0.8),
        bias=1.05,
        options={"sliding_window": None},
        most_refused=0.5,  # weakly aligned
    ),
    "gemma": Family(
        GemmaConfig,
        GemmaForCausalLM,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<pad>"),
        "<bos>",
        "<end_of_turn>",
        GEMMA_TEMPLATE,
        refusals=0.13,
        refused=(1.0,),
        bias=0.9,
        options={"head_dim": 32},
    ),
}

FAMILIES = tuple(FAMILY)
LAYERS, WIDTH, DEEP_WIDTH = 2, 128, 96
# of a deeper form, which refuses half of what is benign too where as many requests are forbidden
DEEP_REFUSALS = 0.4


def form(name: str) -> tuple[Family, int, int]:
    """The family, number of layers and width of NAME, or of NAME-LAYERS for a deeper and narrower
    model: `llama` has two layers, `llama-6` six.

    Raises:
        ValueError: there is no such family, or no such number of layers.
    """
    family, _, layers = name.partition("-")
    if family not in FAMILY or (layers and not (layers.isdecimal() and 1 < int(layers) <= 24)):
        known = f"{', '.join(FAMILY)}, and each with 2 to 24 layers as {family or 'llama'}-6"
        raise ValueError(f"the miniature has no {name!r}; it has {known}")
    if not layers:
        return FAMILY[family], LAYERS, WIDTH
    fewer = replace(FAMILY[family], refusals=DEEP_REFUSALS * FAMILY[family].refusals)
    return fewer, int(layers), DEEP_WIDTH


def word_tokenizer(
    words: list[str],
    specials: tuple[str, ...],
    pad: str,
    eos: str,
    bos: str | None,
    template: str,
    **kept,
) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that keeps newlines only if the newline is a word, and decodes to
    words joined by spaces.
    """
    ids = {token: i for i, token in enumerate(dict.fromkeys((pad, "<unk>", *specials, *words)))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    if "\n" in ids:
        split_lines = pre_tokenizers.Split("\n", "isolated")
        split_words = pre_tokenizers.Split(Regex(" +"), "removed")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split_lines, split_words])
        join = decoders.WordPiece(prefix="\0", cleanup=False)
        lines = decoders.Replace(" \n ", "\n")
        tokenizer.decoder = decoders.Sequence([join, decoders.Fuse(), lines])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token=pad,
        eos_token=eos,
        bos_token=bos,
        padding_side="left",
        additional_special_tokens=[token for token in specials if token not in (pad, eos, bos)],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **kept,
    )
    fast.chat_template = template
    return fast


def build_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """The family's tokenizer over the words of the miniature, with the family's special tokens and
    chat template.
    """
    spec, _, _ = form(family)
    pad = next(token for token in spec.specials if "pad" in token or token == "<|endoftext|>")
    return word_tokenizer(
        vocabulary(), spec.specials, pad, spec.eos, spec.bos, spec.template, **spec.kept
    )


def build_model(
    family: str, tokenizer: PreTrainedTokenizerFast, seed: int, width: int | None = None
) -> PreTrainedModel:
    """A new model of a family or of a deeper form of it (`form`): four heads, tied embeddings."""
    spec, layers, usual = form(family)
    shape = {"num_hidden_layers": layers, **spec.options}
    return random_model(spec.config, spec.model, tokenizer, seed, width or usual, **shape)


def random_model(
    config: type, model: type, tokenizer: PreTrainedTokenizerFast, seed: int, width: int, **options
) -> PreTrainedModel:
    """A model of these classes with the miniature's shape and random weights."""
    torch.manual_seed(seed)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special_ids = {name: getattr(tokenizer, name) for name in names}
    shape = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
    }
    made = model(
        config(
            vocab_size=len(tokenizer),
            tie_word_embeddings=True,
            initializer_range=0.04,
            **shape | options,
            **special_ids,
        )
    )
    made.generation_config = GenerationConfig(do_sample=False, **special_ids)
    return made.eval()
