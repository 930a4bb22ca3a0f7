"""The original study's models and its number of prompts."""

from driftbook.rereading import original_study

N = 330


LLAMA, MISTRAL, QWEN, GEMMA = (
    original_study.MODELS[name] for name in ("llama", "mistral", "qwen", "gemma")
)
