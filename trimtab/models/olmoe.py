"""OLMoE: multi-head attention with normalised queries and keys, many narrow experts, weights not normalised.

The model is transformers' own definition. Sizes are those of the report (Muennighoff et al. 2024,
arXiv:2409.02060, appendix B) and of config.json beside the released weights (OLMoE-1B-7B-0924).

Legend: E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from trimtab.losses import BatchWise, ZLoss
from trimtab.train.compute import ActivationCheckpointConfig
from trimtab.train.config import TrainConfig, TrainingConfig
from trimtab.train.data import DataConfig
from trimtab.train.hf_model import HFModelConfig
from trimtab.train.model import Balancing
from trimtab.train.optim import LRSchedulerConfig, OptimizerConfig
from trimtab.train.recipes import small_run, steps_of


@dataclass(frozen=True, kw_only=True, slots=True)
class OlmoeModelConfig(HFModelConfig):
    """Sizes of an OLMoE model. All layers have experts; a head is ``dim / num_heads`` wide.

    Args:
        num_kv_heads: heads of keys and values; divides ``num_heads``.

    Raises:
        ValueError: sizes that are not positive or do not fit each other.
    """

    num_kv_heads: int

    architecture: ClassVar[str] = "OlmoeForCausalLM"
    refused_axes: ClassVar[Mapping[str, str]] = {
        "tp": "its norms of queries and keys span all heads, of which each tensor rank would have a part"
    }

    def __post_init__(self) -> None:
        """Validate."""
        HFModelConfig.__post_init__(self)
        self.check_heads(self.num_kv_heads)

    def hf_config(self, vocab_size: int) -> Any:
        """transformers' configuration."""
        from transformers import OlmoeConfig

        return OlmoeConfig(
            vocab_size=vocab_size,
            hidden_size=self.dim,
            num_hidden_layers=self.num_layers,
            intermediate_size=self.expert_hidden_dim,
            num_experts=self.num_experts,
            num_experts_per_tok=self.top_k,
            norm_topk_prob=False,
            output_router_logits=False,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
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


def olmoe_balancing(*, num_layers: int, coef: float = 1e-2, z_coef: float = 1e-3) -> Balancing:
    """Batch-wise loss of each device's microbatch, averaged over them, and z-loss, both means over layers.

    Weights of the report are of means over layers: its code divides by their number, as OLMo-core does by default
    (``scale_loss_by_num_layers``) and MegaBlocks always. Objectives here are summed over layers, so their
    coefficients are the report's divided by the number of layers.

    Args:
        num_layers: of the model.
        coef: alpha, of the mean over layers.
        z_coef: beta, of the mean over layers.

    Reported: batch-wise loss 0.01 of single devices' microbatches; z-loss 0.001.
    Chosen: nothing.
    Source: Muennighoff et al. 2024, OLMoE, arXiv:2409.02060, section 2 and appendix B; scope and division by
        layers from the code that trained it (allenai/OLMo, MegaBlocks).
    """
    return Balancing(
        objectives=(
            BatchWise.Config(coef=coef / num_layers, local=True, average_microbatches=True),
            ZLoss.Config(coef=z_coef / num_layers),
        )
    )


def olmoe_debugmodel() -> TrainConfig:
    """Small model, batch-wise loss of single microbatches and z-loss; a minute on two CPU cores.

    The batch-wise coefficient is 4 times the report's. Microbatches mix domains: each is balanced on its own.
    """
    return small_run(
        OlmoeModelConfig(
            balancing=olmoe_balancing(num_layers=4, coef=4e-2),
            dim=128,
            num_layers=4,
            expert_hidden_dim=64,
            num_experts=16,
            top_k=2,
            num_heads=4,
            num_kv_heads=4,
            init_std=0.06,
        ),
        domain_pure=False,
    )


def olmoe_1b_7b() -> TrainConfig:
    """OLMoE-1B-7B with the settings of the report (appendix B), for 256 processes.

    The report lets the learning rate fall along a cosine to a tenth, and for the last 100 billion tokens to 0.
    Its text is OLMoE-mix-0924 and its tokenizer allenai/gpt-neox-olmo-dolma-v1_5: give data.source and
    data.tokenizer.name.
    """
    global_batch_size, seq_len = 1024, 4096
    steps = steps_of(5.133e12, global_batch_size=global_batch_size, seq_len=seq_len)
    return TrainConfig(
        model=OlmoeModelConfig(
            balancing=olmoe_balancing(num_layers=16),
            dim=2048,
            num_layers=16,
            expert_hidden_dim=1024,
            num_experts=64,
            top_k=8,
            num_heads=16,
            num_kv_heads=16,
            norm_eps=1e-5,
            vocab_size=50_304,
        ),
        data=DataConfig(seq_len=seq_len, microbatch_size=4),
        training=TrainingConfig(steps=steps, global_batch_size=global_batch_size, mixed_precision="bfloat16"),
        optimizer=OptimizerConfig(lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1),
        lr_scheduler=LRSchedulerConfig(warmup_steps=2500, decay_steps=steps - 2500, min_factor=0.1),
        activation_checkpoint=ActivationCheckpointConfig(mode="selective"),
    )
