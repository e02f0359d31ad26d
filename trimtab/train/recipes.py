"""What configurations of families share: schedules that reports write in tokens, and runs of a minute."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trimtab.train.config import TrainConfig, TrainingConfig
from trimtab.train.data import DataConfig
from trimtab.train.evaluation import ValidationConfig
from trimtab.train.logging import MetricsConfig
from trimtab.train.model import ModelConfig
from trimtab.train.optim import LRSchedulerConfig, OptimizerConfig

# Points of a schedule: (optimiser step, factor), linear in between and constant outside.
Schedule = tuple[tuple[int, float], ...]


def steps_of(num_tokens: float, *, global_batch_size: int, seq_len: int) -> int:
    """Optimiser steps that take so many tokens.

    Args:
        num_tokens: tokens.
        global_batch_size: rows of a step.
        seq_len: tokens of a row.
    """
    return round(num_tokens / (global_batch_size * seq_len))


def change_at(step: int | None, factor: float) -> Schedule:
    """1 before an optimiser step, ``factor`` from it on.

    Args:
        step: counted from 0; None: never.
        factor: at least 0.
    """
    if step is None:
        return ((0, 1.0),)
    return ((step - 1, 1.0), (step, factor)) if step > 0 else ((0, factor),)


def small_run(
    model: ModelConfig, *, steps: int = 100, microbatch_size: int | None = 4, domain_pure: bool = True
) -> TrainConfig:
    """A run of a minute on two CPU cores, for a model of about a million parameters.

    A step takes 16 rows of 128 bytes of text that every installation has.

    Args:
        model: the model.
        steps: optimiser steps.
        microbatch_size: rows of a forward; None: all of a step, as batch-wise losses need.
        domain_pure: rows of a microbatch are of one domain, so that only the step holds text of several.
    """
    global_batch_size = 16
    return TrainConfig(
        model=model,
        data=DataConfig(
            seq_len=128,
            microbatch_size=microbatch_size,
            domain_pure=domain_pure and microbatch_size is not None,
            max_validation_microbatches=64 // (microbatch_size or global_batch_size),
        ),
        training=TrainingConfig(steps=steps, global_batch_size=global_batch_size),
        optimizer=OptimizerConfig(lr=3e-3),
        metrics=MetricsConfig(log_interval=10),
        validation=ValidationConfig(interval=50),
    )


def released(pretraining: TrainConfig, *, steps: int = 1000, lr: float = 1e-5, **model: Any) -> TrainConfig:
    """Further training of released weights: the processes, rows and precision of pretraining, its schedules not.

    Args:
        pretraining: the configuration of pretraining.
        steps: optimiser steps.
        lr: peak learning rate.
        model: fields of the model that the released weights have otherwise.
    """
    return replace(
        pretraining,
        model=replace(pretraining.model, **model),
        training=replace(pretraining.training, steps=steps),
        optimizer=OptimizerConfig(lr=lr),
        lr_scheduler=LRSchedulerConfig(),
    )
