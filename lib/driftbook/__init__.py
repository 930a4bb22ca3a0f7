"""Driftbook measures what parameter-efficient fine-tuning does to safety and fairness."""

import logging
import warnings

# Where bitsandbytes is installed PEFT imports it, and it warns of a kernel that nothing here needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# Noise in every notebook: a progress bar that needs a widget, and PEFT's call of an old name.
warnings.filterwarnings("ignore", message="IProgress not found")
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
