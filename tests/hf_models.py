"""Tiny random transformers MoE models, built from configurations: no network, well under a second each.

B sequences, S length, D model, E experts, K top-k. D = 32, E = 8, K = 2, 64 tokens of vocabulary.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

E, K, D, VOCAB = 8, 2, 32, 64

_SHARED: dict[str, Any] = {
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_experts": E,
    "num_local_experts": E,
    "n_routed_experts": E,
    "num_experts_per_tok": K,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "shared_expert_intermediate_size": 16,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "attn_implementation": "eager",
}
_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_GROUPS = {"n_group": 4, "topk_group": 2}
_NO_DENSE = {"first_k_dense_replace": 0}
_ALL_SPARSE = {"mlp_layer_types": lambda n: ["sparse"] * n}
# Linear attention layers 1, 2; full attention at layer 0, because the cache looks for one.
_LINEAR_ATTENTION = {
    "layer_types": lambda n: ["full_attention"] + ["linear_attention"] * (n - 1),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": D,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}

# Facts the tests check, written by hand and not read from the table under test: model class, router class,
# score, where the selection bias lives, configuration on top of the shared one.
Row = tuple[str, str, str, str | None, dict[str, Any]]

REQUIRED: dict[str, Row] = {
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeTopKRouter", "softmax", None, {}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeTopKRouter", "softmax", None, {"norm_topk_prob": True}),
    "qwen3_next": ("Qwen3NextForCausalLM", "Qwen3NextTopKRouter", "softmax", None, _LINEAR_ATTENTION),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeTextTopKRouter",
        "softmax",
        None,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    ),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTopKRouter", "softmax", None, _LINEAR_ATTENTION),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        "DeepseekV2TopkRouter",
        "softmax",
        None,
        {**_LATENT_ATTENTION, **_GROUPS, **_NO_DENSE, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3TopkRouter",
        "sigmoid",
        "router",
        {**_LATENT_ATTENTION, **_GROUPS, **_NO_DENSE},
    ),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        "Glm4MoeTopkRouter",
        "sigmoid",
        "router",
        {"n_group": 1, "topk_group": 1, **_NO_DENSE},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssTopKRouter",
        "softmax",
        None,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4Router",
        "sigmoid",
        None,
        {"intermediate_size_mlp": 32, "attention_chunk_size": 64},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralTopKRouter", "softmax", None, {}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeTopKRouter", "softmax", None, {}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeTopKRouter",
        "softmax",
        "router",
        {"moe_layer_start_index": 0},
    ),
    "minimax_m2": ("MiniMaxM2ForCausalLM", "MiniMaxM2TopKRouter", "sigmoid", "block", {}),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeTopKRouter", "softmax", None, {}),
}

EXTRA: dict[str, Row] = {
    "afmoe": ("AfmoeForCausalLM", "AfmoeTokenChoiceRouter", "sigmoid", "block", {"num_dense_layers": 0}),
    "cohere2_moe": (
        "Cohere2MoeForCausalLM",
        "Cohere2MoeTopKRouter",
        "sigmoid",
        None,
        {"expert_selection_fn": "sigmoid", **_NO_DENSE},
    ),
    "dots1": (
        "Dots1ForCausalLM",
        "Dots1TopkRouter",
        "sigmoid",
        "router",
        {"n_group": 1, "topk_group": 1, **_NO_DENSE},
    ),
    "flex_olmo": ("FlexOlmoForCausalLM", "FlexOlmoTopKRouter", "softmax", None, {}),
    "granitemoeshared": (
        "GraniteMoeSharedForCausalLM",
        "GraniteMoeSharedTopKRouter",
        "softmax",
        None,
        {"shared_intermediate_size": 16},
    ),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1ForCausalLM",
        "HunYuanMoEV1Gate",
        "softmax",
        None,
        {"moe_topk": K, "num_shared_expert": 1},
    ),
    "hy_v3": ("HYV3ForCausalLM", "HYV3TopKRouter", "sigmoid", "block", _ALL_SPARSE),
    "jamba": (
        "JambaForCausalLM",
        "JambaTopKRouter",
        "softmax",
        None,
        {
            "use_mamba_kernels": False,
            "attn_layer_period": 1,
            "attn_layer_offset": 0,
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
        },
    ),
    "lfm2_moe": (
        "Lfm2MoeForCausalLM",
        "Lfm2MoeTopKRouter",
        "sigmoid",
        "block",
        {"num_dense_layers": 0, "layer_types": lambda n: ["full_attention"] * n},
    ),
    "minimax": (
        "MiniMaxForCausalLM",
        "MiniMaxTopKRouter",
        "softmax",
        None,
        {"layer_types": lambda n: ["full_attention"] * n},
    ),
    # hash-routed layers need input_ids in the router and are refused: none here
    "deepseek_v4": (
        "DeepseekV4ForCausalLM",
        "DeepseekV4TopKRouter",
        "sqrt_softplus",
        "router",
        {
            "q_lora_rank": 8,
            "o_lora_rank": 8,
            "o_groups": 2,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "mlp_layer_types": lambda n: ["moe"] * n,
        },
    ),
}

MODELS: dict[str, Row] = REQUIRED | EXTRA
Batch = dict[str, torch.Tensor]


def make_batch(batch_size: int = 2, seq_len: int = 16, seed: int = 0, *, padding: bool = False) -> Batch:
    """Random ids, labels and mask; with ``padding`` later sequences end in padding (mask 0, label -100)."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB, (batch_size, seq_len), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    if padding:
        for row in range(1, batch_size):
            attention_mask[row, seq_len - min(row, seq_len - 1) :] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def tiny_config(family: str, *, num_layers: int = 2, **overrides: Any) -> tuple[type[nn.Module], Any]:
    """(model class, configuration) of one family; ``overrides`` go into the (text) configuration."""
    model_name, _, _, _, extra = MODELS[family]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    model_class = getattr(module, model_name)
    settings = {**_SHARED, **extra, "num_hidden_layers": num_layers, **overrides}
    settings = {k: v(num_layers) if callable(v) else v for k, v in settings.items()}
    if family == "qwen3_vl_moe":
        attention = settings.pop("attn_implementation")
        special = {"image_token_id": 60, "video_token_id": 61}
        special |= {"vision_start_token_id": 62, "vision_end_token_id": 63}
        config = model_class.config_class(text_config=settings, vision_config=dict(_VISION), **special)
        config._attn_implementation = attention
        return model_class, config
    return model_class, model_class.config_class(**settings)


def randomize_routing(
    model: nn.Module, *, seed: int = 0, gate_std: float = 0.3, bias_std: float = 0.1
) -> None:
    """Give every router of a tiny model random weights and a random selection bias.

    Stock initialisation leaves many of both at zero, which routes every token alike.
    """
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor: torch.Tensor, std: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            parent, _, leaf = name.rpartition(".")
            if leaf in ("e_score_correction_bias", "expert_bias"):
                fill(tensor, bias_std)
            elif tensor.shape == (E, D) and parent.endswith(("gate", "router", "wg")):
                fill(tensor, gate_std)
            elif tensor.shape == (E,) and leaf == "bias" and parent.endswith("router"):
                fill(tensor, bias_std)


def tiny_model(
    family: str,
    *,
    num_layers: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides: Any,
) -> tuple[nn.Module, Callable[..., Batch]]:
    """A stock model of ``family`` with random routing, in training mode, and `make_batch`.

    The global random state is left as it was.
    """
    model_class, config = tiny_config(family, num_layers=num_layers, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    randomize_routing(model, seed=seed)
    return model.to(dtype).train(), make_batch
