"""gpt-oss: alternating sliding windows, attention sinks, experts with biases, softmax over the chosen logits.

The model is transformers' own definition. Sizes are those of the model card (OpenAI 2025, arXiv:2508.10925,
section 2) and of config.json beside the released weights. It runs eager attention: the fused kinds know no sinks.

Legend: E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import tyro

from trimtab.losses import GlobalBatch
from trimtab.train.compute import ActivationCheckpointConfig
from trimtab.train.config import TrainConfig, TrainingConfig
from trimtab.train.data import DataConfig
from trimtab.train.hf_model import HFModelConfig, YarnConfig
from trimtab.train.model import Balancing
from trimtab.train.optim import LRSchedulerConfig, OptimizerConfig
from trimtab.train.parallelism import ParallelismConfig
from trimtab.train.recipes import small_run


@dataclass(frozen=True, kw_only=True, slots=True)
class GptOssModelConfig(HFModelConfig):
    """Sizes of a gpt-oss model. All layers have experts; every other layer attends in a window, from the first on.

    Args:
        num_kv_heads: heads of keys and values; divides ``num_heads``.
        head_dim: width of a head.
        window: tokens that a token attends to in layers with a window, itself included.
        swiglu_limit: bound of both factors inside the experts; the gate has it above only.
        rope_scaling: stretches positions beyond those of pretraining; None leaves them.

    Raises:
        ValueError: sizes that are not positive or do not fit each other.
    """

    num_kv_heads: int
    head_dim: int
    window: int = 128
    swiglu_limit: float = 7.0
    rope_scaling: Annotated[YarnConfig | None, tyro.conf.AvoidSubcommands] = None

    architecture: ClassVar[str] = "GptOssForCausalLM"
    # The output projection has a bias, which tensor ranks divide by the model's width.
    tp_divides: ClassVar[tuple[str, ...]] = ("num_heads", "num_kv_heads", "dim")

    def __post_init__(self) -> None:
        """Validate."""
        HFModelConfig.__post_init__(self)
        self.check_heads(self.num_kv_heads, self.head_dim)
        if not self.swiglu_limit > 0:
            raise ValueError(f"swiglu_limit={self.swiglu_limit} must be positive; raise model.swiglu_limit")

    def hf_config(self, vocab_size: int) -> Any:
        """transformers' configuration."""
        from transformers import GptOssConfig

        rope: dict[str, Any] = {"rope_type": "default"}
        if self.rope_scaling is not None:
            rope = self.rope_scaling.parameters()
        return GptOssConfig(
            vocab_size=vocab_size,
            hidden_size=self.dim,
            num_hidden_layers=self.num_layers,
            intermediate_size=self.expert_hidden_dim,
            num_local_experts=self.num_experts,
            num_experts_per_tok=self.top_k,
            swiglu_limit=self.swiglu_limit,
            output_router_logits=False,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            sliding_window=self.window,
            max_position_embeddings=self.max_seq_len,
            rope_parameters={**rope, "rope_theta": self.rope_theta},
            rms_norm_eps=self.norm_eps,
            initializer_range=self.init_std,
            tie_word_embeddings=self.tie_embeddings,
            use_cache=False,
        )


def gpt_oss_balancing(*, coef: float = 8e-3) -> Balancing:
    """The global-batch loss of Qiu et al. 2025; the model card tells nothing of how experts were balanced.

    Args:
        coef: of the loss.

    Reported: nothing.
    Chosen: global-batch loss 0.008, from Qiu et al. 2025, arXiv:2501.11873, table 4. The 0.9 in config.json is no
        coefficient of pretraining that anybody reports.
    Source: OpenAI 2025, gpt-oss model card, arXiv:2508.10925, section 2, which describes the model and not its
        balancing.
    """
    return Balancing(objectives=(GlobalBatch.Config(coef=coef),))


def gpt_oss_debugmodel() -> TrainConfig:
    """Small model with windows of 32 tokens, global-batch loss over 4 domain-pure microbatches.

    A minute on two CPU cores.
    """
    return small_run(
        GptOssModelConfig(
            balancing=gpt_oss_balancing(coef=2e-2),
            dim=128,
            num_layers=4,
            expert_hidden_dim=64,
            num_experts=16,
            top_k=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            window=32,
            init_std=0.06,
        )
    )


def gpt_oss_20b() -> TrainConfig:
    """gpt-oss-20b, for 128 processes. How it was trained is not published: the settings are only to plan with."""
    return _run(num_layers=24, num_experts=32, parallelism=ParallelismConfig(expert_parallel_degree=8))


def gpt_oss_120b() -> TrainConfig:
    """gpt-oss-120b, for 256 processes. How it was trained is not published: the settings are only to plan with."""
    return _run(num_layers=36, num_experts=128, parallelism=ParallelismConfig(expert_parallel_degree=32))


def _run(*, num_layers: int, num_experts: int, parallelism: ParallelismConfig) -> TrainConfig:
    return TrainConfig(
        model=GptOssModelConfig(
            balancing=gpt_oss_balancing(),
            dim=2880,
            num_layers=num_layers,
            expert_hidden_dim=2880,
            num_experts=num_experts,
            top_k=4,
            num_heads=64,
            num_kv_heads=8,
            head_dim=64,
            norm_eps=1e-5,
            rope_theta=150_000.0,
            rope_scaling=YarnConfig(factor=32.0, truncate=False),
            max_seq_len=131_072,
            vocab_size=201_088,
        ),
        data=DataConfig(seq_len=4096, microbatch_size=1),
        training=TrainingConfig(steps=250_000, global_batch_size=1024, mixed_precision="bfloat16"),
        parallelism=parallelism,
        optimizer=OptimizerConfig(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1),
        lr_scheduler=LRSchedulerConfig(warmup_steps=2000),
        activation_checkpoint=ActivationCheckpointConfig(mode="selective"),
    )
