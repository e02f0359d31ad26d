"""Qwen3.5-MoE: gated delta networks and full attention in turn, a shared expert, and a vision tower.

The model is transformers' own definition, with or without the tower. No report was found that says how its experts
are balanced: neither objective nor coefficient. The preset is the global-batch loss that the Qwen team names for an
earlier generation (Qwen3: arXiv:2505.09388, section 2), with the coefficient of the paper cited there (Qiu et al.
2025, arXiv:2501.11873: 0.008). Configurations of transformers hold a default for another loss
(router_aux_loss_coef = 0.001), from which nothing follows about pretraining.

Visual tokens are counted as any other: an expert works for whatever is sent to it.

In plain PyTorch, gated delta networks of transformers do not see where a document of a row ends; here each document
is handed to them by itself (`trimtab.integrations.linear_attention`).

Legend: E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from trimtab.integrations.linear_attention import separate_documents
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
_TOKENS = VisionTokens(start=248_053, image=248_056, end=248_054, video=248_057)
_TOWER = VisionTowerConfig(depth=27, dim=1152, hidden_dim=4304, num_heads=16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen35TextModelConfig(HFModelConfig):
    """Sizes of a Qwen3.5-MoE model for text. All layers have experts and one shared expert.

    Args:
        num_kv_heads: heads of keys and values of full attention; divides ``num_heads``.
        head_dim: width of a head of full attention.
        rotary_share: part of a head that turns with positions.
        mrope_section: frequencies that turn with time, height and width of an image: ``head_dim * rotary_share
            / 2`` together.
        attention_interval: every so many layers attention is full; the others are gated delta networks.
        num_linear_key_heads: heads of their queries and keys.
        num_linear_value_heads: heads of their values.
        linear_head_dim: width of either.
        shared_hidden_dim: hidden width of the shared expert.

    Raises:
        ValueError: sizes that are not positive or do not fit each other.
    """

    num_kv_heads: int
    head_dim: int
    rotary_share: float = 0.25
    mrope_section: tuple[int, int, int]
    attention_interval: int = 4
    num_linear_key_heads: int
    num_linear_value_heads: int
    linear_head_dim: int = 128
    shared_hidden_dim: int

    architecture: ClassVar[str] = "Qwen3_5MoeForCausalLM"
    tp_divides: ClassVar[tuple[str, ...]] = ()
    refused_axes: ClassVar[Mapping[str, str]] = {
        axis: "gated delta networks pass a state along the whole sequence" for axis in ("tp", "cp")
    }

    def __post_init__(self) -> None:
        """Validate."""
        HFModelConfig.__post_init__(self)
        self.check_heads(self.num_kv_heads, self.head_dim)
        if self.num_linear_value_heads % self.num_linear_key_heads:
            raise ValueError(
                f"num_linear_key_heads={self.num_linear_key_heads} must divide num_linear_value_heads="
                f"{self.num_linear_value_heads}; change one of them"
            )
        if 2 * sum(self.mrope_section) != round(self.head_dim * self.rotary_share):
            raise ValueError(
                f"mrope_section={self.mrope_section} must sum to half of head_dim * rotary_share = "
                f"{self.head_dim * self.rotary_share:g}; change model.mrope_section"
            )

    def check_rows(self, *, packing: bool, compiled: bool) -> None:
        """Packed rows need shapes that change with every batch, which compiled layers do not have.

        Raises:
            ValueError: rows are packed and layers compiled.
        """
        if packing and compiled:
            raise ValueError(
                "compile.enable with data.packing: gated delta networks are given each document of a row by "
                "itself, in shapes that change with every batch; set data.packing to False, or leave out "
                "compile.enable"
            )

    def hf_config(self, vocab_size: int) -> Any:
        """transformers' configuration."""
        from transformers import Qwen3_5MoeTextConfig

        return Qwen3_5MoeTextConfig(**self.text_fields(vocab_size))

    def text_fields(self, vocab_size: int) -> dict[str, Any]:
        """Fields of transformers' configuration of the language model."""
        return {
            "vocab_size": vocab_size,
            "hidden_size": self.dim,
            "num_hidden_layers": self.num_layers,
            "moe_intermediate_size": self.expert_hidden_dim,
            "shared_expert_intermediate_size": self.shared_hidden_dim,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "output_router_logits": False,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "layer_types": [
                "linear_attention" if (layer + 1) % self.attention_interval else "full_attention"
                for layer in range(self.num_layers)
            ],
            "linear_num_key_heads": self.num_linear_key_heads,
            "linear_num_value_heads": self.num_linear_value_heads,
            "linear_key_head_dim": self.linear_head_dim,
            "linear_value_head_dim": self.linear_head_dim,
            "max_position_embeddings": self.max_seq_len,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.rope_theta,
                "partial_rotary_factor": self.rotary_share,
                "mrope_section": list(self.mrope_section),
                "mrope_interleaved": True,
            },
            "rms_norm_eps": self.norm_eps,
            "initializer_range": self.init_std,
            "tie_word_embeddings": self.tie_embeddings,
            "use_cache": False,
        }

    def build(self, *, vocab_size: int, seq_len: int) -> nn.Module:
        """transformers' own model, which keeps documents of a row apart."""
        model = HFModelConfig.build(self, vocab_size=vocab_size, seq_len=seq_len)
        separate_documents(model)
        return model


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen35ModelConfig(VisionLanguage, Qwen35TextModelConfig):
    """Sizes of a Qwen3.5-MoE model for images and text.

    Args:
        vision: sizes of the vision tower.
        vision_tokens: ids of the tokens that stand for images; None takes the last four of the embedding, beyond
            those of the tokenizer.

    Raises:
        ValueError: sizes that are not positive or do not fit each other.
    """

    vision: VisionTowerConfig
    vision_tokens: VisionTokens | None = None

    architecture: ClassVar[str] = "Qwen3_5MoeForConditionalGeneration"

    def __post_init__(self) -> None:
        """Validate."""
        Qwen35TextModelConfig.__post_init__(self)
        if self.vision.deepstack:
            raise ValueError(
                f"deepstack={self.vision.deepstack}: the family adds features of images to the embeddings alone; "
                "leave out model.vision.deepstack"
            )

    def hf_config(self, vocab_size: int) -> Any:
        """transformers' configuration."""
        from transformers import Qwen3_5MoeConfig

        config = Qwen3_5MoeConfig(
            text_config=self.text_fields(vocab_size),
            vision_config=self.vision.hf_config(self.dim, self.init_std),
            tie_word_embeddings=self.tie_embeddings,
            **self.token_fields(vocab_size),
        )
        # The whole model's rules for initial weights look for it here, and their class lacks it.
        config.initializer_range = self.init_std
        return config


def qwen3_5_balancing(*, coef: float = 8e-3) -> Balancing:
    """The global-batch loss of the generation before, over visual tokens too.

    Args:
        coef: no report gives one.

    Reported: nothing.
    Chosen: global-batch loss, which the report of an earlier generation names (Qwen3, arXiv:2505.09388, section 2);
        coefficient 0.008, of the paper that it cites (Qiu et al. 2025, arXiv:2501.11873, table 4).
    Source: none was found that describes training, only the released weights and their configuration.
    """
    return Balancing(objectives=(GlobalBatch.Config(coef=coef),))


def qwen3_5_debugmodel() -> TrainConfig:
    """Small model on drawn images with captions, and text; a minute or two on two CPU cores."""
    model = Qwen35ModelConfig(
        **_debug_sizes(),
        vision=VisionTowerConfig(
            depth=3, dim=64, hidden_dim=128, num_heads=4, patch_size=8, num_positions=64
        ),
    )
    return TrainConfig(
        model=model,
        data=DataConfig(
            source="shapes",
            seq_len=128,
            microbatch_size=4,
            validation_fraction=0.02,
            max_validation_microbatches=8,
        ),
        training=TrainingConfig(steps=100, global_batch_size=16),
        optimizer=OptimizerConfig(lr=3e-3),
        validation=ValidationConfig(interval=50),
    )


def qwen3_5_debugmodel_text() -> TrainConfig:
    """The small model without its vision tower, on text of four domains."""
    return TrainConfig(
        model=Qwen35TextModelConfig(**_debug_sizes()),
        data=DataConfig(seq_len=128, microbatch_size=4, domain_pure=True, max_validation_microbatches=16),
        training=TrainingConfig(steps=200, global_batch_size=16),
        optimizer=OptimizerConfig(lr=3e-3),
    )


def qwen3_5_35b_a3b() -> TrainConfig:
    """Qwen3.5-35B-A3B, 35.1 billion parameters, for 64 processes.

    Without the layer of multi-token prediction that is released with it (0.8 billion more). Give
    data.tokenizer.name, data.source and data.images.enable. Batch size and learning rate are not published.
    """
    return _published(
        dim=2048,
        num_layers=40,
        expert_hidden_dim=512,
        num_experts=256,
        top_k=8,
        num_heads=16,
        num_linear_value_heads=32,
        parallelism=ParallelismConfig(expert_parallel_degree=16),
    )


def qwen3_5_397b_a17b() -> TrainConfig:
    """Qwen3.5-397B-A17B, 396.8 billion parameters, for 512 processes. The rest is as in `qwen3_5_35b_a3b`."""
    return _published(
        dim=4096,
        num_layers=60,
        expert_hidden_dim=1024,
        num_experts=512,
        top_k=10,
        num_heads=32,
        num_linear_value_heads=64,
        parallelism=ParallelismConfig(expert_parallel_degree=64, pipeline_parallel_degree=4),
    )


def _debug_sizes() -> dict[str, Any]:
    return {
        "balancing": qwen3_5_balancing(coef=1e-2),
        "dim": 96,
        "num_layers": 4,
        "expert_hidden_dim": 64,
        "shared_hidden_dim": 64,
        "num_experts": 16,
        "top_k": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 24,
        "rotary_share": 0.5,
        "mrope_section": (2, 2, 2),
        "num_linear_key_heads": 2,
        "num_linear_value_heads": 4,
        "linear_head_dim": 16,
        "init_std": 0.06,
    }


def _published(*, parallelism: ParallelismConfig, **sizes: Any) -> TrainConfig:
    return TrainConfig(
        model=Qwen35ModelConfig(
            balancing=qwen3_5_balancing(),
            **sizes,
            shared_hidden_dim=sizes["expert_hidden_dim"],
            num_kv_heads=2,
            head_dim=256,
            mrope_section=(11, 11, 10),
            num_linear_key_heads=16,
            rope_theta=1e7,
            max_seq_len=262_144,
            vocab_size=248_320,
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
