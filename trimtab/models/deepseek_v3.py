"""DeepSeek-V3: latent attention, sigmoid router with expert bias and groups, shared expert.

The model is transformers' own definition. Sizes are those of the report (DeepSeek-AI 2024, arXiv:2412.19437,
section 4.2) and of config.json beside the released weights.

Legend: E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import tyro

from trimtab.bias import Sign
from trimtab.losses import BatchWise, GlobalBatch, SequenceWise
from trimtab.train.compute import ActivationCheckpointConfig
from trimtab.train.config import TrainConfig, TrainingConfig
from trimtab.train.data import DataConfig
from trimtab.train.evaluation import ValidationConfig
from trimtab.train.hf_model import HFModelConfig, YarnConfig
from trimtab.train.logging import MetricsConfig
from trimtab.train.model import Balancing
from trimtab.train.mtp import MtpConfig
from trimtab.train.optim import LRSchedulerConfig, OptimizerConfig
from trimtab.train.parallelism import ParallelismConfig
from trimtab.train.recipes import change_at, released


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepseekV3ModelConfig(HFModelConfig):
    """Sizes of a DeepSeek-V3 model.

    Args:
        num_dense_layers: first layers, whose feed-forward is dense.
        hidden_dim: hidden width of dense feed-forwards.
        num_shared_experts: experts that every token passes.
        num_groups: groups that experts are divided into for selection.
        num_limited_groups: groups a token may choose experts from.
        route_scale: factor on the routing weights.
        q_lora_rank: rank of the queries' projection; None for a full one.
        kv_lora_rank: rank of the keys' and values' common projection.
        nope_head_dim: width of a head's part without positions.
        rope_head_dim: width of a head's part with positions.
        v_head_dim: width of a head's values.
        rope_scaling: stretches positions beyond those of pretraining; None leaves them.

    Raises:
        ValueError: sizes that are not positive or do not fit each other.
    """

    num_dense_layers: int = 1
    hidden_dim: int
    num_shared_experts: int = 1
    num_groups: int = 1
    num_limited_groups: int = 1
    route_scale: float = 1.0
    q_lora_rank: int | None = None
    kv_lora_rank: int
    nope_head_dim: int
    rope_head_dim: int
    v_head_dim: int
    rope_scaling: Annotated[YarnConfig | None, tyro.conf.AvoidSubcommands] = None

    architecture: ClassVar[str] = "DeepseekV3ForCausalLM"
    may_be_zero: ClassVar[frozenset[str]] = frozenset({"num_dense_layers"})
    #: Best experts of a group whose scores are its score.
    group_score_experts: ClassVar[int] = 2

    def __post_init__(self) -> None:
        """Validate."""
        HFModelConfig.__post_init__(self)
        self.check_dense_layers(self.num_dense_layers)
        if self.rope_head_dim % 2:
            raise ValueError(f"rope_head_dim={self.rope_head_dim} must be even; change model.rope_head_dim")
        self.check_groups(self.num_groups, self.num_limited_groups, least=self.group_score_experts)

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
        from transformers import DeepseekV3Config

        return DeepseekV3Config(**self.latent_settings(vocab_size), norm_topk_prob=True, num_mtp_layers=0)

    def latent_settings(self, vocab_size: int) -> dict[str, Any]:
        """What transformers calls the sizes of a model with latent attention.

        Args:
            vocab_size: rows of the embedding.
        """
        rope: dict[str, Any] = {"rope_type": "default"}
        if self.rope_scaling is not None:
            rope = self.rope_scaling.parameters()
        return {
            "vocab_size": vocab_size,
            "hidden_size": self.dim,
            "num_hidden_layers": self.num_layers,
            "first_k_dense_replace": self.num_dense_layers,
            "intermediate_size": self.hidden_dim,
            "moe_intermediate_size": self.expert_hidden_dim,
            "n_routed_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "n_shared_experts": self.num_shared_experts,
            "n_group": self.num_groups,
            "topk_group": self.num_limited_groups,
            "routed_scaling_factor": self.route_scale,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "q_lora_rank": self.q_lora_rank,
            "kv_lora_rank": self.kv_lora_rank,
            "qk_nope_head_dim": self.nope_head_dim,
            "qk_rope_head_dim": self.rope_head_dim,
            "v_head_dim": self.v_head_dim,
            "max_position_embeddings": self.max_seq_len,
            "rope_parameters": {**rope, "rope_theta": self.rope_theta},
            "rms_norm_eps": self.norm_eps,
            "initializer_range": self.init_std,
            "tie_word_embeddings": self.tie_embeddings,
            "use_cache": False,
            "bos_token_id": None,
            "eos_token_id": None,
        }


def deepseek_v3_balancing(
    *, coef: float = 1e-4, speed: float = 1e-3, freeze_step: int | None = None
) -> Balancing:
    """Expert biases moved by the sign rule, and a small sequence-wise loss on top-k of unbiased scores.

    Args:
        coef: alpha.
        speed: gamma.
        freeze_step: optimiser step, counted from 0, from which biases stay as they are; None: they always move.

    Reported: sequence-wise loss 1e-4 on the top-k of unbiased scores; bias rule sign, 1e-3 for 14.3 of 14.8
        trillion tokens, then 0.
    Chosen: nothing.
    Source: DeepSeek-AI 2024, DeepSeek-V3, arXiv:2412.19437, section 2.1.2 (equations 16 to 20) and section 4.2.
    """
    return Balancing(
        objectives=(SequenceWise.Config(coef=coef, assignments="unbiased"),),
        bias=Sign.Config(speed=speed, schedule=change_at(freeze_step, 0.0)),
    )


def deepseek_v3_debugmodel() -> TrainConfig:
    """Small model, sequence-wise loss and sign bias balancing as in the report; minutes on two CPU cores.

    alpha and gamma are 10 times the report's: its biases move for 14.8 trillion tokens, these for 200 steps. A
    step takes 16 rows, four at a time of one domain, so that every step holds text of several.
    """
    return _debugmodel(replace(deepseek_v3_balancing(coef=1e-3, speed=1e-2), bias_decay=0.2))


def deepseek_v3_debugmodel_batch_wise() -> TrainConfig:
    """The debug model with the batch-wise loss alone (section 4.5.3 of the report), no bias balancing.

    The batch is one forward of 16 rows, over all data ranks together: a batch-wise loss cannot see across
    accumulated microbatches.
    """
    balancing = Balancing(objectives=(BatchWise.Config(coef=1e-2),))
    return _debugmodel(balancing, microbatch_size=None, domain_pure=False)


def deepseek_v3_debugmodel_global_batch() -> TrainConfig:
    """The debug model with the global-batch loss alone, over 4 domain-pure microbatches, no bias balancing.

    Microbatches of one domain are where global and micro-batch balancing differ: only the former lets experts
    specialise (Qiu et al. 2025, arXiv:2501.11873).
    """
    return _debugmodel(Balancing(objectives=(GlobalBatch.Config(coef=1e-2),)))


def deepseek_v3_tiny() -> TrainConfig:
    """A model of seconds on the text shipped with trimtab, for tests and first looks."""
    return TrainConfig(
        model=DeepseekV3ModelConfig(
            balancing=deepseek_v3_balancing(coef=1e-3, speed=1e-2),
            dim=32,
            num_layers=3,
            hidden_dim=64,
            expert_hidden_dim=16,
            num_experts=8,
            top_k=2,
            num_heads=2,
            kv_lora_rank=16,
            nope_head_dim=8,
            rope_head_dim=8,
            v_head_dim=8,
            max_seq_len=256,
        ),
        data=DataConfig(seq_len=32, microbatch_size=4, source="fixed", validation_fraction=0.1),
        training=TrainingConfig(steps=20),
        optimizer=OptimizerConfig(lr=1e-2),
        metrics=MetricsConfig(log_interval=5),
        validation=ValidationConfig(interval=10),
    )


def deepseek_v3_671b() -> TrainConfig:
    """The model of the report with its settings (sections 3.2 and 4.2), for 2,048 processes.

    671 billion parameters, and 11.6 billion of the layer that predicts one token further ahead, whose loss weighs
    0.3 for 10 trillion tokens and 0.1 after. The report raises the batch from 3,072 rows during the first 469
    billion tokens, lets the learning rate fall along a cosine, and runs DualPipe, of which DualPipeV is one half.
    It recomputes norms and the keys' and values' projections; selective checkpointing keeps the latter. Text and
    tokenizer are not published: give data.source and data.tokenizer.name.
    """
    global_batch_size, seq_len = 15_360, 4096
    trillion = 1e12 / (global_batch_size * seq_len)  # in steps
    return TrainConfig(
        model=DeepseekV3ModelConfig(
            balancing=deepseek_v3_balancing(freeze_step=round(14.3 * trillion)),
            dim=7168,
            num_layers=61,
            num_dense_layers=3,
            hidden_dim=18432,
            expert_hidden_dim=2048,
            num_experts=256,
            top_k=8,
            num_groups=8,
            num_limited_groups=4,
            route_scale=2.5,
            num_heads=128,
            q_lora_rank=1536,
            kv_lora_rank=512,
            nope_head_dim=128,
            rope_head_dim=64,
            v_head_dim=128,
            init_std=0.006,
            vocab_size=129_280,
            mtp=MtpConfig(coef=0.3, schedule=change_at(round(10 * trillion), 1 / 3)),
        ),
        data=DataConfig(seq_len=seq_len, microbatch_size=1),
        training=TrainingConfig(
            steps=round(14.8 * trillion), global_batch_size=global_batch_size, mixed_precision="bfloat16"
        ),
        parallelism=ParallelismConfig(
            expert_parallel_degree=64, pipeline_parallel_degree=16, pipeline_parallel_schedule="DualPipeV"
        ),
        optimizer=OptimizerConfig(lr=2.2e-4, betas=(0.9, 0.95), weight_decay=0.1),
        lr_scheduler=LRSchedulerConfig(
            warmup_steps=2000, decay_steps=round(4.8 * trillion), min_factor=7.3e-6 / 2.2e-4
        ),
        activation_checkpoint=ActivationCheckpointConfig(mode="selective"),
    )


def deepseek_v3_671b_released() -> TrainConfig:
    """The same sizes with the positions of the released weights, to go on from them: set checkpoint.initial.

    Positions were stretched to 163,840 in further training (section 4.3 of the report). Biases stay as they are.
    """
    return released(
        deepseek_v3_671b(),
        balancing=deepseek_v3_balancing(freeze_step=0),
        mtp=MtpConfig(coef=0.1),
        max_seq_len=163_840,
        rope_scaling=YarnConfig(factor=40.0, mscale=1.0, mscale_all_dim=1.0),
    )


def _debugmodel(
    balancing: Balancing, *, microbatch_size: int | None = 4, domain_pure: bool = True
) -> TrainConfig:
    global_batch_size = 16
    return TrainConfig(
        model=DeepseekV3ModelConfig(
            balancing=balancing,
            dim=128,
            num_layers=6,
            hidden_dim=384,
            expert_hidden_dim=96,
            num_experts=16,
            top_k=2,
            num_groups=4,
            num_limited_groups=2,
            num_heads=4,
            kv_lora_rank=64,
            nope_head_dim=16,
            rope_head_dim=16,
            v_head_dim=32,
            init_std=0.06,
        ),
        data=DataConfig(
            seq_len=256,
            microbatch_size=microbatch_size,
            domain_pure=domain_pure,
            max_validation_microbatches=64 // (microbatch_size or global_batch_size),
        ),
        training=TrainingConfig(steps=200, global_batch_size=global_batch_size),
        optimizer=OptimizerConfig(lr=3e-3),
    )
