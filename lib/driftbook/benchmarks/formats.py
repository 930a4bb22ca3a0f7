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

FORMATS = {
    one.name: one
    for one in (
        *(HEX_PHI, AILUMINATE, XSTEST, OWN_PROMPTS, STRONGREJECT, SIMPLE_SAFETY_TESTS),
        *(REAL_TOXICITY_PROMPTS, BBQ, BBQ_LITE),
        *(GSM8K, REFERENCE_ANSWERS, SUMMARIES, IFEVAL, GENERAL_TEXT, STEREOSET),
    )
}
