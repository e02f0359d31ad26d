"""Kimi K2 and Moonlight: DeepSeek-V3's architecture with more experts and without groups.

The model is transformers' DeepSeek-V3. Sizes are those of the reports (Kimi Team 2025, arXiv:2507.20534,
section 2.3; Liu et al. 2025, arXiv:2502.16982, section 3.3) and of config.json beside the released weights.
Both were trained with the Muon optimiser, and here are with AdamW.

Legend: E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import replace

from trimtab.bias import CentredSign
from trimtab.models.deepseek_v3 import DeepseekV3ModelConfig
from trimtab.train.compute import ActivationCheckpointConfig
from trimtab.train.config import TrainConfig, TrainingConfig
from trimtab.train.data import DataConfig
from trimtab.train.hf_model import YarnConfig
from trimtab.train.model import Balancing
from trimtab.train.optim import LRSchedulerConfig, OptimizerConfig
from trimtab.train.parallelism import ParallelismConfig
from trimtab.train.recipes import change_at, released, small_run, steps_of


def moonlight_balancing(*, speed: float = 1e-3, freeze_step: int | None = None) -> Balancing:
    """Expert biases alone, moved by the sign rule without its mean over experts.

    Args:
        speed: u.
        freeze_step: optimiser step, counted from 0, from which biases stay as they are; None: they always move.

    Reported: bias rule sign minus its mean, 1e-3 for 5.2 of 5.7 trillion tokens, then 0.
    Chosen: nothing. The report names no balance loss, and there is none here.
    Source: Liu et al. 2025, Moonlight, arXiv:2502.16982, section 3.3 and appendix C.
    """
    return Balancing(bias=CentredSign.Config(speed=speed, schedule=change_at(freeze_step, 0.0)))


def kimi_k2_balancing(*, speed: float = 1e-3, freeze_step: int | None = None) -> Balancing:
    """Expert biases alone, as in Moonlight by the same laboratory.

    Args:
        speed: u.
        freeze_step: optimiser step, counted from 0, from which biases stay as they are; None: they always move.

    Reported: nothing. The report says that the architecture follows DeepSeek-V3, whose routers have expert
        biases.
    Chosen: bias rule and speed of Moonlight, arXiv:2502.16982, section 3.3 and appendix C.
    Source: Kimi Team 2025, Kimi K2, arXiv:2507.20534, section 2.3.
    """
    return moonlight_balancing(speed=speed, freeze_step=freeze_step)


def kimi_k2_debugmodel() -> TrainConfig:
    """Small model without groups, bias balancing alone; a minute on two CPU cores.

    The speed is 10 times Moonlight's, whose biases move for trillions of tokens, and falls at the end.
    """
    return small_run(
        DeepseekV3ModelConfig(
            balancing=replace(kimi_k2_balancing(speed=1e-2), bias_decay=0.2),
            dim=128,
            num_layers=4,
            hidden_dim=256,
            expert_hidden_dim=64,
            num_experts=24,
            top_k=2,
            route_scale=1.4,
            num_heads=4,
            kv_lora_rank=32,
            nope_head_dim=16,
            rope_head_dim=16,
            v_head_dim=32,
            init_std=0.06,
            rope_theta=50_000.0,
        )
    )


def kimi_k2_1t() -> TrainConfig:
    """Kimi K2 with the settings of the report (sections 2.4 and 2.5), for 1,024 processes.

    Its shapes make 1,026 billion parameters, as the released weights have; the report's 1.04 trillion are those
    of one more layer. The learning rate falls along a cosine there. Text is not published: give data.source and
    data.tokenizer.name.
    """
    global_batch_size, seq_len = 16_384, 4096  # 67 million tokens
    trillion = 1e12 / (global_batch_size * seq_len)  # in steps
    return TrainConfig(
        model=DeepseekV3ModelConfig(
            balancing=kimi_k2_balancing(),
            dim=7168,
            num_layers=61,
            num_dense_layers=1,
            hidden_dim=18_432,
            expert_hidden_dim=2048,
            num_experts=384,
            top_k=8,
            route_scale=2.827,
            num_heads=64,
            q_lora_rank=1536,
            kv_lora_rank=512,
            nope_head_dim=128,
            rope_head_dim=64,
            v_head_dim=128,
            rope_theta=50_000.0,
            vocab_size=163_840,
        ),
        data=DataConfig(seq_len=seq_len, microbatch_size=1),
        training=TrainingConfig(
            steps=round(15.5 * trillion), global_batch_size=global_batch_size, mixed_precision="bfloat16"
        ),
        parallelism=ParallelismConfig(
            expert_parallel_degree=16,
            pipeline_parallel_degree=16,
            pipeline_parallel_schedule="Interleaved1F1B",
        ),
        optimizer=OptimizerConfig(lr=2e-4, betas=(0.9, 0.95), weight_decay=0.1),
        lr_scheduler=LRSchedulerConfig(warmup_steps=500, decay_steps=round(5.5 * trillion), min_factor=0.1),
        activation_checkpoint=ActivationCheckpointConfig(mode="selective"),
    )


def kimi_k2_1t_released() -> TrainConfig:
    """The same sizes with the positions of the released weights, to go on from them: set checkpoint.initial.

    Positions were stretched to 131,072 after pretraining (section 2.5 of the report), in a later release to
    262,144 (then the factor is 64). Biases stay as they are.
    """
    return released(
        kimi_k2_1t(),
        balancing=kimi_k2_balancing(freeze_step=0),
        max_seq_len=131_072,
        rope_scaling=YarnConfig(factor=32.0, beta_fast=1.0, mscale=1.0, mscale_all_dim=1.0),
    )


def moonlight_16b() -> TrainConfig:
    """Moonlight with the settings of its report (section 3.3), for 256 processes.

    The report starts with 2,048 rows, lets the learning rate fall along a cosine, and raises it once more for
    the last 500 billion tokens. Text is not published: give data.source and data.tokenizer.name.
    """
    global_batch_size, seq_len = 4096, 8192
    size = {"global_batch_size": global_batch_size, "seq_len": seq_len}
    return TrainConfig(
        model=DeepseekV3ModelConfig(
            balancing=moonlight_balancing(freeze_step=steps_of(5.2e12, **size)),
            dim=2048,
            num_layers=27,
            num_dense_layers=1,
            hidden_dim=11_264,
            expert_hidden_dim=1408,
            num_experts=64,
            top_k=6,
            num_shared_experts=2,
            route_scale=2.446,
            num_heads=16,
            kv_lora_rank=512,
            nope_head_dim=128,
            rope_head_dim=64,
            v_head_dim=128,
            norm_eps=1e-5,
            rope_theta=50_000.0,
            max_seq_len=seq_len,
            vocab_size=163_840,
        ),
        data=DataConfig(seq_len=seq_len, microbatch_size=1),
        training=TrainingConfig(
            steps=steps_of(5.7e12, **size), global_batch_size=global_batch_size, mixed_precision="bfloat16"
        ),
        parallelism=ParallelismConfig(expert_parallel_degree=8),
        optimizer=OptimizerConfig(lr=4.2e-4, betas=(0.9, 0.95), weight_decay=0.1),
        lr_scheduler=LRSchedulerConfig(
            warmup_steps=2000, decay_steps=steps_of(5.5e12, **size), min_factor=0.1
        ),
        activation_checkpoint=ActivationCheckpointConfig(mode="selective"),
    )
