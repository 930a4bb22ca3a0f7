"""Small random models, and what their own forward gives of one sequence."""

import numpy as np
import torch

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SHAPE = SIZES | {"initializer_range": 0.3}


def random_ids(n: int, seed: int = 0) -> list[int]:
    return list(map(int, np.random.default_rng(seed).integers(5, 180, n)))


@torch.inference_mode()
def own(model, context: list[int], said: list[int]) -> np.ndarray:
    """By the model's own forward of this one sequence."""
    logits = model(input_ids=torch.tensor([context + said]), use_cache=False).logits[0].float()
    places = np.arange(len(context), len(context) + len(said)) - 1
    return logits.log_softmax(1)[places, said].numpy()
