"""Qwen3-MoE: grouped-query attention, softmax router without bias or shared expert.

The model is transformers' own definition. Sizes are those of the report (Qwen Team 2025, arXiv:2505.09388,
table 2) and of config.json beside the released weights.

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
from trimtab.train.recipes import released, small_run, steps_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen3ModelConfig(HFModelConfig):
    """Sizes of a Qwen3-MoE model. All layers have experts.

    Args:
        num_kv_heads: heads of keys and values; divides ``num_heads``.
        head_dim: width of a head.

    Raises:
        ValueError: sizes that are not positive or do not fit each other.
    """

    num_kv_heads: int
    head_dim: int

    architecture: ClassVar[str] = "Qwen3MoeForCausalLM"
    tp_divides: ClassVar[tuple[str, ...]] = ("num_heads", "num_kv_heads")

    def __post_init__(self) -> None:
        """Validate."""
        HFModelConfig.__post_init__(self)
        self.check_heads(self.num_kv_heads, self.head_dim)

    def hf_config(self, vocab_size: int) -> Any:
        """transformers' configuration."""
        from transformers import Qwen3MoeConfig

        return Qwen3MoeConfig(
            vocab_size=vocab_size,
            hidden_size=self.dim,
            num_hidden_layers=self.num_layers,
            moe_intermediate_size=self.expert_hidden_dim,
            intermediate_size=self.expert_hidden_dim,
            num_experts=self.num_experts,
            num_experts_per_tok=self.top_k,
            norm_topk_prob=True,
            output_router_logits=False,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,  # type: ignore[call-arg]
            max_position_embeddings=self.max_seq_len,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            rms_norm_eps=self.norm_eps,
            initializer_range=self.init_std,
            tie_word_embeddings=self.tie_embeddings,
            use_cache=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )


def qwen3_balancing(*, coef: float = 8e-3) -> Balancing:
    """The global-batch loss that the report names.

    Args:
        coef: of the loss; the report gives none.

    Reported: global-batch loss, without its coefficient.
    Chosen: coefficient 0.008, of the paper that the report cites for the loss (Qiu et al. 2025, arXiv:2501.11873,
        table 4).
    Source: Qwen Team 2025, Qwen3, arXiv:2505.09388, section 2.
    """
    return Balancing(objectives=(GlobalBatch.Config(coef=coef),))


def qwen3_debugmodel() -> TrainConfig:
    """Small model, global-batch loss over 4 domain-pure microbatches; a minute on two CPU cores."""
    return small_run(
        Qwen3ModelConfig(
            balancing=qwen3_balancing(coef=2e-2),
            dim=128,
            num_layers=4,
            expert_hidden_dim=64,
            num_experts=16,
            top_k=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            init_std=0.06,
        )
    )


def qwen3_30b_a3b() -> TrainConfig:
    """Qwen3-30B-A3B, for 256 processes.

    Rows and length of training are the report's (section 3.2); it gives neither batch nor learning rate. Text
    is not published: give data.source and data.tokenizer.name.
    """
    return _run(
        Qwen3ModelConfig(
            balancing=qwen3_balancing(),
            dim=2048,
            num_layers=48,
            expert_hidden_dim=768,
            num_experts=128,
            top_k=8,
            num_heads=32,
            num_kv_heads=4,
            head_dim=128,
            vocab_size=151_936,
        ),
        ParallelismConfig(expert_parallel_degree=8),
    )


def qwen3_235b_a22b() -> TrainConfig:
    """Qwen3-235B-A22B, for 1,024 processes; as `qwen3_30b_a3b`."""
    return _run(
        Qwen3ModelConfig(
            balancing=qwen3_balancing(),
            dim=4096,
            num_layers=94,
            expert_hidden_dim=1536,
            num_experts=128,
            top_k=8,
            num_heads=64,
            num_kv_heads=4,
            head_dim=128,
            vocab_size=151_936,
        ),
        ParallelismConfig(
            expert_parallel_degree=32, pipeline_parallel_degree=8, pipeline_parallel_schedule="ZBVZeroBubble"
        ),
    )


def qwen3_30b_a3b_released() -> TrainConfig:
    """Qwen3-30B-A3B with the positions of the released weights, to go on from them: set checkpoint.initial."""
    return released(qwen3_30b_a3b(), **_RELEASED)


def qwen3_235b_a22b_released() -> TrainConfig:
    """Qwen3-235B-A22B with the positions of the released weights, to go on from them: set checkpoint.initial."""
    return released(qwen3_235b_a22b(), **_RELEASED)


# The base of positions was raised in the last stage of pretraining (section 3.2 of the report).
_RELEASED: dict[str, Any] = {"max_seq_len": 40_960, "rope_theta": 1_000_000.0}


def _run(model: Qwen3ModelConfig, parallelism: ParallelismConfig) -> TrainConfig:
    global_batch_size, seq_len = 4096, 4096
    return TrainConfig(
        model=model,
        data=DataConfig(seq_len=seq_len, microbatch_size=1),
        training=TrainingConfig(
            steps=steps_of(36e12, global_batch_size=global_batch_size, seq_len=seq_len),
            global_batch_size=global_batch_size,
            mixed_precision="bfloat16",
        ),
        parallelism=parallelism,
        optimizer=OptimizerConfig(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1),
        lr_scheduler=LRSchedulerConfig(warmup_steps=2000),
        activation_checkpoint=ActivationCheckpointConfig(mode="selective"),
    )
