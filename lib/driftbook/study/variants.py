"""A variant: base model, method, settings and seed, with the run_id made from them."""

import json
import re
from functools import cached_property
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from driftbook.study.files import digest
from driftbook.study.methods import MADE_IN, METHOD_CLASS, METHODS, MITIGATION_KINDS, SUFFIX


@dataclass(frozen=True)
class Variant:
    """A base model x method x settings x repetition; method `none` is the base model itself. One
    row of `variants`.
    """

    base_model: str
    family: str
    method: Literal[METHODS]
    objective: Literal["none", "sft", "dpo", "untrained"]
    dataset: str | None
    n_train: int | None
    learning_rate: float | None
    epochs: int | None
    seed: int | None
    repetition: int
    init: str | None
    settings: str  # JSON: all that shapes the weights and is not in the columns
    mitigation: str | None = None
    parent_run_id: str | None = None
    template: str = "chat"
    system_prompt: str | None = None

    @cached_property
    def repair(self) -> dict[str, Any] | None:
        """What its mitigation is: name, kind, value, control and the settings of its kind; None
        where there is none.
        """
        return json.loads(self.settings).get("mitigation")

    @cached_property
    def parts(self) -> dict[str, float]:
        """The runs whose distributions it multiplies, each with its weight; empty for all else."""
        return (self.repair or {}).get("parts", {})

    @cached_property
    def layers(self) -> str | None:
        """The third of the layers that alone is adapted (methods.LAYER_PARTS); None for all."""
        return json.loads(self.settings).get("layers")

    @cached_property
    def n_after(self) -> int:
        """The tokens of its soft prompt that are put behind each text of the user."""
        settings = json.loads(self.settings)
        return settings["peft"]["num_virtual_tokens"] if self.method == SUFFIX else 0

    @property
    def made_in(self) -> str:
        """The stage that makes it: train; mitigate, where a trained variant is repaired; or retune,
        where one is tuned once more.
        """
        repair = self.repair
        return "train" if repair is None else MADE_IN[MITIGATION_KINDS[repair["kind"]].when]

    @property
    def method_class(self) -> str:
        """adapter, prompt, or base."""
        return METHOD_CLASS[self.method]

    @cached_property
    def run_id(self) -> str:
        """Readable settings and a short hash of all of them and of the repetition."""
        if self.method == "none":
            words = [self.base_model, "none"]
        else:
            named = self.dataset if self.dataset not in (None, self.objective) else ""
            rate = (
                ""
                if self.learning_rate is None
                else f"lr{self.learning_rate:.0e}".replace("e-0", "e-")
            )
            epochs = "" if self.epochs is None else f"e{self.epochs}"
            words = [
                self.base_model,
                self.method,
                self.init or "",
                self.objective,
                named,
                rate,
                epochs,
                f"r{self.repetition}",
            ]
        if self.mitigation:
            words.append(re.sub(r"[^\w-]+", "_", self.mitigation.replace(".", "-")))
        return ".".join(word for word in words if word) + "." + digest(self.fields(), 8)

    def fields(self) -> dict[str, Any]:
        """The variant's own fields, by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def row(self) -> dict[str, Any]:
        """The variant as a row of the table `variants`."""
        return {"run_id": self.run_id, **self.fields(), "method_class": self.method_class}
