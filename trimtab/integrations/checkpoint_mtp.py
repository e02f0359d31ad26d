"""What files call the layers of multi-token prediction: decoder layers behind the last one, or ``mtp.``.

In memory they are ``mtp.layers.<k>.``, and what such a layer has beside its decoder layer is called as in
transformers' `MtpLayer`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

MTP = "mtp."
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# What one such layer has beside its decoder layer, in memory and in a file that numbers it as a layer.
_MTP_PARTS = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "post_norm": "shared_head.norm"}
# In a file that has it under `mtp.`, the first layer's lie one level up.
_MTP_FIRST = {
    "enorm": "pre_fc_norm_embedding",
    "hnorm": "pre_fc_norm_hidden",
    "eh_proj": "fc",
    "shared_head.norm": "norm",
}


def num_mtp_layers(names: Iterable[str]) -> int:
    """Layers of multi-token prediction among names in memory."""
    numbers = [int(match[1]) for name in names if name.startswith(MTP) and (match := LAYER.search(name))]
    return 1 + max(numbers, default=-1)


def mtp_conversions(stock: Any, num_layers: int) -> list[Any]:
    """transformers' rules for layers of multi-token prediction, which it loads as a model of their own."""
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        get_model_conversion_mapping,
    )
    from transformers.core_model_loading import WeightRenaming

    first = stock.config.get_text_config().num_hidden_layers
    numbered = [WeightRenaming(f"layers.{first + k}.", f"layers.{k}.mtp_block.") for k in range(num_layers)]
    own = copy.deepcopy(get_model_conversion_mapping(stock))
    for entry in own:
        # These layers are not under the part of the model that a rule may be limited to.
        entry.scope_prefix = entry.base_model_prefix = None
    return [*numbered, *get_checkpoint_conversion_mapping("MtpModel"), *own]


def as_numbered(name: str, layers: str, first: int) -> str:
    """A name in memory as that of a further decoder layer; others as they are.

    Args:
        name: any name in memory.
        layers: what decoder layers' names begin with.
        first: number of the first one that is of multi-token prediction.
    """
    if not name.startswith(MTP):
        return name
    _, _, number, part, *rest = name.split(".")
    inner = ".".join(rest) if part == "mtp_block" else ".".join([_MTP_PARTS.get(part, part), *rest])
    return f"{layers}{first + int(number)}.{inner}"


def under_mtp(name: str, layers: str, first: int) -> str:
    """A name from `as_numbered` as families have it that keep these layers under ``mtp.``; others as they are."""
    match = re.match(rf"{re.escape(layers)}(\d+)\.(.*)\.(\w+)", name)
    if match is None or int(match[1]) < first:
        return name
    number, inner, leaf = int(match[1]) - first, match[2], match[3]
    if number == 0 and inner in _MTP_FIRST:
        return f"{MTP}{_MTP_FIRST[inner]}.{leaf}"
    return f"{MTP}layers.{number}.{inner}.{leaf}"
