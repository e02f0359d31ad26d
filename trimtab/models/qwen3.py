"""Qwen3-MoE: grouped-query attention, softmax router without bias or shared expert.

The model is transformers' own definition. Balancing is the global-batch loss that the report names (Qwen Team
2025, arXiv:2505.09388, section 2). It gives no coefficient; the one here is near that of the paper it cites
(Qiu et al. 2025, arXiv:2501.11873: 0.008).

Legend: E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from trimtab.losses import GlobalBatch
from trimtab.train.config import TrainConfig, TrainingConfig
from trimtab.train.data import DataConfig
from trimtab.train.hf_model import HFModelConfig
from trimtab.train.model import Balancing
from trimtab.train.optim import OptimizerConfig


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
        coef: the report gives none; this one is of the paper it cites (arXiv:2501.11873, section 4).
    """
    return Balancing(objectives=(GlobalBatch.Config(coef=coef),))


def qwen3_debugmodel() -> TrainConfig:
    """Small model, global-batch loss over 4 domain-pure microbatches; minutes on two CPU cores."""
    return TrainConfig(
        model=Qwen3ModelConfig(
            balancing=qwen3_balancing(coef=1e-2),
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
