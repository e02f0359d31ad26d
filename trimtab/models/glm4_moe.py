"""GLM-4.5: grouped-query attention with partial rotary positions, sigmoid router with expert bias, shared expert.

The model is transformers' own definition. Sizes are those of the report (GLM-4.5 Team 2025, arXiv:2508.06471,
table 1) and of config.json beside the released weights. They were trained with the Muon optimiser, and here are
with AdamW.

Legend: E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from trimtab.bias import Sign
from trimtab.losses import SequenceWise
from trimtab.train.compute import ActivationCheckpointConfig
from trimtab.train.config import TrainConfig, TrainingConfig
from trimtab.train.data import DataConfig
from trimtab.train.hf_model import HFModelConfig
from trimtab.train.model import Balancing
from trimtab.train.mtp import MtpConfig
from trimtab.train.optim import LRSchedulerConfig, OptimizerConfig
from trimtab.train.parallelism import ParallelismConfig
from trimtab.train.recipes import change_at, released, small_run, steps_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Glm4MoeModelConfig(HFModelConfig):
    """Sizes of a GLM-4.5 model.

    Args:
        num_dense_layers: first layers, whose feed-forward is dense.
        hidden_dim: hidden width of dense feed-forwards.
        num_shared_experts: experts that every token passes.
        num_groups: groups that experts are divided into for selection.
        num_limited_groups: groups a token may choose experts from.
        route_scale: factor on the routing weights.
        num_kv_heads: heads of keys and values; divides ``num_heads``.
        head_dim: width of a head.
        rotary_share: part of a head's width that is turned by positions, in (0, 1].
        qk_norm: normalise queries and keys of each head.
        attention_bias: biases in the projections of queries, keys and values.

    Raises:
        ValueError: sizes that are not positive or do not fit each other.
    """

    num_dense_layers: int = 1
    hidden_dim: int
    num_shared_experts: int = 1
    num_groups: int = 1
    num_limited_groups: int = 1
    route_scale: float = 1.0
    num_kv_heads: int
    head_dim: int
    rotary_share: float = 0.5
    qk_norm: bool = False
    attention_bias: bool = True

    architecture: ClassVar[str] = "Glm4MoeForCausalLM"
    may_be_zero: ClassVar[frozenset[str]] = frozenset({"num_dense_layers"})
    tp_divides: ClassVar[tuple[str, ...]] = ("num_heads", "num_kv_heads")

    def __post_init__(self) -> None:
        """Validate."""
        HFModelConfig.__post_init__(self)
        self.check_dense_layers(self.num_dense_layers)
        self.check_groups(self.num_groups, self.num_limited_groups, least=2)
        self.check_heads(self.num_kv_heads, self.head_dim)
        turned = self.head_dim * self.rotary_share
        if not 0 < self.rotary_share <= 1 or turned % 2:
            raise ValueError(
                f"rotary_share={self.rotary_share} must be in (0, 1] and turn an even part of head_dim="
                f"{self.head_dim}; set model.rotary_share, for example to 0.5"
            )

    @property
    def grouped(self) -> bool:
        """Whether a token reaches only some groups."""
        return self.num_limited_groups < self.num_groups

    @property
    def has_expert_bias(self) -> bool:
        """The family's routers have one."""
        return True

    def hf_config(self, vocab_size: int) -> Any:
        """transformers' configuration."""
        from transformers import Glm4MoeConfig

        return Glm4MoeConfig(
            vocab_size=vocab_size,
            hidden_size=self.dim,
            num_hidden_layers=self.num_layers,
            first_k_dense_replace=self.num_dense_layers,
            intermediate_size=self.hidden_dim,
            moe_intermediate_size=self.expert_hidden_dim,
            n_routed_experts=self.num_experts,
            num_experts_per_tok=self.top_k,
            n_shared_experts=self.num_shared_experts,
            n_group=self.num_groups,
            topk_group=self.num_limited_groups,
            norm_topk_prob=True,
            routed_scaling_factor=self.route_scale,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,  # type: ignore[call-arg]
            use_qk_norm=self.qk_norm,
            attention_bias=self.attention_bias,
            max_position_embeddings=self.max_seq_len,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": self.rope_theta,
                "partial_rotary_factor": self.rotary_share,
            },
            rms_norm_eps=self.norm_eps,
            initializer_range=self.init_std,
            tie_word_embeddings=self.tie_embeddings,
            num_mtp_layers=0,
            use_cache=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )


def glm4_moe_balancing(
    *, coef: float = 1e-4, speed: float = 1e-3, freeze_step: int | None = None
) -> Balancing:
    """Expert biases moved by the sign rule, and a small sequence-wise loss.

    Args:
        coef: weight of the sequence-wise loss.
        speed: of the biases.
        freeze_step: optimiser step, counted from 0, from which biases stay as they are; None: they always move.

    Reported: sequence-wise loss 1e-4; bias rule of loss-free balancing (arXiv:2408.15664), 1e-3 for 15 trillion
        tokens, then 0.
    Chosen: what the load counts, the top-k of unbiased scores, as in DeepSeek-V3 (arXiv:2412.19437, equation 18).
    Source: GLM-4.5 Team 2025, GLM-4.5, arXiv:2508.06471, sections 2.1 and 2.4.
    """
    return Balancing(
        objectives=(SequenceWise.Config(coef=coef, assignments="unbiased"),),
        bias=Sign.Config(speed=speed, schedule=change_at(freeze_step, 0.0)),
    )


def glm4_moe_debugmodel() -> TrainConfig:
    """Small model, sequence-wise loss and sign bias balancing as in the report; a minute on two CPU cores.

    Coefficient and speed are 10 times the report's, whose biases move for trillions of tokens.
    """
    return small_run(
        Glm4MoeModelConfig(
            balancing=replace(glm4_moe_balancing(coef=1e-3, speed=1e-2), bias_decay=0.2),
            dim=128,
            num_layers=4,
            hidden_dim=256,
            expert_hidden_dim=64,
            num_experts=16,
            top_k=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            qk_norm=True,
            init_std=0.06,
        )
    )


def glm4_5_355b() -> TrainConfig:
    """GLM-4.5 with the settings of the report (section 2.4), for 1,024 processes.

    A further layer predicts one more token ahead; its loss weighs 0.3 for 15 trillion tokens and 0.1 after. The
    report raises the batch from 16 million tokens during the first 500 billion tokens, and lets the learning rate
    fall along a cosine. It does not say how processes divided the work. Text is not published: give data.source and
    data.tokenizer.name.
    """
    return _pretraining(
        _sizes(
            dim=5120,
            num_layers=92,
            num_dense_layers=3,
            hidden_dim=12_288,
            expert_hidden_dim=1536,
            num_experts=160,
            route_scale=2.5,
            qk_norm=True,
        ),
        ParallelismConfig(
            expert_parallel_degree=16, pipeline_parallel_degree=8, pipeline_parallel_schedule="ZBVZeroBubble"
        ),
    )


def glm4_5_air_106b() -> TrainConfig:
    """GLM-4.5-Air with the settings of the report (section 2.4), for 512 processes; as `glm4_5_355b`."""
    return _pretraining(
        _sizes(
            dim=4096,
            num_layers=46,
            num_dense_layers=1,
            hidden_dim=10_944,
            expert_hidden_dim=1408,
            num_experts=128,
            route_scale=1.0,
        ),
        ParallelismConfig(
            expert_parallel_degree=16, pipeline_parallel_degree=4, pipeline_parallel_schedule="ZBVZeroBubble"
        ),
    )


def glm4_5_355b_released() -> TrainConfig:
    """GLM-4.5 with the positions of the released weights, to go on from them: set checkpoint.initial."""
    return released(glm4_5_355b(), **_RELEASED)


def glm4_5_air_106b_released() -> TrainConfig:
    """GLM-4.5-Air with the positions of the released weights, to go on from them: set checkpoint.initial."""
    return released(glm4_5_air_106b(), **_RELEASED)


# The base of positions was raised in further training (section 2.4 of the report). Biases stay as they are.
_RELEASED: dict[str, Any] = {
    "balancing": glm4_moe_balancing(freeze_step=0),
    "mtp": MtpConfig(coef=0.1),
    "max_seq_len": 131_072,
    "rope_theta": 1_000_000.0,
}
_GLOBAL_BATCH_SIZE, _SEQ_LEN = 16_384, 4096  # 64 million tokens


def _steps(num_tokens: float) -> int:
    return steps_of(num_tokens, global_batch_size=_GLOBAL_BATCH_SIZE, seq_len=_SEQ_LEN)


def _sizes(**sizes: Any) -> Glm4MoeModelConfig:
    return Glm4MoeModelConfig(
        balancing=glm4_moe_balancing(freeze_step=_steps(15e12)),
        top_k=8,
        num_heads=96,
        num_kv_heads=8,
        head_dim=128,
        norm_eps=1e-5,
        vocab_size=151_552,
        mtp=MtpConfig(coef=0.3, schedule=change_at(_steps(15e12), 1 / 3)),
        **sizes,
    )


def _pretraining(model: Glm4MoeModelConfig, parallelism: ParallelismConfig) -> TrainConfig:
    return TrainConfig(
        model=model,
        data=DataConfig(seq_len=_SEQ_LEN, microbatch_size=1),
        training=TrainingConfig(
            steps=_steps(22e12), global_batch_size=_GLOBAL_BATCH_SIZE, mixed_precision="bfloat16"
        ),
        parallelism=parallelism,
        optimizer=OptimizerConfig(lr=2.5e-4, betas=(0.9, 0.95), weight_decay=0.1),
        lr_scheduler=LRSchedulerConfig(warmup_steps=2000, decay_steps=_steps(20e12), min_factor=0.1),
        activation_checkpoint=ActivationCheckpointConfig(mode="selective"),
    )
