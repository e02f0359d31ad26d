"""Expert feed-forward networks as stacked weights, and the gated activations between their two multiplies.

Shape suffixes: N rows (token-expert pairs sorted by expert), D model, F hidden, E experts of this rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.grouped_mm import grouped_mm, grouped_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedActivation:
    """Base of the activations `h = act(gate) * up` that halve the width of a fused projection.

    Attributes:
        interleaved: gate and up alternate along the last axis (gate_0, up_0, gate_1, ...) instead of
            being its two halves.
    """

    interleaved: bool = False

    def __call__(self, gate_up_N2F: Tensor) -> Tensor:
        """Split (N, 2F) into gate and up and combine them into (N, F). Gradient flows."""
        if self.interleaved:
            return self.combine(gate_up_N2F[..., ::2], gate_up_N2F[..., 1::2])
        gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
        return self.combine(gate_NF, up_NF)

    def combine(self, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        """Combine (N, F) gate and (N, F) up into (N, F). Gradient flows."""
        raise NotImplementedError(f"{type(self).__name__} must define combine(gate_NF, up_NF)")


@dataclass(frozen=True, kw_only=True, slots=True)
class SwiGLU(GatedActivation):
    """`silu(gate) * up`.

    Source: Shazeer 2020, arXiv:2002.05202, section 2 (SwiGLU, beta = 1).
    """

    def combine(self, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        """Combine (N, F) gate and (N, F) up into (N, F). Gradient flows."""
        return F.silu(gate_NF) * up_NF


@dataclass(frozen=True, kw_only=True, slots=True)
class GeGLU(GatedActivation):
    """`gelu(gate) * up`.

    Attributes:
        approximate: "none" for the exact GELU, "tanh" for its tanh approximation.

    Source: Shazeer 2020, arXiv:2002.05202, section 2 (GEGLU).
    """

    approximate: Literal["none", "tanh"] = "none"

    def __post_init__(self) -> None:
        if self.approximate not in ("none", "tanh"):
            raise ValueError(
                f"approximate={self.approximate!r} must be 'none' or 'tanh'; set GeGLU.approximate"
            )

    def combine(self, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        """Combine (N, F) gate and (N, F) up into (N, F). Gradient flows."""
        return F.gelu(gate_NF, approximate=self.approximate) * up_NF


@dataclass(frozen=True, kw_only=True, slots=True)
class ClampedSwiGLU(GatedActivation):
    """`(up + 1) * gate * sigmoid(alpha * gate)` with gate <= limit and -limit <= up <= limit.

    No gradient flows where a clamp is active.

    Attributes:
        alpha: slope of the sigmoid, > 0.
        limit: clamp, > 0.

    Source: gpt-oss model card, arXiv:2508.10925, which mentions the clamping and the residual term (the 1);
    the formula and its constants are those of the released model code.
    """

    interleaved: bool = True
    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        for name in ("alpha", "limit"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be > 0; set ClampedSwiGLU.{name}")

    def combine(self, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        """Combine (N, F) gate and (N, F) up into (N, F). Gradient flows inside the clamps."""
        gate_NF = gate_NF.clamp(max=self.limit)
        up_NF = up_NF.clamp(min=-self.limit, max=self.limit)
        return (up_NF + 1) * (gate_NF * torch.sigmoid(self.alpha * gate_NF))


def read_whole(module: nn.Module, name: str) -> Tensor:
    """The parameter of that name, all of which is on this rank."""
    parameter: Tensor = getattr(module, name)
    return parameter


class Experts(nn.Module):
    """E feed-forward networks `down(act(gate_up(x)))` over rows sorted by expert.

    Parameters keep the names and the layout of fused checkpoints: `gate_up_proj` (E, 2F, D) and `down_proj`
    (E, D, F), or (E, D, 2F) and (E, F, D) when `transposed`; `gate_up_proj_bias` (E, 2F) and `down_proj_bias`
    (E, D) when `bias`.

    Attributes:
        read: (module, name) -> what this rank multiplies by; replaced where ranks hold parts of parameters.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        """Settings of `Experts`.

        Attributes:
            dim: D, width of the model.
            hidden_dim: F, width of one expert.
            num_experts: E.
            activation: what stands between the two multiplies.
            bias: add a bias after each multiply.
            transposed: store weights as (E, in, out) instead of (E, out, in).
            init_std: standard deviation of the normal that initialises weights; biases start at 0.

        Raises:
            ValueError: a width or the number of experts is not positive, or init_std is negative.
        """

        dim: int
        hidden_dim: int
        num_experts: int
        activation: GatedActivation = SwiGLU()
        bias: bool = False
        transposed: bool = False
        init_std: float = 0.02

        def __post_init__(self) -> None:
            for name in ("dim", "hidden_dim", "num_experts"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name}={getattr(self, name)} must be at least 1; set experts.{name}")
            if not self.init_std >= 0:
                raise ValueError(f"init_std={self.init_std} must be >= 0; set experts.init_std")

        def build(
            self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
        ) -> "Experts":
            """Build the module with initialised parameters on `device` in `dtype`."""
            return Experts(self, device=device, dtype=dtype)

    def __init__(
        self, config: Config, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.num_experts = config.num_experts
        self.activation = config.activation
        self.transposed = config.transposed

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        E, D, F2 = config.num_experts, config.dim, 2 * config.hidden_dim
        self.gate_up_proj = parameter(E, D, F2) if config.transposed else parameter(E, F2, D)
        self.down_proj = parameter(E, F2 // 2, D) if config.transposed else parameter(E, D, F2 // 2)
        self.gate_up_proj_bias = parameter(E, F2) if config.bias else None
        self.down_proj_bias = parameter(E, D) if config.bias else None
        self.read: Callable[[nn.Module, str], Tensor] = read_whole
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights from a normal of `init_std` and set biases to 0."""
        for name, parameter in self.named_parameters():
            if name.endswith("_bias"):
                parameter.zero_()
            else:
                parameter.normal_(std=self.config.init_std)

    def forward(self, x_ND: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        """Run each block of rows through its expert.

        Args:
            x_ND: (N, D) rows sorted by expert, in the weights' dtype. Gradient flows.
            num_tokens_per_expert_E: (E,) integer row counts that sum to N; zeros are ordinary. No gradient.

        Returns:
            (N, D) rows in the same order, not yet weighted by the router.

        Raises:
            ValueError: shapes, dtypes or counts disagree (see `grouped_mm`).
        """
        h_N2F = self._linear("gate_up_proj", x_ND, num_tokens_per_expert_E)
        return self._linear("down_proj", self.activation(h_N2F), num_tokens_per_expert_E)

    def _linear(self, name: str, x_ND: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        weight = self.read(self, name)
        bias_EF = self.read(self, f"{name}_bias") if self.config.bias else None
        return grouped_linear(x_ND, weight, bias_EF, num_tokens_per_expert_E, transposed=self.transposed)

    def extra_repr(self) -> str:
        """Return the widths, for `repr`."""
        c = self.config
        return (
            f"num_experts={c.num_experts}, dim={c.dim}, hidden_dim={c.hidden_dim}, "
            f"activation={c.activation}, bias={c.bias}, transposed={c.transposed}"
        )


def grouped_linear(
    x_ND: Tensor,
    weight: Tensor,
    bias_EF: Tensor | None,
    num_tokens_per_expert_E: Tensor,
    *,
    transposed: bool,
) -> Tensor:
    """Multiply each block of rows by its expert's matrix and add its expert's bias.

    Args:
        x_ND: (N, D) rows sorted by expert. Gradient flows.
        weight: (E, F, D), or (E, D, F) if `transposed`. Gradient flows.
        bias_EF: (E, F) or None. Gradient flows.
        num_tokens_per_expert_E: (E,) integer row counts that sum to N. No gradient.
        transposed: the weight is stored as (E, in, out).

    Returns:
        (N, F) rows in the dtype of the multiply.
    """
    y_NF = grouped_mm(x_ND, weight if transposed else weight.transpose(1, 2), num_tokens_per_expert_E)
    if bias_EF is None:
        return y_NF
    return y_NF + grouped_rows(bias_EF.to(y_NF.dtype), num_tokens_per_expert_E, x_ND.shape[0])


class SharedExperts(nn.Module):
    """A dense gated feed-forward network, `down(act(gate(x), up(x)))`, that every token passes through."""

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        """Settings of `SharedExperts`.

        Attributes:
            dim: D, width of the model.
            hidden_dim: width of all shared experts together (two experts of width F make 2F).
            activation: what stands between the multiplies; its `interleaved` does not matter here.
            gated: multiply the output by `sigmoid(w . x)`; the layer holds w as `shared_expert_gate`.
            init_std: standard deviation of the normal that initialises weights.

        Raises:
            ValueError: a width is not positive, or init_std is negative.
        """

        dim: int
        hidden_dim: int
        activation: GatedActivation = SwiGLU()
        gated: bool = False
        init_std: float = 0.02

        def __post_init__(self) -> None:
            for name in ("dim", "hidden_dim"):
                if getattr(self, name) < 1:
                    raise ValueError(
                        f"{name}={getattr(self, name)} must be at least 1; set shared_experts.{name}"
                    )
            if not self.init_std >= 0:
                raise ValueError(f"init_std={self.init_std} must be >= 0; set shared_experts.init_std")

        def build(
            self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
        ) -> "SharedExperts":
            """Build the module with initialised parameters on `device` in `dtype`."""
            return SharedExperts(self, device=device, dtype=dtype)

    def __init__(
        self, config: Config, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.activation = config.activation
        self.gate_proj = nn.Linear(config.dim, config.hidden_dim, bias=False, device=device, dtype=dtype)
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=False, device=device, dtype=dtype)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights from a normal of `init_std`."""
        for parameter in self.parameters():
            parameter.normal_(std=self.config.init_std)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Map (..., D) to (..., D). Gradient flows."""
        y_TD: Tensor = self.down_proj(self.activation.combine(self.gate_proj(x_TD), self.up_proj(x_TD)))
        return y_TD
