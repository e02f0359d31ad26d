"""Fused routing is cheap: few operators, and one tensor of the logits' size held."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.instruments import count_ops
from tests.test_fused import Case, routing
from trimtab.fused import route
from trimtab.routing import choose, weigh
from trimtab.scores import SCORE_NAMES


def plain_routing(case: Case) -> None:
    logits_TE = case.logits_TE.clone().requires_grad_()
    weigh(logits_TE, choose(logits_TE.detach(), case.routing, None), case.routing).backward(case.grad_TK)


def fused_with(*, targets: bool, z: bool) -> Any:
    def run(case: Case) -> None:
        logits_TE = case.logits_TE.clone().requires_grad_()
        target_GE, z_weight = case.target_GE if targets else None, case.z_weight if z else None
        given = {"num_groups": case.num_groups, "target_GE": target_GE, "z_weight": z_weight}
        route(logits_TE, case.routing, **given).weights_TK.backward(case.grad_TK)

    return run


@pytest.mark.parametrize("groups", ["one", "sequences"])
def test_few_operators(groups: str) -> None:
    """Of one block. Over routing alone: counting and the node, then all balance losses together, then z-loss."""
    case = Case(routing(), 12, 6, groups=groups, dtype=torch.float32)
    alone = count_ops(partial(plain_routing, case))
    counted = count_ops(partial(fused_with(targets=False, z=False), case))
    balanced = count_ops(partial(fused_with(targets=True, z=False), case))
    everything = count_ops(partial(fused_with(targets=True, z=True), case))
    assert counted - alone <= 8
    assert balanced - counted <= 2
    assert everything - balanced <= 6


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", SCORE_NAMES)
def test_one_tensor_of_the_logits_size_is_held(score: str, normalize: bool) -> None:
    case = Case(
        routing(score=score, normalize_top_k=normalize), 30, 64, groups="sequences", dtype=torch.float32
    )
    held: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    logits_TE = case.logits_TE.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        case.run(logits_TE)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    ids = case.tokens * case.routing.top_k * 2
    assert sum(storages.values()) == logits_TE.untyped_storage().nbytes() + ids
