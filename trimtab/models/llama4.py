"""Llama 4: chunked attention with rotary positions, every fourth layer without; one expert of a sigmoid router.

The model is the text part of transformers' own definition. Sizes are those of config.json beside the released
weights (Llama-4-Scout-17B-16E, Llama-4-Maverick-17B-128E); there is no report, only an announcement (Meta AI 2025,
https://ai.meta.com/blog/llama-4-multimodal-intelligence/).

Legend: E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from trimtab.losses import GlobalBatch
from trimtab.train.compute import ActivationCheckpointConfig
from trimtab.train.config import TrainConfig, TrainingConfig
from trimtab.train.data import DataConfig
from trimtab.train.hf_model import HFModelConfig
from trimtab.train.model import Balancing
from trimtab.train.optim import LRSchedulerConfig, OptimizerConfig
from trimtab.train.parallelism import ParallelismConfig
from trimtab.train.recipes import released, small_run


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama4ModelConfig(HFModelConfig):
    """Sizes of the text part of a Llama 4 model. Each layer with experts has a shared one besides.

    Args:
        hidden_dim: hidden width of the feed-forward in layers without experts.
        moe_interval: every how many layers has experts, the last of them; 1 for all.
        num_kv_heads: heads of keys and values; divides ``num_heads``.
        head_dim: width of a head.
        chunk_len: layers with positions attend within chunks of so many tokens.
        nope_interval: every how many layers has no positions, and attends to everything before.
        temperature_len: layers without positions sharpen attention by the logarithm of how many times a token is
            further on in its row than this; None leaves it.
        qk_norm: normalise queries and keys in layers with positions.
        rope_factor: stretches positions beyond those of pretraining so many times, as in Llama 3; None leaves them.

    Raises:
        ValueError: sizes that are not positive or do not fit each other.
    """

    hidden_dim: int
    moe_interval: int = 1
    num_kv_heads: int
    head_dim: int
    chunk_len: int = 8192
    nope_interval: int = 4
    temperature_len: int | None = 8192
    qk_norm: bool = True
    rope_factor: float | None = None

    architecture: ClassVar[str] = "Llama4ForCausalLM"
    tp_divides: ClassVar[tuple[str, ...]] = ("num_heads", "num_kv_heads")

    def __post_init__(self) -> None:
        """Validate."""
        HFModelConfig.__post_init__(self)
        self.check_heads(self.num_kv_heads, self.head_dim)
        if self.moe_interval > self.num_layers:
            raise ValueError(
                f"moe_interval={self.moe_interval} must be at most num_layers={self.num_layers}, so that one layer "
                "has experts; lower model.moe_interval"
            )
        if self.rope_factor is not None and self.rope_factor < 1:
            raise ValueError(f"rope_factor={self.rope_factor} must be at least 1; raise model.rope_factor")

    def hf_config(self, vocab_size: int) -> Any:
        """transformers' configuration."""
        from transformers import Llama4TextConfig

        rope: dict[str, Any] = {"rope_type": "default"}
        if self.rope_factor is not None:
            rope = {
                "rope_type": "llama3",
                "factor": self.rope_factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
            }
        return Llama4TextConfig(
            vocab_size=vocab_size,
            hidden_size=self.dim,
            num_hidden_layers=self.num_layers,
            interleave_moe_layer_step=self.moe_interval,
            intermediate_size=self.expert_hidden_dim,
            intermediate_size_mlp=self.hidden_dim,
            num_local_experts=self.num_experts,
            num_experts_per_tok=self.top_k,
            output_router_logits=False,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            use_qk_norm=self.qk_norm,
            attention_chunk_size=self.chunk_len,
            no_rope_layer_interval=self.nope_interval,
            attn_temperature_tuning=self.temperature_len is not None,
            floor_scale=self.temperature_len or 8192,
            max_position_embeddings=self.max_seq_len,
            rope_parameters={**rope, "rope_theta": self.rope_theta},
            rms_norm_eps=self.norm_eps,
            initializer_range=self.init_std,
            tie_word_embeddings=self.tie_embeddings,
            use_cache=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )


def llama4_balancing(*, coef: float = 8e-3) -> Balancing:
    """The global-batch loss of Qiu et al. 2025; how Llama 4's experts were balanced is not published.

    Args:
        coef: of the loss.

    Reported: nothing.
    Chosen: global-batch loss 0.008, from Qiu et al. 2025, arXiv:2501.11873, table 4, on the router's normalised
        sigmoids. The 0.001 in config.json is of no loss: transformers' Llama 4 computes none.
    Source: Meta AI 2025, announcement of Llama 4, https://ai.meta.com/blog/llama-4-multimodal-intelligence/, which
        tells nothing of balancing.
    """
    return Balancing(objectives=(GlobalBatch.Config(coef=coef),))


def llama4_debugmodel() -> TrainConfig:
    """Small model with experts in every second layer, global-batch loss over 4 domain-pure microbatches.

    A minute on two CPU cores. Chunks are 64 tokens, half a row; every fourth layer has no positions.
    """
    return small_run(
        Llama4ModelConfig(
            balancing=llama4_balancing(coef=5e-2),
            dim=128,
            num_layers=4,
            hidden_dim=256,
            moe_interval=2,
            expert_hidden_dim=128,
            num_experts=8,
            top_k=1,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            chunk_len=64,
            init_std=0.06,
        )
    )


def llama4_scout() -> TrainConfig:
    """Llama 4 Scout without its vision tower, 108 of 109 billion parameters, for 512 processes.

    How it was trained is not published: the settings are only to plan with.
    """
    return _run(
        num_experts=16,
        parallelism=ParallelismConfig(expert_parallel_degree=16),
    )


def llama4_scout_released() -> TrainConfig:
    """The same sizes with the positions of the released weights, to go on from them: set checkpoint.initial."""
    return released(llama4_scout(), max_seq_len=10_485_760, rope_factor=16.0)


def llama4_maverick() -> TrainConfig:
    """Llama 4 Maverick without its vision tower, 401 billion parameters, for 1,024 processes.

    How it was trained is not published: the settings are only to plan with. The released weights have these
    positions.
    """
    return _run(
        num_experts=128,
        moe_interval=2,
        qk_norm=False,
        max_seq_len=1_048_576,
        parallelism=ParallelismConfig(expert_parallel_degree=64),
    )


def _run(*, num_experts: int, parallelism: ParallelismConfig, **sizes: Any) -> TrainConfig:
    return TrainConfig(
        model=Llama4ModelConfig(
            **{
                "balancing": llama4_balancing(),
                "dim": 5120,
                "num_layers": 48,
                "hidden_dim": 16_384,
                "expert_hidden_dim": 8192,
                "num_experts": num_experts,
                "top_k": 1,
                "num_heads": 40,
                "num_kv_heads": 8,
                "head_dim": 128,
                "norm_eps": 1e-5,
                "rope_theta": 500_000.0,
                "max_seq_len": 8192,
                "vocab_size": 202_048,
                **sizes,
            }
        ),
        data=DataConfig(seq_len=8192, microbatch_size=1),
        training=TrainingConfig(steps=250_000, global_batch_size=1024, mixed_precision="bfloat16"),
        parallelism=parallelism,
        optimizer=OptimizerConfig(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1),
        lr_scheduler=LRSchedulerConfig(warmup_steps=2000),
        activation_checkpoint=ActivationCheckpointConfig(mode="selective"),
    )
