"""Every benchmark format, one file each: what is asked, read and planned is looked up here."""

from driftbook.benchmarks.ailuminate import AILUMINATE
from driftbook.benchmarks.bbq import BBQ
from driftbook.benchmarks.bbq_lite import BBQ_LITE
from driftbook.benchmarks.general_text import GENERAL_TEXT
from driftbook.benchmarks.gsm8k import GSM8K
from driftbook.benchmarks.hex_phi import HEX_PHI
from driftbook.benchmarks.ifeval import IFEVAL
from driftbook.benchmarks.own_prompts import OWN_PROMPTS
from driftbook.benchmarks.real_toxicity_prompts import REAL_TOXICITY_PROMPTS
from driftbook.benchmarks.reference_answers import REFERENCE_ANSWERS
from driftbook.benchmarks.simple_safety_tests import SIMPLE_SAFETY_TESTS
from driftbook.benchmarks.stereoset import STEREOSET
from driftbook.benchmarks.strongreject import STRONGREJECT
from driftbook.benchmarks.summaries import SUMMARIES
from driftbook.benchmarks.xstest import XSTEST

FORMATS = {  # a table with written keys: an edit of one format concerns the stages that ask it
    "hex_phi": HEX_PHI,
    "ailuminate": AILUMINATE,
    "xstest": XSTEST,
    "csv": OWN_PROMPTS,
    "strongreject": STRONGREJECT,
    "simple_safety_tests": SIMPLE_SAFETY_TESTS,
    "real_toxicity_prompts": REAL_TOXICITY_PROMPTS,
    "bbq": BBQ,
    "bbq_lite": BBQ_LITE,
    "gsm8k": GSM8K,
    "answers": REFERENCE_ANSWERS,
    "summaries": SUMMARIES,
    "ifeval": IFEVAL,
    "text": GENERAL_TEXT,
    "stereoset": STEREOSET,
}
