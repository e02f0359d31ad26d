"""Qwen3-VL-MoE: Qwen3-MoE behind a vision tower whose features also enter the first decoder layers.

The model is transformers' own definition. Its report (Qwen Team 2025, arXiv:2511.21631) gives no coefficient for
balancing experts. Its language models are Qwen3's, whose report names the global-batch loss, without a coefficient
either (arXiv:2505.09388, section 2). So the preset is that loss with the coefficient of the paper cited there (Qiu
et al. 2025, arXiv:2501.11873: 0.008). Configurations of transformers hold a default for another loss
(router_aux_loss_coef = 0.001), from which nothing follows about pretraining.

Visual tokens are counted as any other: an expert works for whatever is sent to it.

Legend: E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from trimtab.losses import GlobalBatch
from trimtab.train.compute import ActivationCheckpointConfig
from trimtab.train.config import TrainConfig, TrainingConfig
from trimtab.train.data import DataConfig
from trimtab.train.evaluation import ValidationConfig
from trimtab.train.hf_model import HFModelConfig
from trimtab.train.model import Balancing
from trimtab.train.optim import LRSchedulerConfig, OptimizerConfig
from trimtab.train.parallelism import ParallelismConfig
from trimtab.train.vision_model import VisionLanguage, VisionTokens, VisionTowerConfig

# Of the released tokenizer: <|vision_start|>, <|image_pad|>, <|vision_end|>, <|video_pad|>.
_TOKENS = VisionTokens(start=151_652, image=151_655, end=151_653, video=151_656)
_TOWER = VisionTowerConfig(depth=27, dim=1152, hidden_dim=4304, num_heads=16, deepstack=(8, 16, 24))


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen3VLModelConfig(VisionLanguage, HFModelConfig):
    """Sizes of a Qwen3-VL-MoE model. All decoder layers have experts.

    Args:
        num_kv_heads: heads of keys and values; divides ``num_heads``.
        head_dim: width of a head.
        mrope_section: frequencies of a head that turn with time, height and width, half of ``head_dim`` together.
        vision: sizes of the vision tower.
        vision_tokens: ids of the tokens that stand for images; None takes the last four of the embedding, beyond
            those of the tokenizer.

    Raises:
        ValueError: sizes that are not positive or do not fit each other.
    """

    num_kv_heads: int
    head_dim: int
    mrope_section: tuple[int, int, int]
    vision: VisionTowerConfig
    vision_tokens: VisionTokens | None = None

    architecture: ClassVar[str] = "Qwen3VLMoeForConditionalGeneration"

    def __post_init__(self) -> None:
        """Validate."""
        HFModelConfig.__post_init__(self)
        self.check_vision()
        self.check_heads(self.num_kv_heads, self.head_dim)
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(
                f"mrope_section={self.mrope_section} must sum to half of head_dim={self.head_dim}; change "
                "model.mrope_section"
            )

    def hf_config(self, vocab_size: int) -> Any:
        """transformers' configuration."""
        from transformers import Qwen3VLMoeConfig

        text = {
            "vocab_size": vocab_size,
            "hidden_size": self.dim,
            "num_hidden_layers": self.num_layers,
            "intermediate_size": self.expert_hidden_dim,
            "moe_intermediate_size": self.expert_hidden_dim,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "output_router_logits": False,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_seq_len,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.rope_theta,
                "mrope_section": list(self.mrope_section),
                "mrope_interleaved": True,
            },
            "rms_norm_eps": self.norm_eps,
            "initializer_range": self.init_std,
            "tie_word_embeddings": self.tie_embeddings,
            "use_cache": False,
        }
        vision = self.vision.hf_config(self.dim, self.init_std)
        return Qwen3VLMoeConfig(
            text_config=text,
            vision_config={**vision, "deepstack_visual_indexes": list(self.vision.deepstack)},
            tie_word_embeddings=self.tie_embeddings,
            **self.token_fields(vocab_size),
        )


def qwen3_vl_balancing(*, coef: float = 8e-3) -> Balancing:
    """The global-batch loss of the language models' report, over visual tokens too.

    Args:
        coef: no report gives one.

    Reported: nothing.
    Chosen: global-batch loss, which the report of the language models names (Qwen3, arXiv:2505.09388, section 2);
        coefficient 0.008, of the paper that it cites (Qiu et al. 2025, arXiv:2501.11873, table 4).
    Source: Qwen Team 2025, Qwen3-VL, arXiv:2511.21631.
    """
    return Balancing(objectives=(GlobalBatch.Config(coef=coef),))


def qwen3_vl_debugmodel() -> TrainConfig:
    """Small model on drawn images with captions, and text; about a minute on two CPU cores."""
    return TrainConfig(
        model=Qwen3VLModelConfig(
            balancing=qwen3_vl_balancing(coef=1e-2),
            dim=96,
            num_layers=4,
            expert_hidden_dim=64,
            num_experts=16,
            top_k=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=24,
            mrope_section=(4, 4, 4),
            init_std=0.06,
            vision=VisionTowerConfig(
                depth=3, dim=64, hidden_dim=128, num_heads=4, patch_size=8, num_positions=64, deepstack=(0, 1)
            ),
        ),
        data=DataConfig(
            source="shapes",
            seq_len=128,
            microbatch_size=4,
            validation_fraction=0.02,
            max_validation_microbatches=8,
        ),
        training=TrainingConfig(steps=200, global_batch_size=16),
        optimizer=OptimizerConfig(lr=3e-3),
        validation=ValidationConfig(interval=50),
    )


def qwen3_vl_30b_a3b() -> TrainConfig:
    """Qwen3-VL-30B-A3B, 31.1 billion parameters, for 64 processes.

    Give data.tokenizer.name, data.source and data.images.enable. The report trains rows of 8,192 tokens, then
    32,768 and 262,144 (section 3); it gives neither batch size nor learning rate.
    """
    return _published(
        dim=2048,
        num_layers=48,
        expert_hidden_dim=768,
        num_heads=32,
        parallelism=ParallelismConfig(expert_parallel_degree=8),
    )


def qwen3_vl_235b_a22b() -> TrainConfig:
    """Qwen3-VL-235B-A22B, 235.7 billion parameters, for 256 processes. The rest is as in `qwen3_vl_30b_a3b`."""
    return _published(
        dim=4096,
        num_layers=94,
        expert_hidden_dim=1536,
        num_heads=64,
        parallelism=ParallelismConfig(expert_parallel_degree=32, pipeline_parallel_degree=4),
    )


def _published(
    *, dim: int, num_layers: int, expert_hidden_dim: int, num_heads: int, parallelism: ParallelismConfig
) -> TrainConfig:
    return TrainConfig(
        model=Qwen3VLModelConfig(
            balancing=qwen3_vl_balancing(),
            dim=dim,
            num_layers=num_layers,
            expert_hidden_dim=expert_hidden_dim,
            num_experts=128,
            top_k=8,
            num_heads=num_heads,
            num_kv_heads=4,
            head_dim=128,
            mrope_section=(24, 20, 20),
            rope_theta=5e6,
            max_seq_len=262_144,
            vocab_size=151_936,
            vision=_TOWER,
            vision_tokens=_TOKENS,
        ),
        data=DataConfig(seq_len=8192, microbatch_size=1),
        training=TrainingConfig(steps=10_000, global_batch_size=1024, mixed_precision="bfloat16"),
        parallelism=parallelism,
        optimizer=OptimizerConfig(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1),
        lr_scheduler=LRSchedulerConfig(warmup_steps=500, decay_steps=9_000, min_factor=0.1),
        activation_checkpoint=ActivationCheckpointConfig(mode="full"),
    )
