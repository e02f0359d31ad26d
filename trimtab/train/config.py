"""The configuration of a run: sections, each beside the class it configures, checked together here."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from trimtab.integrations.stages import divide_layers
from trimtab.parallel.tokens import TokenShard
from trimtab.scale import Order
from trimtab.train.checkpoint import CheckpointConfig
from trimtab.train.compute import ActivationCheckpointConfig, CompileConfig, Device, Precision
from trimtab.train.data import DataConfig, TokenLoader
from trimtab.train.evaluation import ValidationConfig
from trimtab.train.finetune import FinetuneConfig
from trimtab.train.logging import MetricsConfig
from trimtab.train.model import ModelConfig
from trimtab.train.mtp import mtp_of
from trimtab.train.optim import LRSchedulerConfig, OptimizerConfig
from trimtab.train.parallelism import ParallelismConfig, ResolvedRun, divide_batch


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """The loop.

    Args:
        steps: optimiser steps.
        global_batch_size: rows of ``data.seq_len`` tokens in an optimiser step, over all data ranks. Outside a
            pipeline gradients are accumulated over as many forwards of ``data.microbatch_size`` rows as that
            takes. None: ``data.microbatch_size`` rows on each data rank.
        max_norm: gradients are scaled down to this norm; None leaves them.
        seed: of the initial weights and of everything random in the model. Data have their own.
        device: "auto" takes the GPU where there is one.
        mixed_precision: "bfloat16" computes the model's forward under autocast, with float32 weights,
            routers and loss; "none" computes in float32.
        timeout_seconds: longest wait of a process for the others before it fails: longer than a compilation
            or a checkpoint takes.

    Raises:
        ValueError: a value out of range.
    """

    steps: int
    global_batch_size: int | None = None
    max_norm: float | None = 1.0
    seed: int = 0
    device: Device = "auto"
    mixed_precision: Precision = "none"
    timeout_seconds: int = 600

    def __post_init__(self) -> None:
        """Validate."""
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1; raise training.steps")
        if self.global_batch_size is not None and self.global_batch_size < 1:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} must be at least 1; raise training.global_batch_size"
            )
        if self.max_norm is not None and not self.max_norm > 0:
            raise ValueError(
                f"max_norm={self.max_norm} must be positive; raise training.max_norm, or set it to None"
            )
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be at least 0; raise training.seed")
        if self.timeout_seconds < 1:
            raise ValueError(
                f"timeout_seconds={self.timeout_seconds} must be at least 1; raise training.timeout_seconds"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run.

    Args:
        model: the model and how its experts are balanced.
        data: text, tokenizer, and the shape and order of microbatches.
        training: the loop.
        finetune: which parameters are trained.
        parallelism: how the run is divided among processes.
        optimizer: AdamW.
        lr_scheduler: warm-up, plateau and decay of the learning rate.
        compile: torch.compile of decoder layers.
        activation_checkpoint: what backward computes again.
        checkpoint: saving and resuming.
        metrics: logging.
        validation: evaluation of held-out text.
        dump_folder: folder that run directories are made in.
        run_name: name of the run directory; None: module, config and time. A run with a name continues
            when it is started again.

    Raises:
        ValueError: settings that contradict each other.
    """

    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: LRSchedulerConfig = field(default_factory=LRSchedulerConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    activation_checkpoint: ActivationCheckpointConfig = field(default_factory=ActivationCheckpointConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    dump_folder: str = "runs"
    run_name: str | None = None

    def __post_init__(self) -> None:
        """Take over what the model's directory holds, and validate what no section can see alone."""
        self._use_directory()
        global_size, micro_size = self.training.global_batch_size, self.data.microbatch_size
        if global_size is None and micro_size is None:
            raise ValueError(
                "training.global_batch_size=None and data.microbatch_size=None: nothing says how many rows a step "
                "takes; set one of them"
            )
        if global_size is not None and micro_size is not None and global_size % micro_size:
            raise ValueError(
                f"training.global_batch_size={global_size} must be a multiple of data.microbatch_size="
                f"{micro_size}; change one of them"
            )
        if self.data.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"data.seq_len={self.data.seq_len} is longer than model.max_seq_len={self.model.max_seq_len}; "
                "lower data.seq_len or raise model.max_seq_len"
            )
        if self.data.has_images and not self.model.takes_images:
            raise ValueError(
                f"data.source={self.data.source!r} has images, which {type(self.model).__name__} does not take; "
                "choose a module with a vision tower (trimtab configs lists all), or leave out data.images.enable"
            )
        if self.data.has_images and mtp_of(self.model) is not None:
            raise ValueError(
                f"data.source={self.data.source!r} has images and model.mtp is set: multi-token prediction reads "
                "embeddings of tokens, which for images are placeholders; set model.mtp to None, or leave out "
                "data.images.enable"
            )
        self.model.check_rows(packing=self.data.packing, compiled=self.compile.enable)
        self.lr_scheduler.phases(self.training.steps)
        # What no number of processes could mend; the rest is known in `for_world`.
        self._check_balancing(num_microbatches=1)
        self.finetune.check_balancing(self.model.balancing)
        if self.validation.enable and self.data.validation_fraction == 0:
            raise ValueError(
                "validation.enable is set, but data.validation_fraction=0 holds no text out; raise it, or give "
                "--validation.no-enable"
            )
        if self.run_name is not None and not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", self.run_name):
            raise ValueError(
                f"run_name={self.run_name!r} must be a folder's name of letters, digits and ._+-; "
                "set dump_folder for the place"
            )
        if not self.dump_folder:
            raise ValueError("dump_folder='' names no folder; set it, for example to runs")

    def _use_directory(self) -> None:
        directory = self.model.directory
        if directory is None:
            return
        if self.checkpoint.initial is None:
            object.__setattr__(self, "checkpoint", replace(self.checkpoint, initial=directory))
        if self.data.tokenizer.name == "model":
            tokenizer = replace(self.data.tokenizer, name=directory)
            object.__setattr__(self, "data", replace(self.data, tokenizer=tokenizer))

    def for_world(self, world_size: int) -> ResolvedRun:
        """What this configuration is with so many processes: the check of all that depends on their number.

        Raises:
            ValueError: it cannot be run so; the message says what to change.
        """
        parallelism, balancing = self.parallelism, self.model.balancing
        degrees = parallelism.resolve(world_size)
        self.model.check_parallel(degrees)
        self.finetune.check_parallel(degrees)
        try:
            TokenShard.make(self.data.seq_len, cp=degrees.cp, tp=degrees.tp)
        except ValueError as error:
            raise ValueError(
                f"data.{error}; change data.seq_len, parallelism.context_parallel_degree (cp) or "
                "parallelism.tensor_parallel_degree (tp)"
            ) from None
        B, M = divide_batch(
            parallelism,
            degrees.data,
            global_batch_size=self.training.global_batch_size,
            microbatch_size=self.data.microbatch_size,
        )
        order = parallelism.order(balancing.order)
        try:
            self._check_balancing(num_microbatches=M, order=order)
        except ValueError as error:
            raise ValueError(
                f"{error}. num_microbatches={M} is training.global_batch_size={M * B * degrees.data} / (data ranks="
                f"{degrees.data} * {parallelism.microbatch_option}={B})"
            ) from None
        plan = parallelism.plan(num_layers=self.model.num_layers, num_microbatches=M)
        if plan is not None:
            num_first = self.model.num_first_stage_layers
            try:
                divide_layers(self.model.num_layers, plan.num_stages, num_first=num_first)
            except ValueError as error:
                raise ValueError(
                    f"parallelism.pipeline_parallel_degree={plan.pp} ({plan.name}): {error}"
                ) from None
        return ResolvedRun(degrees=degrees, microbatch_size=B, num_microbatches=M, order=order, pipeline=plan)

    def _check_balancing(self, *, num_microbatches: int, order: Order | None = None) -> None:
        self.model.balancing.check(
            self.model.num_experts,
            self.model.top_k,
            grouped=self.model.grouped,
            has_bias=self.model.has_expert_bias,
            num_microbatches=num_microbatches,
            order=order,
        )

    def build_loader(
        self, run: ResolvedRun, *, data_rank: int = 0, stages: Collection[int] = (0,)
    ) -> TokenLoader:
        """The data of one data rank; see `DataConfig.build`.

        Args:
            run: this configuration with its number of processes.
            data_rank: in [0, run.degrees.data).
            stages: pipeline stages that are given the data; images are for the first.

        Raises:
            ValueError: the data cannot be read.
        """
        return self.data.build(
            rank=data_rank,
            world_size=run.degrees.data,
            microbatch_size=run.microbatch_size,
            global_batch_size=run.global_batch_size,
            image_layout=self.model.image_layout if self.model.takes_images else None,
            patches=0 in stages,
        )


# What may differ between a run and its resumption: nothing here changes what is computed, up to rounding.
_FREE = (
    "dump_folder",
    "run_name",
    "checkpoint",
    "metrics",
    "validation",
    "data.max_validation_microbatches",
    "finetune.save_adapter",
    "parallelism",
    "training.timeout_seconds",
)


def to_dict(value: Any) -> Any:
    """A configuration as JSON holds it; a section written as a subclass names it under ``kind``."""
    if is_dataclass(value) and not isinstance(value, type):
        named = {field.name: to_dict(getattr(value, field.name)) for field in fields(value)}
        qualified = type(value).__qualname__
        return {"kind": qualified.removesuffix(".Config"), **named} if "." in qualified else named
    if isinstance(value, (list, tuple)):
        return [to_dict(entry) for entry in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return repr(value)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names and values of a dictionary made by `to_dict`."""
    if not isinstance(config, dict):
        return {prefix: config}
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= flatten(value, f"{prefix}.{name}" if prefix else name)
    return flat


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Settings that change a run and differ, as ``name (saved ..., now ...)``.

    Args:
        saved: configuration of the checkpoint, from `to_dict`.
        current: configuration of this process, likewise.
    """
    old, new = flatten(saved), flatten(current)
    changed = []
    for name in sorted(old.keys() | new.keys()):
        free = any(name == prefix or name.startswith(f"{prefix}.") for prefix in _FREE)
        if not free and old.get(name) != new.get(name):
            changed.append(f"{name} (saved {old.get(name)!r}, now {new.get(name)!r})")
    return changed
