"""Settings of a routing, and the edges of what its operators take."""

import re
from typing import Any

import pytest
import torch

from trimtab import route_ops
from trimtab.fused import route
from trimtab.routing import Routing


def routing(**options: Any) -> Routing:
    return Routing(**({"top_k": 2, "score": "softmax", "normalize_top_k": True} | options))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("score='relu' is unknown", {"score": "relu"}),
        ("top_k=0 must be at least 1", {"top_k": 0}),
        ("top_k_groups=3 must be in [1, num_expert_groups=2]", {"num_expert_groups": 2, "top_k_groups": 3}),
        ("group_score='mean' must be", {"group_score": "mean"}),
        ("score_after_top_k=True needs score='softmax'", {"score": "sigmoid", "score_after_top_k": True}),
    ],
)
def test_settings_are_checked(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        routing(**options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.float64])
def test_targets_of_another_dtype_are_converted(dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    logits_TE = torch.randn(6, 4).to(dtype).requires_grad_()
    target_GE, z_weight = torch.rand(1, 4, dtype=target_dtype), torch.tensor(0.1, dtype=target_dtype)
    routed = route(logits_TE, routing(normalize_top_k=False), target_GE=target_GE, z_weight=z_weight)
    routed.weights_TK.sum().backward()
    assert logits_TE.grad is not None
    assert logits_TE.grad.dtype == dtype


def test_no_groups_count_nothing() -> None:
    counts_GE = route_ops.forward(torch.randn(8, 4), None, None, None, None, 0, False, routing())[2]
    assert counts_GE.shape == (0, 4)
    with pytest.raises(ValueError, match="num_groups=0 must be at least 1"):
        route(torch.randn(8, 4), routing(), num_groups=0)
