"""The sections of a study file that name two sets of prompts, harmful and harmless, to read the
states of a model at them.
"""

from typing import Annotated

from pydantic import Field

from driftbook.study.parts import Count, Part, Rate, Text


class Dro(Part):
    """A safety prompt that is optimised for the base model before any training, where a soft prompt
    begins as `dro` (Directed Representation Optimization; see training/dro.py).

    `harmful` and `harmless` are names under the study's `data`, of which the prompts alone are
    read: the anchors. `dimensions` of the space of their states, `steps` and `learning_rate` are
    the paper's where not given.
    """

    harmful: Text
    harmless: Text
    dimensions: Annotated[Count, Field(le=64)] = 4
    steps: Annotated[Count, Field(le=10_000)] = 160
    learning_rate: Rate = 1e-3
    max_new_tokens: Count = 24  # of the answers that are read for a refusal


class Probes(Part):
    """A look into every run, layer by layer (training/probes.py).

    `harmful` and `harmless` are sets under the study's `data` whose prompts give the refusal
    direction, `n` of each; reports are on prompts of the benchmarks safety and over_refusal, at
    most `reported` of each, which may be none of these. `answer_tokens` of the base model's own
    answers are read by their place.
    """

    harmful: Text
    harmless: Text
    n: Annotated[Count, Field(ge=8)] = 32
    reported: Annotated[Count, Field(ge=4)] = 16
    answer_tokens: Annotated[Count, Field(ge=4, le=64)] = 8

    @property
    def data(self) -> tuple[str, str]:
        """The names of its sets."""
        return (self.harmful, self.harmless)
