"""What every variant of `routing_overhead` is made of: sizes, the common routing, layers of routers with losses,
and one forward and backward of it.

Shapes: T tokens, B sequences, D width, E experts, K top-k, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab
from trimtab.scores import ScoreName

COEF = 0.01
ROUTING = "routing: none"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size.

    Args:
        tokens: T.
        sequences: B.
        num_experts: E.
        top_k: K.
        layers: L.
        score: "softmax", or "sigmoid" with a bias for selection.
        gate_dim: D of a linear gate before the routing; 0: logits are leaves.
    """

    tokens: int
    sequences: int
    num_experts: int
    top_k: int
    layers: int
    score: ScoreName
    gate_dim: int = 0

    @property
    def unit(self) -> int:
        """Bytes of one float32 (T, E)."""
        return self.tokens * self.num_experts * 4


def add_parameters(module: nn.Module, case: Case) -> None:
    """The gate's weight, and the selection bias if the case has one: equal in all routers of a case."""
    generator = torch.Generator().manual_seed(case.num_experts + case.gate_dim)
    dim = case.gate_dim or case.num_experts
    module.weight = nn.Parameter(torch.randn(case.num_experts, dim, generator=generator) / dim**0.5)
    if case.score == "sigmoid":
        module.expert_bias_E = 0.05 * torch.randn(case.num_experts, generator=generator)


class Routing(nn.Module):
    """Scores, top-k, renormalised weights, of logits or of a gate's input."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.score = case.num_experts, case.top_k, case.score
        self.register_buffer("expert_bias_E", None)
        add_parameters(self, case)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits, weights, ids and scores."""
        logits_TE = F.linear(x, self.weight) if hasattr(self, "weight") else x
        if self.score == "softmax":
            scores_TE = logits_TE.softmax(dim=-1)
            weights_TK, ids_TK = scores_TE.topk(self.top_k, dim=-1)
        else:
            scores_TE = logits_TE.sigmoid()
            ids_TK = (scores_TE + self.expert_bias_E).topk(self.top_k, dim=-1).indices
            weights_TK = scores_TE.gather(1, ids_TK)
        return logits_TE, weights_TK / weights_TK.sum(dim=-1, keepdim=True), ids_TK, scores_TE


class Losses:
    """Losses of one variant as its library or formula has them; by default none."""

    def layer(self, routed: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        """Weights and the loss of one layer, if it is not already inside the weights."""
        return routed[1], None

    def model(self, logits: Sequence[Tensor]) -> Tensor | None:
        """A loss over the logits of all layers."""
        return None


class Net(nn.Module):
    """L routers; returns what is backpropagated: each layer's weights, and losses to add."""

    def __init__(
        self, case: Case, losses: Losses | None = None, router: Callable[[Case], nn.Module] = Routing
    ) -> None:
        super().__init__()
        self.routers = nn.ModuleList(router(case) for _ in range(case.layers))
        self.losses = losses or Losses()

    def forward(self, input_ids: Tensor, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and losses."""
        weights, losses, logits = [], [], []
        for router, x in zip(self.routers, inputs, strict=True):
            routed = router(x)
            weight, loss = self.losses.layer(routed)
            weights.append(weight)
            logits.append(routed[0])
            losses += [] if loss is None else [loss]
        loss = self.losses.model(logits)
        return weights, losses if loss is None else [*losses, loss]


@dataclass
class Variant:
    """One row.

    Args:
        family: who computes it.
        objective: which losses; a key of `OBJECTIVES`, or "none".
        net: what runs.
        balancer: trimtab's, whose step ends each repetition.
        own_base: name of the variant that is the same router without losses.
        interleaved: sequences are every B-th row, not consecutive rows.
        unbiased: it counts the top-k of the scores without bias.
        reference_factor: its gradient over that of the reference.
        dense: weights are (T, E).
        compiled: the net compiled, to run in its place.
    """

    family: str
    objective: str
    net: Net
    balancer: trimtab.Balancer | None = None
    own_base: str = ROUTING
    interleaved: bool = False
    unbiased: bool = False
    reference_factor: float = 1.0
    dense: bool = False
    compiled: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        """Key in results."""
        return f"{self.family}: {self.objective}"


@dataclass
class Data:
    """Inputs and upstream gradients of one case."""

    input_ids: Tensor
    inputs: list[Tensor]
    grads_TK: list[Tensor]
    grads_TE: list[Tensor]


def make_data(case: Case, seed: int = 0) -> Data:
    """Random logits (leaves) or gate inputs, and random gradients of the routing weights."""
    generator = torch.Generator().manual_seed(seed)
    width = case.gate_dim or case.num_experts

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    layers = range(case.layers)
    return Data(
        input_ids=torch.zeros(case.sequences, case.tokens // case.sequences, dtype=torch.int64),
        inputs=[randn(case.tokens, width).requires_grad_() for _ in layers],
        grads_TK=[randn(case.tokens, case.top_k) for _ in layers],
        grads_TE=[randn(case.tokens, case.num_experts) for _ in layers],
    )


def forward(variant: Variant, data: Data) -> tuple[list[Tensor], list[Tensor | None]]:
    """One forward of all layers: what to backpropagate, and with which gradients."""
    run = variant.compiled or variant.net
    weights, losses = run(data.input_ids, data.inputs)
    grads: list[Tensor | None] = list(data.grads_TE if variant.dense else data.grads_TK)
    return [*weights, *losses], [*grads, *([None] * len(losses))]


def backward(result: tuple[list[Tensor], list[Tensor | None]]) -> None:
    """The backward of `forward`'s result."""
    torch.autograd.backward(*result)


def clear(variant: Variant, data: Data) -> None:
    """End the optimiser step and drop gradients; not timed."""
    if variant.balancer is not None:
        variant.balancer.step()
    drop_gradients(variant, data)


def drop_gradients(variant: Variant, data: Data) -> None:
    """Of inputs and parameters."""
    for tensor in (*data.inputs, *variant.net.parameters()):
        tensor.grad = None
