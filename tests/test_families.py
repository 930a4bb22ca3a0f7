"""Every causal family of the installed transformers, as a small random model: what is scored,
generated and trained on is the model's own, or the model is refused in a sentence.
"""

import warnings
from contextlib import suppress

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES
from transformers.pytorch_utils import Conv1D

from conftest import one_sentence
from driftbook.models.scoring import Scorer
from driftbook.training import steps
from small_models import SIZES

pytestmark = pytest.mark.slow

N_NEW, TOLERANCE = 4, 1e-4
LARGEST = 1e7  # parameters: a family that cannot be made as small is left out
END = 299
WEIGHTS = (torch.nn.Linear, Conv1D)
TARGETS = set(
    "q_proj k_proj v_proj o_proj query_key_value qkv_proj c_attn Wqkv in_proj q_b_proj kv_b_proj"
    " fc1 fc2 gate_proj up_proj down_proj dense_h_to_4h w1 w2 key value query receptance".split()
)  # what people train; a router, a head and some projections of recurrences PEFT refuses
SHAPE = SIZES | {"max_position_embeddings": 512, "sliding_window": 16}
SMALLER = {  # where a family has such a setting
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "linear_num_heads": 2,
    "linear_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "mamba_d_ssm": 128,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "chunk_size": 8,
    "rotary_dim": 8,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "word_embed_proj_dim": 64,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
}
OF_FAMILY = {  # what makes a family what it is, in so few layers
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "granite": {"logits_scaling": 8.0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "llama4_text": {"attention_chunk_size": 16},
    "gemma3n_text": {
        "vocab_size_per_layer_input": 300,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 0,
        "laurel_rank": 8,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": 300,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 0,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
}


def settings_of(name: str) -> list[dict]:
    """Settings to try, the fewest last: not every family takes all that it has."""
    usual = AutoConfig.for_model(name)
    known = {key: value for key, value in SHAPE.items() if holds(usual, key)}
    known |= {key: n for key, n in SMALLER.items() if holds(usual, key)}
    kinds = dict.fromkeys(usual.layer_types) if holds(usual, "layer_types") else ()
    if name in OF_FAMILY or holds(usual, "no_rope_layers"):
        known["num_hidden_layers"] = 4  # that some of them may differ
    elif len(kinds) > 1:
        known |= {"num_hidden_layers": len(kinds), "layer_types": list(kinds)}
    equal = known | {"num_key_value_heads": SHAPE["num_attention_heads"]}
    bare = {key: value for key, value in known.items() if key != "head_dim"}
    least = {key: value for key, value in bare.items() if key in SHAPE}
    return [one | OF_FAMILY.get(name, {}) for one in (known, equal, bare, least)]


def holds(config: transformers.PreTrainedConfig, key: str) -> bool:
    try:
        return getattr(config, key) is not None
    except Exception:  # what differs from layer to layer cannot be asked for
        return False


def made(name: str) -> transformers.PreTrainedModel:
    """A small random model of a family, far from a symmetric init."""
    every = []
    with suppress(Exception):  # some have no settings of their own
        every = settings_of(name)
    for settings in every:
        with suppress(Exception):  # a family says in its own way that it does not take a setting
            config = AutoConfig.for_model(name, **settings)
            with torch.device("meta"):
                size = AutoModelForCausalLM.from_config(config).num_parameters()
            if size > LARGEST:
                continue
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
            own_logits(model, [5, 6, 7])
            break
    else:
        pytest.skip(f"no small {name} can be made of general settings")
    for value in model.parameters():
        if value.dim() > 1:
            torch.nn.init.normal_(value, 0, 0.3)
    model.generation_config.eos_token_id = END
    return model


@torch.inference_mode()
def own_logits(model, ids: list[int]) -> torch.Tensor:
    """What the model's own forward gives of one sequence: nothing of the library."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def own_logprobs(model, ids: list[int], places) -> torch.Tensor:
    return own_logits(model, ids).log_softmax(1)[np.asarray(places) - 1, np.asarray(ids)[places]]


class Numbers:
    """A tokenizer for which a text is its ids."""

    eos_token_id = END

    def decode(self, ids, **_) -> str:
        return " ".join(map(str, ids))


def random_ids(rng: np.random.Generator, n: int) -> list[int]:
    return list(map(int, rng.integers(5, 180, n)))


def own_answer(model, context: list[int]) -> str:
    sequence = list(context)
    while len(sequence) < len(context) + N_NEW:
        token = int(own_logits(model, sequence)[-1].argmax())
        if token == END:
            break
        sequence.append(token)
    return Numbers().decode(sequence[len(context) :])


def options(rng: np.random.Generator) -> list[tuple[list[int], list[int]]]:
    """Options of contexts that begin alike, some longer than a window, and one that does not."""
    begin = random_ids(rng, 14)
    contexts = [begin + random_ids(rng, n) for n in (0, 5, 9)] + [random_ids(rng, 7)]
    return [(context, random_ids(rng, n)) for context in contexts for n in (1, 3)]


def check_training(model, rng: np.random.Generator) -> None:
    """Packed conversations, and a preference, with an adapter on the model."""
    linear = {n.rpartition(".")[2] for n, one in model.named_modules() if isinstance(one, WEIGHTS)}
    targets = sorted(linear & TARGETS) or "all-linear"
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(1)
    try:
        adapted = get_peft_model(model, config).eval()
    except NoMatchingPeftModuleError:  # PEFT finds nothing in it to adapt
        return
    begin = random_ids(rng, 9)
    conversations = [
        steps.Conversation(begin + random_ids(rng, n), np.arange(9, 9 + n)) for n in (4, 7, 5)
    ]
    forward = steps.Forward(adapted)
    pair = steps.Pair(*conversations[:2], (0.0, 0.0))
    rows = [steps.plain(conversations)] if forward.engine.ways.packed else []
    rows = rows or [steps.plain([one]) for one in conversations]
    said = [one for row in forward.logprobs(rows) for one in row]
    said += forward.logprobs([steps.pair_row(pair)])[0]
    for found, one in zip(said, [*conversations, *conversations[:2]], strict=True):
        own = own_logprobs(model, one.ids, one.counted)
        torch.testing.assert_close(found.detach(), own, atol=TOLERANCE, rtol=1e-4)
    sum(part.sum() for part in said).backward()
    moved = [one.grad for name, one in adapted.named_parameters() if "lora_" in name]
    assert any(one is not None and bool(one.abs().sum() > 0) for one in moved)


def scorer_or_refusal(model) -> Scorer | str:
    try:
        return Scorer(model, Numbers())
    except ValueError as error:
        return one_sentence(error)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_family_is_its_own_or_refused(name):
    model, rng = made(name), np.random.default_rng(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scorer = scorer_or_refusal(model)
        if isinstance(scorer, str):
            assert type(model).__name__ in scorer
            return
        pairs = options(rng)
        for found, (context, said) in zip(scorer.token_logprobs(pairs), pairs, strict=True):
            places = range(len(context), len(context) + len(said))
            own = own_logprobs(model, context + said, list(places))
            np.testing.assert_allclose(found, own, atol=TOLERANCE, rtol=1e-4)
        contexts = [context for context, _ in pairs[::2]]
        answers = [one.text for one in scorer.generate(contexts, N_NEW)]
        assert answers == [own_answer(model, context) for context in contexts]
        check_training(model, rng)
