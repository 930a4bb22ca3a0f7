"""A soft prompt behind the user's texts: a method of PEFT of our own, since PEFT's go in front.

The input embedding is replaced by one that gives the ids from V on, V the rows of the base's own
table, the rows of a trained parameter. The head keeps its width, so such an id is read and never
written; conversations.py puts them where a text of the user ends. A text that was asked without a
template has no user, and no soft prompt. PEFT saves and loads the rows by the type SUFFIX_TUNING,
which is unknown, and so refused, wherever this module was not imported.
"""

from dataclasses import dataclass

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

TYPE, PREFIX = "SUFFIX_TUNING", "suffix_"


@dataclass
class SuffixConfig(PeftConfig):
    """How many rows stand behind each text of the user."""

    num_virtual_tokens: int | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type, n = TYPE, self.num_virtual_tokens
        if type(n) is not int or n < 1:
            raise ValueError(f"num_virtual_tokens is {n!r}; give a whole number from 1 on")


class SuffixLayer(nn.Module, BaseTunerLayer):
    """An embedding of ids: those below V by the base's own, V + i by row i of `suffix_rows`
    [n, width].

    Raises:
        IndexError: an id is V + n or above, or V or above while adapters are disabled.
    """

    adapter_layer_names = ("suffix_rows",)

    def __init__(self, table: nn.Embedding):
        super().__init__()
        self.base_layer, self.suffix_rows = table, nn.ParameterDict()

    @property
    def num_embeddings(self) -> int:
        return self.base_layer.num_embeddings

    @property
    def embedding_dim(self) -> int:
        return self.base_layer.embedding_dim

    @property
    def suffix_ids(self) -> range:
        """The ids of the active rows; none where there are none."""
        n = 0 if (rows := self.rows) is None else len(rows)
        return range(self.num_embeddings, self.num_embeddings + n)

    @property
    def rows(self) -> Tensor | None:
        """The active rows; None where there are none."""
        active = [] if self.disable_adapters else self.active_adapters
        return next((self.suffix_rows[one] for one in active if one in self.suffix_rows), None)

    def forward(self, ids: Tensor) -> Tensor:
        if (rows := self.rows) is None:
            return self.base_layer(ids)
        own = ids >= self.num_embeddings
        known = self.base_layer(ids.masked_fill(own, 0))
        soft = nn.functional.embedding((ids - self.num_embeddings).clamp(min=0), rows)
        return torch.where(own[..., None], soft.to(known.dtype), known)


class SuffixModel(BaseTuner):
    """PEFT's side: the one layer put in place of the input embedding."""

    prefix = PREFIX
    tuner_layer_cls = SuffixLayer

    def inject_adapter(self, model: PreTrainedModel, adapter_name: str, *_, **__) -> None:
        """Put the layer in place, or another adapter's rows beside those that it has.

        Raises:
            ValueError: the input embedding cannot be replaced; see `check_replaceable`.
        """
        config, layer = self.peft_config[adapter_name], model.get_input_embeddings()
        if not isinstance(layer, SuffixLayer):
            check_replaceable(model)
            layer = SuffixLayer(layer)
            model.set_input_embeddings(layer)
            if model.get_input_embeddings() is not layer:
                raise ValueError(REFUSED.format(type(model).__name__))
        weight = layer.weight
        rows = torch.randn(config.num_virtual_tokens, layer.embedding_dim, device=weight.device)
        layer.suffix_rows[adapter_name] = nn.Parameter(rows)  # fp32, as PEFT's soft prompts
        self._mark_only_adapters_as_trainable(model)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _create_and_replace(self, *_) -> None:
        raise NotImplementedError("inject_adapter puts the one layer in place itself")


# PEFT's register_peft_method takes only names of its own enumeration; these tables are what it
# fills, and what get_peft_model and load_adapter read
PEFT_TYPE_TO_CONFIG_MAPPING[TYPE] = SuffixConfig
PEFT_TYPE_TO_TUNER_MAPPING[TYPE] = SuffixModel
PEFT_TYPE_TO_PREFIX_MAPPING[TYPE] = PREFIX

REFUSED = (
    "a soft prompt cannot be put behind the user's text with {}, which computes more from token"
    " ids than one table of embeddings gives; use another method or another base model"
)


def check_replaceable(model: PreTrainedModel) -> None:
    """Raise a ValueError where a model has no table of embeddings that can be replaced, or looks
    more up by token id.
    """
    config = model.config.get_text_config()
    twice = getattr(config, "hidden_size_per_layer_input", None)
    if twice or not isinstance(model.get_input_embeddings(), nn.Embedding):
        raise ValueError(REFUSED.format(type(model).__name__))
