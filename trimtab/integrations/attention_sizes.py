"""How wide the keys and values of attention modules are, for those who count what crosses between ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from trimtab.integrations.attention import ATTENTION_STATE


@dataclass(frozen=True, slots=True)
class KeyValueSize:
    """Keys and values of one attention module, over all heads of this rank.

    Args:
        key_width: features of one token's keys.
        value_width: features of its values.
        keys_widen: under autocast keys have the dtype of the rotary angles that turned them, float32, and not
            that of the projection that made them.
    """

    key_width: int
    value_width: int
    keys_widen: bool


def key_value_sizes(model: nn.Module) -> list[KeyValueSize]:
    """What each attention module gathers over cp for a token.

    Args:
        model: a model, or a pipeline stage of one, that `parallelize_attention` has divided.

    Returns:
        One entry for each attention module; none if the model is not divided over tp or cp.
    """
    return [
        _size(module, state.tp)
        for module in model.modules()
        if (state := getattr(module, ATTENTION_STATE, None)) is not None
    ]


def _size(attention: Any, tp: int) -> KeyValueSize:
    """Read off sizes that stay those of the whole module when its weights are divided."""
    if hasattr(attention, "kv_b_proj"):
        # A key is what comes of the latent beside the part with positions, which all heads share; transformers
        # writes both into a tensor of the former's dtype.
        num_heads = attention.o_proj.in_features // attention.v_head_dim // tp
        return KeyValueSize(num_heads * attention.qk_head_dim, num_heads * attention.v_head_dim, False)
    return KeyValueSize(attention.k_proj.out_features // tp, attention.v_proj.out_features // tp, True)
