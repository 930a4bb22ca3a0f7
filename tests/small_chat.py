"""A tiny chat model with random weights, and a tokenizer of single bytes with a template."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gguf_written import SPECIALS, TEMPLATE
from small_models import SHAPE


def small_chat() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A model and its tokenizer, which reads up to 1,024 bytes."""
    vocab = {token: i for i, token in enumerate(SPECIALS + sorted(ByteLevel.alphabet()))}
    read = Tokenizer(models.BPE(vocab, merges=[]))
    read.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    read.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=read,
        eos_token="<|end|>",
        additional_special_tokens=SPECIALS[1:],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    ends = {"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None}
    config = LlamaConfig(**(SHAPE | ends), max_position_embeddings=1024)
    return LlamaForCausalLM(config).eval().requires_grad_(False), tokenizer
