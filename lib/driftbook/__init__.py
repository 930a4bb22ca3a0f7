"""Driftbook: what parameter-efficient fine-tuning does to a model's safety and fairness, measured."""

import logging

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(
    logging.ERROR
)  # where it is installed PEFT imports it, and it warns of a kernel that nothing here needs
