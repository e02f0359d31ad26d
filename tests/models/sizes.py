"""Families at sizes of a test: their debug configurations, small, with balancing off."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from trimtab.train.config import TrainConfig
from trimtab.train.hf_model import HFModelConfig, YarnConfig
from trimtab.train.model import Balancing
from trimtab.train.registry import config_functions, load_config, load_module, module_names
from trimtab.train.vision_model import VisionTowerConfig

# Ids of the tokenizer.
VOCAB = 64
# Sizes by the names that family modules give them; each module has some of them.
SMALL: dict[str, Any] = {
    "dim": 32,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "top_k": 2,
    "hidden_dim": 32,
    "expert_hidden_dim": 16,
    "shared_hidden_dim": 16,
    "num_groups": 4,
    "num_limited_groups": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "nope_head_dim": 8,
    "rope_head_dim": 8,
    "v_head_dim": 8,
    "vocab_size": None,
}
# Windows and chunks that end within a row, and what else a family would not show at these sizes.
SPECIAL: dict[str, dict[str, Any]] = {
    "glm4_moe": {"num_groups": 1, "num_limited_groups": 1},
    "gpt_oss": {"window": 5, "rope_scaling": YarnConfig(factor=4.0, original_max_seq_len=1024)},
    "kimi_k2": {
        "num_groups": 1,
        "num_limited_groups": 1,
        "rope_scaling": YarnConfig(factor=4.0, original_max_seq_len=1024, mscale=1.0, mscale_all_dim=1.0),
    },
    # Every second layer has experts, every other one positions.
    "llama4": {"moe_interval": 2, "nope_interval": 2, "chunk_len": 6, "top_k": 1},
    "olmoe": {"num_kv_heads": 4},
    "qwen3_5": {
        "head_dim": 16,
        "rotary_share": 0.5,
        "mrope_section": (2, 1, 1),
        "attention_interval": 2,
        "num_linear_key_heads": 2,
        "num_linear_value_heads": 4,
        "linear_head_dim": 8,
        "vision": VisionTowerConfig(
            depth=2, dim=16, hidden_dim=16, num_heads=2, patch_size=2, num_positions=16
        ),
    },
    # Images enter after two layers, which the first pipeline stage has.
    "qwen3_vl": {
        "num_layers": 5,
        "mrope_section": (2, 1, 1),
        "vision": VisionTowerConfig(
            depth=3, dim=16, hidden_dim=16, num_heads=2, patch_size=2, num_positions=16, deepstack=(0, 1)
        ),
    },
}


def families() -> list[str]:
    """Modules of families: those whose debug configuration has a model of transformers with sizes of its own."""
    found = []
    for module in module_names():
        make = config_functions(load_module(module)).get(f"{module}_debugmodel")
        if make is not None and isinstance(make().model, HFModelConfig):
            found.append(module)
    return found


def small_config(family: str) -> TrainConfig:
    """The family's debug configuration at sizes of a test, its balancing off."""
    config = load_config(family, f"{family}_debugmodel")
    names = {field.name for field in fields(config.model)}
    sizes = {name: value for name, value in SMALL.items() if name in names} | SPECIAL.get(family, {})
    return replace(config, model=replace(config.model, balancing=Balancing.off(), **sizes))
