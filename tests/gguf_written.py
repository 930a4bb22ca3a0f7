"""A tiny Llama with random weights, and the GGUF file of it as llama.cpp's converter writes one."""

from collections.abc import Callable
from pathlib import Path

import gguf
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

SPECIALS = ["<|end|>", "<|start|>", "<|stop|>"]
MERGES = ["t h", "th e", "Ġ the", "1 2", "o u"]
TOKENS = SPECIALS + sorted(ByteLevel.alphabet()) + [one.replace(" ", "") for one in MERGES]
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
N_HEADS, N_KV_HEADS, LAYERS, WIDTH = 4, 2, 2, 64


def tiny_llama() -> LlamaForCausalLM:
    """The model that the files hold; weights so large that attention matters."""
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": N_HEADS, "num_key_value_heads": N_KV_HEADS}
    rope = {"rope_theta": 5000.0, "rope_type": "default"}
    more = {"rms_norm_eps": 1e-4, "max_position_embeddings": 128, "tie_word_embeddings": True}
    config = LlamaConfig(vocab_size=len(TOKENS), rope_parameters=rope, **shape, **heads, **more)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(8) if value.ndim == 2 else value.add_(0.2 * torch.randn_like(value))
    return model.eval().requires_grad_(False)


def write(
    path: Path,
    model: LlamaForCausalLM | None = None,
    stored: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    arch: str = "llama",
    pre: str = "gpt-2",
) -> Path:
    """Write the model's GGUF file; `change` adds to it, matrices are `stored` in this form."""
    writer = gguf.GGUFWriter(path, arch)
    _settings(writer, pre)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, value in (model or tiny_llama()).state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        heads = N_HEADS if "q_proj" in name else N_KV_HEADS if "k_proj" in name else None
        rows = (_permuted(value, heads) if heads else value).numpy()
        form = stored if rows.ndim == 2 else gguf.GGMLQuantizationType.F32
        target = names.get_name(name.removesuffix(".weight")) + ".weight"
        writer.add_tensor(target, gguf.quantize(rows, form), raw_dtype=form)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in the order of llama.cpp's rotary positions: pairs beside each other."""
    split = weight.reshape(heads, 2, len(weight) // heads // 2, -1)
    return split.swapaxes(1, 2).reshape(weight.shape).contiguous()


def _settings(writer: gguf.GGUFWriter, pre: str) -> None:
    writer.add_type("model")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(96)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-4)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(WIDTH // N_HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(TOKENS) - len(SPECIALS)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_uint32("tokenizer.ggml.eot_token_id", 2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
