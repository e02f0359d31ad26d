"""Qwen3-MoE: grouped-query attention, softmax router without bias or shared expert.

The model is transformers' own definition. Balancing is the global-batch loss that the report names (Qwen Team
2025, arXiv:2505.09388, section 2). It gives no coefficient; the one here is near that of the paper it cites
(Qiu et al. 2025, arXiv:2501.11873: 0.008).

Legend: E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from trimtab.losses import GlobalBatch
from trimtab.parallel.mesh import Degrees
from trimtab.train.config import TrainConfig, TrainingConfig
from trimtab.train.data import DataConfig
from trimtab.train.model import Balancing, ModelConfig
from trimtab.train.optim import OptimizerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen3MoeModelConfig(ModelConfig):
    """Sizes of a Qwen3-MoE model. All layers have experts.

    Args:
        dim: width of the model.
        expert_hidden_dim: hidden width of one expert.
        num_heads: heads of queries.
        num_kv_heads: heads of keys and values; divides ``num_heads``.
        head_dim: width of a head.
        init_std: standard deviation of initial weights.

    Raises:
        ValueError: sizes that are not positive or do not fit each other.
    """

    dim: int
    expert_hidden_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    init_std: float = 0.02

    def __post_init__(self) -> None:
        """Validate."""
        ModelConfig.__post_init__(self)
        for name in ("dim", "expert_hidden_dim", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; raise model.{name}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}; change one of them"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even; change model.head_dim")

    def check_parallel(self, degrees: Degrees) -> None:
        """Besides experts, heads are divided, and the width of each expert where the tensor ranks take it."""
        ModelConfig.check_parallel(self, degrees)
        self.check_divides("tensor_parallel_degree", degrees.tp, "num_heads", "num_kv_heads")
        self.check_divides("expert_tensor_parallel_degree", degrees.etp, "expert_hidden_dim")

    def build(self, *, vocab_size: int, seq_len: int) -> nn.Module:
        """Build transformers' `Qwen3MoeForCausalLM`."""
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        config = Qwen3MoeConfig(
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
            initializer_range=self.init_std,
            use_cache=False,
            tie_word_embeddings=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        return Qwen3MoeForCausalLM(config).train()


def qwen3_moe_debugmodel() -> TrainConfig:
    """Small model, global-batch loss over 4 domain-pure microbatches; minutes on two CPU cores."""
    return TrainConfig(
        model=Qwen3MoeModelConfig(
            balancing=Balancing(objectives=(GlobalBatch.Config(coef=1e-2),)),
            dim=128,
            num_layers=6,
            expert_hidden_dim=96,
            num_experts=16,
            top_k=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            init_std=0.06,
        ),
        data=DataConfig(seq_len=256, microbatch_size=4, domain_pure=True, max_validation_microbatches=16),
        training=TrainingConfig(steps=200, global_batch_size=16),
        optimizer=OptimizerConfig(lr=3e-3),
    )
