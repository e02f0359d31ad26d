"""The faults of published plans, reproduced: the checks that the right plan passes must catch each of them.

A MoE layer in a model whose activations are whole over tp, with routing that is not split over tp as here, or
with a gradient that is reduced too rarely or too often.
"""

import contextlib
import dataclasses
from collections.abc import Iterable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn.utils import parametrize

import trimtab
from tests.parallel.boundary import OBJECTIVES, TP2_EP2, TP2_ETP2, B, Host, Plan, S, check
from tests.parallel.pool import Ranks
from trimtab import GradReduction, Sign, TokenRanks
from trimtab.dispatch import DispatchedTokens, Dispatcher
from trimtab.moe import MoE
from trimtab.parallel import collectives
from trimtab.parallel.dispatch import ExpertParallelDispatcher
from trimtab.parallel.experts import sum_gradients
from trimtab.parallel.mesh import Degrees
from trimtab.parallel.placements import CROSSINGS, split


class NotSummedOverTP(Plan):
    """torchtitan #2387: the router's gradient is summed over data ranks only."""

    def reduce(self, host: Host) -> None:
        if (data := self.mesh.group("data")) is not None:
            for parameter in host.parameters():
                dist.all_reduce(parameter.grad, group=data)


class InputReducedTwice(Plan):
    """The gradient of the block's input is reduced once more."""

    def crossings(self) -> contextlib.AbstractContextManager[Any]:
        def convert(x: Tensor, dim: int, group: str) -> Tensor:
            return split(sum_in_backward(x, group), dim, group)

        row = dataclasses.replace(CROSSINGS["block.input"], convert=convert)
        return mock.patch.dict(CROSSINGS, {"block.input": row})


class _SumInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=collectives.resolve(ctx.group))
        return grad, None


class _SumInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=collectives.resolve(group))
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def sum_in_backward(x: Tensor, group: str) -> Tensor:
    """Identity on a value that is whole; its gradient is partial and becomes whole."""
    out: Tensor = _SumInBackward.apply(x, group)
    return out


class WholeDispatcher:
    """Tokens are split over tp only here: router and weights are whole, and their gradients partial."""

    def __init__(self, inner: Dispatcher, num_ranks: int, rank: int) -> None:
        self.inner, self.num_ranks, self.rank = inner, num_ranks, rank

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, **settings: bool
    ) -> DispatchedTokens:
        mine = [t.chunk(self.num_ranks)[self.rank] for t in (x_TD, ids_TK, weights_TK)]
        return self.inner.dispatch(*mine, **settings)  # type: ignore[arg-type]

    def combine(self, y_ND: Tensor, plan: Any) -> Tensor:
        y_TD = self.inner.combine(y_ND, plan)
        zeros = torch.zeros_like(y_TD)
        return torch.cat([y_TD if rank == self.rank else zeros for rank in range(self.num_ranks)])


class RouterOnWholeTokens(Plan):
    """The published plan, done right: every rank of tp routes all tokens, and the boundary sums once.

    In backward the block's input, the top-k weights and the router's weights have partial gradients.
    """

    aux_scale_undone = True

    def crossings(self) -> contextlib.AbstractContextManager[Any]:
        rows = {
            "block.input": dataclasses.replace(
                CROSSINGS["block.input"], convert=lambda x, dim, group: sum_in_backward(x, group)
            ),
            "block.output": dataclasses.replace(
                CROSSINGS["block.output"], convert=lambda x, dim, group: _SumInForward.apply(x, group)
            ),
        }
        return mock.patch.dict(CROSSINGS, rows)

    def apply(self, layer: MoE) -> None:
        super().apply(layer)
        inner = layer.dispatcher
        assert isinstance(inner, ExpertParallelDispatcher)
        if inner.etp is None:
            layer.dispatcher = WholeDispatcher(inner, self.tp.size(), self.tp.rank())
        else:
            # Every rank has all tokens for its slice of the experts already.
            layer.dispatcher = dataclasses.replace(inner, etp=None)

    def attach(self, host: Host) -> tuple[trimtab.Balancer, dict[str, Any]]:
        # Every rank of tp injects the gradient of all tokens; in a sum over tp each must give its share only.
        divisor = 1 / self.tp.size() if self.aux_scale_undone else 1.0
        balancer = trimtab.attach(
            host,
            OBJECTIVES,
            bias=Sign.Config(speed=0.01),
            reduction=GradReduction(num_ranks=self.mesh.size("data"), divisor=divisor),
            ranks=TokenRanks(tokens=self.mesh.group("data")),
        )
        return balancer, {"batch_shape": (B, S)}


class RouterNotSummedOverTP(RouterOnWholeTokens, NotSummedOverTP):
    """torchtitan #2387 as it was: partial gradients of the router's weights are never summed over tp."""


class GateReducesItsInput(RouterOnWholeTokens):
    """torchtitan after #2416: the gate's input conversion sums its gradient, and the boundary again."""

    def apply(self, layer: MoE) -> None:
        super().apply(layer)
        layer.router.register_forward_pre_hook(
            lambda router, args: (sum_in_backward(args[0], self.tp.group_name),)
        )


class AuxCountsTPTimes(RouterOnWholeTokens):
    """A loss injected in full on scores that are whole over tp, where gradients are partial."""

    aux_scale_undone = False


class _ReadPartial(nn.Module):
    def forward(self, weight: DTensor) -> Tensor:
        return weight.to_local(grad_placements=[Partial()])


class RouterGradientStaysPartial(RouterOnWholeTokens):
    """The router's weight is a DTensor whose gradient is Partial over tp, and somebody reads its local part."""

    read_local = True

    def apply(self, layer: MoE) -> None:
        super().apply(layer)
        mesh = self.mesh.device_mesh("tp")
        weight = DTensor.from_local(layer.router.weight.detach(), mesh, [Replicate()], run_check=False)
        layer.router.weight = nn.Parameter(weight)
        parametrize.register_parametrization(layer.router, "weight", _ReadPartial(), unsafe=True)

    def reduce(self, host: Host) -> None:
        sum_gradients([p for n, p in host.moe.named_parameters() if "parametrizations" not in n], self.mesh)

    def router_gradient(self, router: Any) -> Tensor:
        grad = router.parametrizations.weight.original.grad
        assert grad.placements == (Partial(),)
        return grad.to_local() if self.read_local else grad.full_tensor()


class RouterGradientReadWhole(RouterGradientStaysPartial):
    """The same, read as what it is."""

    read_local = False


ROUTER, INPUT, UPSTREAM = "moe.0.router.weight", "x.grad", "inner.0.weight"


def run_plan(
    ranks: Ranks, plan: type[Plan], degrees: Degrees, before: bool, steps: int = 1
) -> list[dict[str, Any]]:
    results = ranks.run(check, 2, degrees, {"before": before, "shared": False}, plan, steps)
    for result in results:
        assert result["errors"]["y"] < 1e-12, "every plan here computes the right output"
    return results


def right(errors: dict[str, float], but: Iterable[str] = ()) -> bool:
    return all(error < 1e-10 for name, error in errors.items() if name not in but)


both_etp = pytest.mark.parametrize("degrees", [TP2_EP2, TP2_ETP2], ids=["etp1", "etp2"])
both_orders = pytest.mark.parametrize("before", [False, True], ids=["score after", "score before"])


@both_etp
@both_orders
def test_the_published_plan_done_right_passes(ranks: Ranks, degrees: Degrees, before: bool) -> None:
    """So what fails below fails for its fault."""
    for result in run_plan(ranks, RouterOnWholeTokens, degrees, before, steps=20):
        assert right(result["errors"]), result["errors"]
        assert set(result["drift"].values()) == {0.0}


@pytest.mark.parametrize("plan", [NotSummedOverTP, RouterNotSummedOverTP])
@both_etp
@both_orders
def test_router_gradient_that_is_not_summed_over_tp(
    ranks: Ranks, plan: type[Plan], degrees: Degrees, before: bool
) -> None:
    for result in run_plan(ranks, plan, degrees, before, steps=20):
        assert result["errors"][ROUTER] > 0.05
        assert result["errors"][INPUT] < 1e-10  # which is why nobody saw it in the input's gradient
        assert result["drift"][ROUTER] > 1e-3


@both_etp
@both_orders
def test_input_gradient_that_the_gate_and_the_boundary_both_reduce(
    ranks: Ranks, degrees: Degrees, before: bool
) -> None:
    for result in run_plan(ranks, GateReducesItsInput, degrees, before):
        assert right(result["errors"], but=(INPUT, UPSTREAM, "inner.0.bias"))
        assert result["errors"][ROUTER] < 1e-10  # the gate is right
        assert result["errors"][INPUT] > 0.05
        assert result["errors"][UPSTREAM] > 0.05


@both_etp
def test_input_gradient_that_is_reduced_twice(ranks: Ranks, degrees: Degrees) -> None:
    for result in run_plan(ranks, InputReducedTwice, degrees, False):
        assert right(result["errors"], but=(INPUT, UPSTREAM, "inner.0.bias"))
        assert result["errors"][INPUT] > 0.05
        assert result["errors"][UPSTREAM] > 0.05


@both_etp
def test_auxiliary_gradient_that_counts_once_for_each_rank_of_tp(ranks: Ranks, degrees: Degrees) -> None:
    for result in run_plan(ranks, AuxCountsTPTimes, degrees, False, steps=20):
        assert set(result["drift"].values()) == {0.0}  # copies agree, on a wrong value
        assert result["errors"][ROUTER] > 0.05
        assert result["errors"][INPUT] > 0.01


def test_partial_gradient_that_is_read_through_to_local(ranks: Ranks) -> None:
    for result in run_plan(ranks, RouterGradientStaysPartial, TP2_EP2, False):
        assert right(result["errors"], but=(ROUTER,))
        assert result["errors"][ROUTER] > 0.05
    for result in run_plan(ranks, RouterGradientReadWhole, TP2_EP2, False):
        assert right(result["errors"])
