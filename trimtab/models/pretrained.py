"""The model of a directory with weights: fine-tuning of what `save_pretrained` or a model hub wrote.

Sizes, weights and tokenizer come from the directory, ``--model.path``. The model is transformers' own definition,
of any family whose routers `trimtab.attach` finds. Balancing is what the report of its family used, where a module
of `trimtab.models` knows it (the function ``<module>_balancing``); configs that say so do without.

Legend: E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated

import tyro
from torch import nn

from trimtab.parallel.mesh import Degrees
from trimtab.train.chat import ChatConfig
from trimtab.train.config import TrainConfig, TrainingConfig
from trimtab.train.data import DataConfig
from trimtab.train.directory_model import (
    LONGEST,
    build_model,
    family_balancing,
    family_of,
    read_model,
    sizes_of,
)
from trimtab.train.evaluation import ValidationConfig
from trimtab.train.finetune import FinetuneConfig
from trimtab.train.hf_model import check_axes
from trimtab.train.logging import MetricsConfig
from trimtab.train.model import Balancing, ModelConfig
from trimtab.train.optim import LRSchedulerConfig, OptimizerConfig
from trimtab.train.tokenizer import TokenizerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyBalancing(Balancing):
    """The balancing that the report of a model's family used, which is known when the model is."""

    observe_only: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainedModelConfig(ModelConfig):
    """The model of a directory.

    Args:
        path: holds config.json, and weights that `checkpoint.initial` takes unless it is set; "" stands for one
            that is still to be given.
        balancing: how experts are balanced; by default as in the report of the family.
        num_layers: of the directory's configuration, as all sizes: whatever is given is overwritten.
        num_experts: E, likewise.
        top_k: K, likewise.
        max_seq_len: positions that the model was made for, likewise.

    Raises:
        ValueError: the directory holds no model that can be trained.
    """

    path: str = ""
    balancing: Annotated[Balancing, tyro.conf.Suppress] = field(default_factory=FamilyBalancing)
    num_layers: Annotated[int, tyro.conf.Suppress] = 1
    num_experts: Annotated[int, tyro.conf.Suppress] = 1
    top_k: Annotated[int, tyro.conf.Suppress] = 1
    max_seq_len: Annotated[int, tyro.conf.Suppress] = LONGEST

    def __post_init__(self) -> None:
        """Read the sizes, and validate."""
        if self.path:
            sizes = sizes_of(self.path)
            for name in ("num_layers", "num_experts", "top_k", "max_seq_len"):
                object.__setattr__(self, name, getattr(sizes, name))
            if isinstance(self.balancing, FamilyBalancing):
                # Still one of the family: a configuration made of this one may have another path.
                found = family_balancing(self.path, sizes)
                own = FamilyBalancing(**{entry.name: getattr(found, entry.name) for entry in fields(found)})
                object.__setattr__(self, "balancing", own)
        ModelConfig.__post_init__(self)

    @property
    def grouped(self) -> bool:
        """Whether selection is limited to expert groups."""
        return bool(self.path) and sizes_of(self.path).grouped

    @property
    def has_expert_bias(self) -> bool:
        """Whether routers have a bias that only selection sees."""
        return bool(self.path) and sizes_of(self.path).has_expert_bias

    @property
    def directory(self) -> str | None:
        """Where weights and tokenizer are."""
        return self.path or None

    def check_parallel(self, degrees: Degrees) -> None:
        """Besides experts, heads and what the family's own module refuses."""
        self._check_path()
        ModelConfig.check_parallel(self, degrees)
        architecture, config = read_model(self.path)
        _, family = family_of(architecture)
        if family is not None:
            check_axes(degrees, family.refused_axes, architecture)
        text = config.get_text_config()
        for name in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(text, name, None) or degrees.tp
            if heads % degrees.tp:
                raise ValueError(
                    f"parallelism.tensor_parallel_degree={degrees.tp} must divide {name}={heads} of {self.path}; "
                    "lower it"
                )

    def check_rows(self, *, packing: bool, compiled: bool) -> None:
        """Rows of several documents need layers that keep them apart; besides, what the family's module refuses."""
        if not self.path:
            return
        architecture, _ = read_model(self.path)
        if packing and sizes_of(self.path).mixes_documents:
            raise ValueError(
                f"data.packing: layers of {architecture} run over a row from token to token and would carry one "
                "document into the next; set data.packing to False"
            )
        _, family = family_of(architecture)
        if family is not None:
            family.check_rows(self, packing=packing, compiled=compiled)

    def build(self, *, vocab_size: int, seq_len: int) -> nn.Module:
        """transformers' own model, its parameters on the meta device, its buffers real and initialised."""
        self._check_path()
        architecture, config = read_model(self.path)
        rows = config.get_text_config().vocab_size
        if rows < vocab_size:
            raise ValueError(
                f"{self.path} has {rows} rows in its embedding and the tokenizer {vocab_size} ids; set "
                "data.tokenizer.name to the model's own tokenizer"
            )
        return build_model(architecture, config)

    def _check_path(self) -> None:
        if not self.path:
            raise ValueError(
                "model.path is not set; give --model.path a directory with config.json and weights, such as "
                "save_pretrained and trimtab export write"
            )


# -------------------------------------------------------------------- configs


def pretrained_finetune() -> TrainConfig:
    """All weights of --model.path on conversations, balanced as in pretraining; give --data.source your .jsonl."""
    return _finetune(PretrainedModelConfig(), FinetuneConfig(), lr=1e-5)


def pretrained_finetune_unbalanced() -> TrainConfig:
    """All weights but the routers' of --model.path on conversations, without balancing: loads are watched."""
    return _finetune(
        PretrainedModelConfig(balancing=Balancing.off()), FinetuneConfig(router="frozen"), lr=1e-5
    )


def pretrained_lora() -> TrainConfig:
    """Adapters on the attention of --model.path; routers stay as they are, and loads are watched."""
    return _finetune(
        PretrainedModelConfig(balancing=Balancing.off()),
        FinetuneConfig(method="lora", router="frozen"),
        lr=2e-4,
    )


def pretrained_lora_balanced() -> TrainConfig:
    """Adapters on the attention of --model.path, and routers that learn, balanced as in pretraining."""
    return _finetune(PretrainedModelConfig(), FinetuneConfig(method="lora"), lr=2e-4)


def pretrained_tiny() -> TrainConfig:
    """All weights of a small --model.path, in bytes, on the conversations shipped with trimtab; seconds."""
    return TrainConfig(
        model=PretrainedModelConfig(),
        data=DataConfig(
            seq_len=512,
            microbatch_size=4,
            source="fixed",
            chat=ChatConfig(enable=True),
            validation_fraction=0.15,
        ),
        training=TrainingConfig(steps=40),
        optimizer=OptimizerConfig(lr=3e-3),
        metrics=MetricsConfig(log_interval=5),
        validation=ValidationConfig(interval=20),
    )


def _finetune(model: PretrainedModelConfig, finetune: FinetuneConfig, *, lr: float) -> TrainConfig:
    return TrainConfig(
        model=model,
        data=DataConfig(
            seq_len=4096,
            microbatch_size=1,
            source="fixed",
            chat=ChatConfig(enable=True),
            tokenizer=TokenizerConfig(name="model"),
        ),
        training=TrainingConfig(steps=1000, global_batch_size=32, mixed_precision="bfloat16"),
        finetune=finetune,
        optimizer=OptimizerConfig(lr=lr, weight_decay=0.0),
        lr_scheduler=LRSchedulerConfig(decay_steps=900),
        validation=ValidationConfig(interval=200),
    )
