"""A model family of transformers: its sizes, the model built of them without values, and what divides it.

Legend: E experts, K top-k.

A family is a subclass with its own sizes and a translation of them into transformers' configuration. Everything
else (building, checks, what trains it) is here and the same for all.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

import torch
import tyro
from torch import nn

from trimtab.integrations.empty import make_buffers
from trimtab.integrations.mtp import add_mtp
from trimtab.parallel.mesh import Degrees
from trimtab.train.model import ModelConfig
from trimtab.train.mtp import MtpConfig

# Axes that a family may refuse, and the option that a user sets.
_OPTIONS = {
    "pp": "pipeline_parallel_degree",
    "tp": "tensor_parallel_degree",
    "cp": "context_parallel_degree",
    "ep": "expert_parallel_degree",
    "etp": "expert_tensor_parallel_degree",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnConfig:
    """Rotary positions stretched beyond those of pretraining (YaRN, Peng et al. 2023, arXiv:2309.00071).

    Args:
        factor: how many times longer.
        original_max_seq_len: positions of pretraining.
        beta_fast: turns over those positions above which a frequency is kept.
        beta_slow: turns below which it is divided by ``factor``.
        mscale: of the attention temperature; None for the paper's.
        mscale_all_dim: likewise, of the part that multiplies all of a head.
        truncate: round the bounds between kept and divided frequencies to whole dimensions.

    Raises:
        ValueError: a factor below 1.
    """

    factor: float
    original_max_seq_len: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        """Validate."""
        if self.factor < 1 or self.original_max_seq_len < 1:
            raise ValueError(
                f"factor={self.factor} and original_max_seq_len={self.original_max_seq_len} must be at least 1; "
                "raise model.rope_scaling"
            )

    def parameters(self) -> dict[str, Any]:
        """As transformers has them, without the base of the frequencies."""
        found: dict[str, Any] = {
            "rope_type": "yarn",
            "factor": self.factor,
            "original_max_position_embeddings": self.original_max_seq_len,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
        }
        optional = {"mscale": self.mscale, "mscale_all_dim": self.mscale_all_dim}
        found |= {name: value for name, value in optional.items() if value is not None}
        return found if self.truncate else {**found, "truncate": False}


def check_axes(degrees: Degrees, refused: Mapping[str, str], architecture: str) -> None:
    """Check that a model is not divided over axes that it cannot be divided over.

    Args:
        degrees: processes along each axis.
        refused: these axes, with the reason.
        architecture: class of transformers.

    Raises:
        ValueError: it is; the message names the option.
    """
    for axis, reason in refused.items():
        if (degree := getattr(degrees, axis)) > 1:
            raise ValueError(
                f"parallelism.{_OPTIONS[axis]}={degree}: {architecture} cannot be divided so, because "
                f"{reason}; set it to 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class HFModelConfig(ModelConfig):
    """Sizes that all families have. Integers of a family must be positive, unless it says otherwise.

    Args:
        dim: width of the model.
        num_heads: attention heads.
        expert_hidden_dim: hidden width of one expert.
        init_std: standard deviation of initial weights.
        norm_eps: added to the mean square in norms.
        rope_theta: base of the rotary frequencies.
        vocab_size: rows of the embedding, at least the tokenizer's ids; None for as many.
        tie_embeddings: embedding and head are one parameter.
        mtp: multi-token prediction, trained with the model; None does without.

    Raises:
        ValueError: sizes that are not positive or do not fit each other.
    """

    dim: int
    num_heads: int
    expert_hidden_dim: int
    init_std: float = 0.02
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    vocab_size: int | None = None
    tie_embeddings: bool = False
    mtp: Annotated[MtpConfig | None, tyro.conf.AvoidSubcommands] = None

    #: Class of transformers.
    architecture: ClassVar[str]
    #: Integer fields that may be 0.
    may_be_zero: ClassVar[frozenset[str]] = frozenset()
    #: Sizes that tp divides.
    tp_divides: ClassVar[tuple[str, ...]] = ("num_heads",)
    #: Axes over which the family cannot be divided, with the reason.
    refused_axes: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        """Validate."""
        ModelConfig.__post_init__(self)
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in self.may_be_zero else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                raise ValueError(f"{field.name}={value} must be at least {least}; raise model.{field.name}")
        for name in ("init_std", "norm_eps", "rope_theta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive; raise model.{name}")

    def check_heads(self, num_kv_heads: int, head_dim: int | None = None) -> None:
        """Check heads of keys and values, and the width of a head.

        Args:
            num_kv_heads: heads of keys and values.
            head_dim: width of a head; None where that is the model's width divided by the heads.

        Raises:
            ValueError: they do not fit.
        """
        if head_dim is None and self.dim % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must divide dim={self.dim}; change model.num_heads or model.dim"
            )
        if self.num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads={num_kv_heads} must divide num_heads={self.num_heads}; change one of them"
            )
        if head_dim is not None and head_dim % 2:
            raise ValueError(f"head_dim={head_dim} must be even; change model.head_dim")
        if head_dim is None and self.dim // self.num_heads % 2:
            raise ValueError(
                f"dim={self.dim} / num_heads={self.num_heads} must be even; change model.num_heads or model.dim"
            )

    def check_dense_layers(self, num_dense_layers: int) -> None:
        """Check that some layer has experts.

        Raises:
            ValueError: none has.
        """
        if num_dense_layers >= self.num_layers:
            raise ValueError(
                f"num_dense_layers={num_dense_layers} must be in [0, num_layers={self.num_layers}), so that one "
                "layer has experts; lower model.num_dense_layers"
            )

    def check_groups(self, num_groups: int, num_limited_groups: int, *, least: int) -> None:
        """Check the groups that selection is limited to.

        Args:
            num_groups: groups that experts are divided into.
            num_limited_groups: groups a token may choose experts from.
            least: experts by which the family scores a group.

        Raises:
            ValueError: they do not fit the experts.
        """
        if self.num_experts % num_groups or self.num_experts < least * num_groups:
            raise ValueError(
                f"num_groups={num_groups} must divide num_experts={self.num_experts} into groups of at least "
                f"{least}; lower model.num_groups"
            )
        if num_limited_groups > num_groups:
            raise ValueError(
                f"num_limited_groups={num_limited_groups} must be at most num_groups={num_groups}; "
                "lower model.num_limited_groups"
            )
        reachable = self.num_experts // num_groups * num_limited_groups
        if self.top_k > reachable:
            raise ValueError(
                f"top_k={self.top_k} is more than the {reachable} experts of num_limited_groups="
                f"{num_limited_groups}; lower model.top_k or raise model.num_limited_groups"
            )

    # ---------------------------------------------------------------- division among ranks

    def check_parallel(self, degrees: Degrees) -> None:
        """Experts, heads, and the width of each expert where the tensor ranks take it."""
        check_axes(degrees, self.refused_axes, self.architecture)
        ModelConfig.check_parallel(self, degrees)
        self.check_divides(_OPTIONS["tp"], degrees.tp, *self.tp_divides)
        self.check_divides(_OPTIONS["etp"], degrees.etp, "expert_hidden_dim")

    # ---------------------------------------------------------------- the model

    @abstractmethod
    def hf_config(self, vocab_size: int) -> Any:
        """transformers' configuration.

        Args:
            vocab_size: rows of the embedding.
        """

    def num_embeddings(self, vocab_size: int) -> int:
        """Rows of the embedding for a tokenizer of ``vocab_size`` ids.

        Raises:
            ValueError: the model's own number is smaller.
        """
        if self.vocab_size is not None and self.vocab_size < vocab_size:
            raise ValueError(
                f"vocab_size={self.vocab_size} must be at least the tokenizer's {vocab_size}; raise "
                "model.vocab_size, or set it to None"
            )
        return self.vocab_size or vocab_size

    def build(self, *, vocab_size: int, seq_len: int) -> nn.Module:
        """transformers' own model, its parameters on the meta device, its buffers real and initialised."""
        import transformers

        config = self.hf_config(self.num_embeddings(vocab_size))
        with torch.device("meta"):
            model: nn.Module = getattr(transformers, self.architecture)(config)
            if self.mtp is not None:
                add_mtp(model, self.mtp.num_layers)
        make_buffers(model)
        return model.train()
