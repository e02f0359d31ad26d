"""The model of a directory with weights: fine-tuning of what `save_pretrained` or a model hub wrote.

Sizes, weights and tokenizer come from the directory, ``--model.path``. The model is transformers' own definition,
of any family whose routers `trimtab.attach` finds. Balancing is what the report of its family used, where a module
of `trimtab.models` knows it (the function ``<module>_balancing``); configs that say so do without.

Legend: E experts, K top-k.
"""

from __future__ import annotations

import functools
import inspect
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import nn

from trimtab.integrations.discovery import discover
from trimtab.integrations.empty import make_buffers
from trimtab.integrations.linear_attention import separate_documents
from trimtab.parallel.mesh import Degrees
from trimtab.train.chat import ChatConfig
from trimtab.train.config import TrainConfig, TrainingConfig
from trimtab.train.data import DataConfig
from trimtab.train.evaluation import ValidationConfig
from trimtab.train.finetune import FinetuneConfig
from trimtab.train.hf_model import HFModelConfig, check_axes
from trimtab.train.logging import MetricsConfig
from trimtab.train.model import Balancing, ModelConfig
from trimtab.train.optim import LRSchedulerConfig, OptimizerConfig
from trimtab.train.registry import load_module, module_names
from trimtab.train.tokenizer import TokenizerConfig

_LONGEST = 2**31


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
    max_seq_len: Annotated[int, tyro.conf.Suppress] = _LONGEST

    def __post_init__(self) -> None:
        """Read the sizes, and validate."""
        if self.path:
            sizes = _sizes(self.path)
            for name in ("num_layers", "num_experts", "top_k", "max_seq_len"):
                object.__setattr__(self, name, getattr(sizes, name))
            if isinstance(self.balancing, FamilyBalancing):
                # Still one of the family: a configuration made of this one may have another path.
                found = _family_balancing(self.path, sizes)
                own = FamilyBalancing(**{entry.name: getattr(found, entry.name) for entry in fields(found)})
                object.__setattr__(self, "balancing", own)
        ModelConfig.__post_init__(self)

    @property
    def grouped(self) -> bool:
        """Whether selection is limited to expert groups."""
        return bool(self.path) and _sizes(self.path).grouped

    @property
    def has_expert_bias(self) -> bool:
        """Whether routers have a bias that only selection sees."""
        return bool(self.path) and _sizes(self.path).has_expert_bias

    @property
    def directory(self) -> str | None:
        """Where weights and tokenizer are."""
        return self.path or None

    def check_parallel(self, degrees: Degrees) -> None:
        """Besides experts, heads and what the family's own module refuses."""
        self._check_path()
        ModelConfig.check_parallel(self, degrees)
        architecture, config = _read(self.path)
        _, family = _family(architecture)
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
        architecture, _ = _read(self.path)
        if packing and _sizes(self.path).mixes_documents:
            raise ValueError(
                f"data.packing: layers of {architecture} run over a row from token to token and would carry one "
                "document into the next; set data.packing to False"
            )
        _, family = _family(architecture)
        if family is not None:
            family.check_rows(self, packing=packing, compiled=compiled)

    def build(self, *, vocab_size: int, seq_len: int) -> nn.Module:
        """transformers' own model, its parameters on the meta device, its buffers real and initialised."""
        self._check_path()
        architecture, config = _read(self.path)
        rows = config.get_text_config().vocab_size
        if rows < vocab_size:
            raise ValueError(
                f"{self.path} has {rows} rows in its embedding and the tokenizer {vocab_size} ids; set "
                "data.tokenizer.name to the model's own tokenizer"
            )
        return _build(architecture, config)

    def _check_path(self) -> None:
        if not self.path:
            raise ValueError(
                "model.path is not set; give --model.path a directory with config.json and weights, such as "
                "save_pretrained and trimtab export write"
            )


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What the trainer must know of a model."""

    num_layers: int
    num_experts: int
    top_k: int
    max_seq_len: int
    grouped: bool
    has_expert_bias: bool
    mixes_documents: bool


def _sizes(path: str) -> _Sizes:
    config = Path(path).expanduser() / "config.json"
    return _examine(path, config.stat().st_mtime_ns if config.is_file() else 0)


@functools.lru_cache(maxsize=4)
def _examine(path: str, changed: int) -> _Sizes:
    """Sizes of a directory's model, read off the model; it takes seconds where there are many layers."""
    architecture, config = _read(path)
    model = _build(architecture, config)
    routers = discover(model)
    text, first = config.get_text_config(), routers[0]
    if any((r.num_experts, r.top_k) != (first.num_experts, first.top_k) for r in routers):
        raise ValueError(
            f"{path}: layers have different numbers of experts, which the trainer does not serve"
        )
    return _Sizes(
        num_layers=text.num_hidden_layers,
        num_experts=first.num_experts,
        top_k=first.top_k,
        max_seq_len=getattr(text, "max_position_embeddings", _LONGEST),
        grouped=first.grouped,
        has_expert_bias=first.expert_bias is not None,
        mixes_documents=_mixes_documents(config, model),
    )


def _read(path: str) -> tuple[str, Any]:
    """Class and configuration of a directory's model, for training."""
    import transformers

    folder = Path(path).expanduser()
    try:
        architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures")
        config: Any = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"model.path={path!r} holds no configuration that transformers reads ({error}); give a directory with "
            "config.json and weights, such as save_pretrained and trimtab export write"
        ) from error
    architecture = next(iter(architectures or ()), None)
    if architecture is None or not hasattr(transformers, architecture):
        raise ValueError(
            f"{folder / 'config.json'}: architectures={architectures} names no class of transformers "
            f"{transformers.__version__}; install the version that the model needs, or complete the file"
        )
    text = config.get_text_config()
    text.use_cache = False
    for name, value in (("output_router_logits", False), ("num_mtp_layers", 0)):
        if hasattr(text, name):
            setattr(text, name, value)
    return architecture, config


def _build(architecture: str, config: Any) -> Any:
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    make_buffers(model)
    if _has_delta_networks(model):
        separate_documents(model)
    return model.train()


def _has_delta_networks(model: nn.Module) -> bool:
    return any(type(module).__name__.endswith("GatedDeltaNet") for module in model.modules())


def _mixes_documents(config: Any, model: nn.Module) -> bool:
    """Whether layers run over a row from token to token, and so from one document of it into the next."""
    if _has_delta_networks(model):
        return False
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    named = any(word in kind for kind in kinds for word in ("linear", "mamba", "conv", "recurrent", "hybrid"))
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    return named or any(isinstance(module, nn.Conv1d) for module in decoder.modules())


def _family(architecture: str) -> tuple[str, type[HFModelConfig] | None]:
    """Module of `trimtab.models` that has a model class of transformers, and its configuration; ("", None)."""
    for name in module_names():
        if f"{__package__}.{name}" == __name__:
            continue
        module = load_module(name)
        for value in vars(module).values():
            own = inspect.isclass(value) and value.__module__ == module.__name__
            if (
                own
                and issubclass(value, HFModelConfig)
                and getattr(value, "architecture", "") == architecture
            ):
                return name, value
    return "", None


def _family_balancing(path: str, sizes: _Sizes) -> Balancing:
    """The preset of a model's family; without one, or if it does not fit, none but a warning."""
    architecture, _ = _read(path)
    name, _ = _family(architecture)
    preset = getattr(load_module(name), f"{name}_balancing", None) if name else None
    why = "no module of trimtab.models knows it"
    if preset is not None:
        known: Mapping[str, Any] = {"num_layers": sizes.num_layers}
        parameters = inspect.signature(preset).parameters.values()
        needed = {p.name: known.get(p.name) for p in parameters if p.default is p.empty}
        try:
            balancing: Balancing = preset(**needed)
            balancing.check(
                sizes.num_experts,
                sizes.top_k,
                grouped=sizes.grouped,
                has_bias=sizes.has_expert_bias,
                num_microbatches=1,
            )
            return balancing
        except ValueError as error:
            why = f"the preset {name}_balancing does not fit it: {error}"
    warnings.warn(
        f"experts of {path} ({architecture}) are watched and not balanced: {why}; write a config with "
        "PretrainedModelConfig(balancing=...) to balance them",
        stacklevel=4,
    )
    return Balancing.off()


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
