"""DeepSeek-V2: latent attention, softmax router limited to experts of a few devices, two shared experts.

The model is transformers' own definition. Sizes are those of the report (DeepSeek-AI 2024, arXiv:2405.04434,
section 3.1.2 and appendix B) and of config.json beside the released weights.

Legend: E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from trimtab.device_losses import CommunicationLevel, DeviceLevel
from trimtab.losses import SequenceWise
from trimtab.models.deepseek_v3 import DeepseekV3ModelConfig
from trimtab.train.compute import ActivationCheckpointConfig
from trimtab.train.config import TrainConfig, TrainingConfig
from trimtab.train.data import DataConfig
from trimtab.train.hf_model import YarnConfig
from trimtab.train.model import Balancing
from trimtab.train.optim import LRSchedulerConfig, OptimizerConfig
from trimtab.train.parallelism import ParallelismConfig
from trimtab.train.recipes import released, small_run, steps_of


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepseekV2ModelConfig(DeepseekV3ModelConfig):
    """Sizes of a DeepSeek-V2 model: those of `DeepseekV3ModelConfig`, with another router.

    Scores are a softmax, a group's score is that of its best expert, weights are not normalised, and there is no
    expert bias.

    Raises:
        ValueError: sizes that are not positive or do not fit each other.
    """

    architecture: ClassVar[str] = "DeepseekV2ForCausalLM"
    group_score_experts: ClassVar[int] = 1

    @property
    def has_expert_bias(self) -> bool:
        """The family's routers have none."""
        return False

    def hf_config(self, vocab_size: int) -> Any:
        """transformers' configuration."""
        from transformers import DeepseekV2Config

        return DeepseekV2Config(
            **self.latent_settings(vocab_size),
            topk_method="group_limited_greedy" if self.grouped else "greedy",
            norm_topk_prob=False,
        )


def deepseek_v2_balancing(
    *,
    expert_coef: float = 0.003,
    device_coef: float = 0.05,
    communication_coef: float = 0.02,
    num_devices: int = 8,
    max_devices_per_token: int = 3,
) -> Balancing:
    """The three losses of the report over single sequences: of experts, of devices, of what is sent to devices.

    They count what the router executes. The report drops tokens beyond a device's capacity in training; nothing
    is dropped here.

    Args:
        expert_coef: alpha_1.
        device_coef: alpha_2.
        communication_coef: alpha_3.
        num_devices: D, devices that the experts of a layer lie on in equal blocks: groups of the router.
        max_devices_per_token: M, devices a token may reach.

    Reported: sequence-wise loss 0.003; device-level loss 0.05 and communication-level loss 0.02, over sequences
        too, with 8 devices, 3 for a token.
    Chosen: nothing.
    Source: DeepSeek-AI 2024, DeepSeek-V2, arXiv:2405.04434, section 2.2.3 (equations 23 to 31) and section 3.1.2.
    """
    return Balancing(
        objectives=(
            SequenceWise.Config(coef=expert_coef),
            DeviceLevel.Config(coef=device_coef, num_devices=num_devices),
            CommunicationLevel.Config(
                coef=communication_coef, num_devices=num_devices, max_devices_per_token=max_devices_per_token
            ),
        )
    )


def deepseek_v2_lite_balancing(*, coef: float = 0.001) -> Balancing:
    """The sequence-wise loss alone, because the experts of a layer lie on one device.

    Args:
        coef: alpha_1.

    Reported: sequence-wise loss 0.001.
    Chosen: nothing.
    Source: DeepSeek-AI 2024, DeepSeek-V2, arXiv:2405.04434, appendix B.1.
    """
    return Balancing(objectives=(SequenceWise.Config(coef=coef),))


def deepseek_v2_debugmodel() -> TrainConfig:
    """Small model with the three losses of the report, on 4 devices, 2 for a token; a minute on two CPU cores."""
    return small_run(
        DeepseekV2ModelConfig(
            balancing=deepseek_v2_balancing(num_devices=4, max_devices_per_token=2),
            dim=128,
            num_layers=4,
            hidden_dim=256,
            expert_hidden_dim=64,
            num_experts=16,
            top_k=2,
            num_groups=4,
            num_limited_groups=2,
            num_heads=4,
            kv_lora_rank=32,
            nope_head_dim=16,
            rope_head_dim=16,
            v_head_dim=32,
            init_std=0.06,
        )
    )


def deepseek_v2_236b() -> TrainConfig:
    """The model of the report with its settings (section 3.1), for 1,024 processes.

    The report raises the batch from 2,304 rows during the first 225 billion tokens and lowers the learning rate
    in two steps, to 0.316 of it after 60 % of the tokens and to 0.1 after 90 %. Text and tokenizer are not
    published: give data.source and data.tokenizer.name.
    """
    global_batch_size, seq_len = 9216, 4096
    steps = steps_of(8.1e12, global_batch_size=global_batch_size, seq_len=seq_len)
    return TrainConfig(
        model=DeepseekV2ModelConfig(
            balancing=deepseek_v2_balancing(),
            dim=5120,
            num_layers=60,
            num_dense_layers=1,
            hidden_dim=12_288,
            expert_hidden_dim=1536,
            num_experts=160,
            top_k=6,
            num_shared_experts=2,
            num_groups=8,
            num_limited_groups=3,
            route_scale=16.0,
            num_heads=128,
            q_lora_rank=1536,
            kv_lora_rank=512,
            nope_head_dim=128,
            rope_head_dim=64,
            v_head_dim=128,
            init_std=0.006,
            vocab_size=102_400,
        ),
        data=DataConfig(seq_len=seq_len, microbatch_size=1),
        training=TrainingConfig(steps=steps, global_batch_size=global_batch_size, mixed_precision="bfloat16"),
        parallelism=ParallelismConfig(
            expert_parallel_degree=8, pipeline_parallel_degree=16, pipeline_parallel_schedule="ZBVZeroBubble"
        ),
        optimizer=OptimizerConfig(lr=2.4e-4, betas=(0.9, 0.95), weight_decay=0.1),
        lr_scheduler=LRSchedulerConfig(warmup_steps=2000, decay_steps=round(0.4 * steps), min_factor=0.1),
    )


def deepseek_v2_236b_released() -> TrainConfig:
    """The same sizes with the positions of the released weights, to go on from them: set checkpoint.initial.

    Positions were stretched to 163,840 in further training (section 3.1.4 of the report).
    """
    return released(deepseek_v2_236b(), max_seq_len=163_840, rope_scaling=_RELEASED_ROPE)


def deepseek_v2_lite() -> TrainConfig:
    """DeepSeek-V2-Lite, 16 billion parameters, with its settings (appendix B.1 of the report), for 128 processes.

    The report divides layers among processes and lowers the learning rate in two steps. Text and tokenizer are
    not published: give data.source and data.tokenizer.name.
    """
    global_batch_size, seq_len = 4608, 4096
    steps = steps_of(5.7e12, global_batch_size=global_batch_size, seq_len=seq_len)
    return TrainConfig(
        model=DeepseekV2ModelConfig(
            balancing=deepseek_v2_lite_balancing(),
            dim=2048,
            num_layers=27,
            num_dense_layers=1,
            hidden_dim=10_944,
            expert_hidden_dim=1408,
            num_experts=64,
            top_k=6,
            num_shared_experts=2,
            num_heads=16,
            kv_lora_rank=512,
            nope_head_dim=128,
            rope_head_dim=64,
            v_head_dim=128,
            init_std=0.006,
            vocab_size=102_400,
        ),
        data=DataConfig(seq_len=seq_len, microbatch_size=4),
        training=TrainingConfig(steps=steps, global_batch_size=global_batch_size, mixed_precision="bfloat16"),
        optimizer=OptimizerConfig(lr=4.2e-4, betas=(0.9, 0.95), weight_decay=0.1),
        lr_scheduler=LRSchedulerConfig(warmup_steps=2000, decay_steps=round(0.2 * steps), min_factor=0.1),
        activation_checkpoint=ActivationCheckpointConfig(mode="selective"),
    )


def deepseek_v2_lite_released() -> TrainConfig:
    """The same sizes with the positions of the released weights, to go on from them: set checkpoint.initial."""
    return released(deepseek_v2_lite(), max_seq_len=163_840, rope_scaling=_RELEASED_ROPE)


_RELEASED_ROPE = YarnConfig(factor=40.0, mscale=0.707, mscale_all_dim=0.707)
