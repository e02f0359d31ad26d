"""Mixtral: grouped-query attention, few wide experts, softmax over the chosen ones.

The model is transformers' own definition. Sizes of 8x7B are those of the report (Jiang et al. 2024,
arXiv:2401.04088, table 1), those of 8x22B of config.json beside the released weights (Mixtral-8x22B-v0.1).

Legend: E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from trimtab.losses import BatchWise
from trimtab.train.compute import ActivationCheckpointConfig
from trimtab.train.config import TrainConfig, TrainingConfig
from trimtab.train.data import DataConfig
from trimtab.train.hf_model import HFModelConfig
from trimtab.train.model import Balancing
from trimtab.train.optim import LRSchedulerConfig, OptimizerConfig
from trimtab.train.parallelism import ParallelismConfig
from trimtab.train.recipes import small_run


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtralModelConfig(HFModelConfig):
    """Sizes of a Mixtral model. All layers have experts; a head is ``dim / num_heads`` wide.

    Args:
        num_kv_heads: heads of keys and values; divides ``num_heads``.
        window: tokens that a token attends to; None for all before it.

    Raises:
        ValueError: sizes that are not positive or do not fit each other.
    """

    num_kv_heads: int
    window: int | None = None

    architecture: ClassVar[str] = "MixtralForCausalLM"
    tp_divides: ClassVar[tuple[str, ...]] = ("num_heads", "num_kv_heads")

    def __post_init__(self) -> None:
        """Validate."""
        HFModelConfig.__post_init__(self)
        self.check_heads(self.num_kv_heads)

    def hf_config(self, vocab_size: int) -> Any:
        """transformers' configuration."""
        from transformers import MixtralConfig

        return MixtralConfig(
            vocab_size=vocab_size,
            hidden_size=self.dim,
            num_hidden_layers=self.num_layers,
            intermediate_size=self.expert_hidden_dim,
            num_local_experts=self.num_experts,
            num_experts_per_tok=self.top_k,
            output_router_logits=False,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            sliding_window=self.window,
            max_position_embeddings=self.max_seq_len,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            rms_norm_eps=self.norm_eps,
            initializer_range=self.init_std,
            tie_word_embeddings=self.tie_embeddings,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )


def mixtral_balancing(*, coef: float = 1e-2) -> Balancing:
    """The batch-wise loss of Switch Transformers over all tokens of a forward; the report tells nothing.

    Args:
        coef: alpha.

    Reported: nothing.
    Chosen: batch-wise loss 1e-2, from Switch Transformers, arXiv:2101.03961, section 2.2, with the load divided by
        K.
    Source: Jiang et al. 2024, Mixtral of Experts, arXiv:2401.04088, which describes the model and not its training.
    """
    return Balancing(objectives=(BatchWise.Config(coef=coef),))


def mixtral_debugmodel() -> TrainConfig:
    """Small model, batch-wise loss over the 16 rows of a step; a minute on two CPU cores."""
    return small_run(
        MixtralModelConfig(
            balancing=mixtral_balancing(),
            dim=128,
            num_layers=4,
            expert_hidden_dim=128,
            num_experts=8,
            top_k=2,
            num_heads=4,
            num_kv_heads=2,
            init_std=0.06,
        ),
        microbatch_size=None,
    )


def mixtral_8x7b() -> TrainConfig:
    """Mixtral 8x7B, for 256 processes. How it was trained is not published: the settings are only to plan with."""
    return _run(
        MixtralModelConfig(
            balancing=mixtral_balancing(),
            dim=4096,
            num_layers=32,
            expert_hidden_dim=14_336,
            num_experts=8,
            top_k=2,
            num_heads=32,
            num_kv_heads=8,
            norm_eps=1e-5,
            rope_theta=1_000_000.0,
            max_seq_len=32_768,
            vocab_size=32_000,
        )
    )


def mixtral_8x22b() -> TrainConfig:
    """Mixtral 8x22B, for 256 processes. How it was trained is not published: the settings are only to plan with."""
    return _run(
        MixtralModelConfig(
            balancing=mixtral_balancing(),
            dim=6144,
            num_layers=56,
            expert_hidden_dim=16_384,
            num_experts=8,
            top_k=2,
            num_heads=48,
            num_kv_heads=8,
            norm_eps=1e-5,
            rope_theta=1_000_000.0,
            max_seq_len=65_536,
            vocab_size=32_000,
        )
    )


def _run(model: MixtralModelConfig) -> TrainConfig:
    # No pipeline: a batch-wise loss needs all rows of a step in one forward.
    return TrainConfig(
        model=model,
        data=DataConfig(seq_len=4096, microbatch_size=None),
        training=TrainingConfig(steps=250_000, global_batch_size=1024, mixed_precision="bfloat16"),
        parallelism=ParallelismConfig(expert_parallel_degree=8),
        optimizer=OptimizerConfig(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1),
        lr_scheduler=LRSchedulerConfig(warmup_steps=2000),
        activation_checkpoint=ActivationCheckpointConfig(mode="full"),
    )
