"""Small random-weight models of the real families, with byte-level tokenizers trained on a study's
own data: for trying real input.

Their answers mean nothing; every loader, template, parser and table meets real text, long prompts,
many turns and unicode.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from driftbook.benchmarks.data import training_examples
from driftbook.miniature.families import FAMILY
from driftbook.miniature.judge import TEMPLATE as JUDGE_TEMPLATE
from driftbook.study.files import replacing_folder
from driftbook.study.sources import made_folder
from driftbook.study.study_file import Study

N_TOKENS = 2_000
CONTEXT = 4_096
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def build(name: str, study: Study) -> Path:
    """Make the random model of a family, or `judge` (a Llama with Llama Guard 2's template), and
    return its folder.
    """
    path = made_folder(study, "random") / name
    spec = FAMILY["llama" if name == "judge" else name]
    made = tokenizer(_texts(study), spec, JUDGE_TEMPLATE if name == "judge" else spec.template)
    with replacing_folder(path) as folder:
        _model(spec, made, study.seed).save_pretrained(folder)
        made.save_pretrained(folder)
    return path


def _texts(study: Study) -> Iterable[str]:
    for name in study.data:
        for example in training_examples(name, study):
            yield from (turn["content"] for turn in example["prompt"])
            yield from (text for key, text in example.items() if key != "prompt")


def tokenizer(
    texts: Iterable[str], spec, template: str, n_tokens: int = N_TOKENS
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of at most n_tokens trained on texts, with a family's special tokens
    and a chat template.
    """
    pad = next(token for token in spec.specials if "pad" in token or token == "<|endoftext|>")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens,
        special_tokens=list(spec.specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=pad, eos_token=spec.eos, bos_token=spec.bos
    )
    fast.chat_template = template
    return fast


def _model(spec, tokenizer: PreTrainedTokenizerFast, seed: int):
    import torch

    torch.manual_seed(seed)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shape = SHAPE | {key: value for key, value in spec.options.items() if key != "head_dim"}
    if "head_dim" in spec.options:
        shape["head_dim"] = SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
    return spec.model(
        spec.config(vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, **shape, **ids)
    )
