"""The choice by integer keys is that of `torch.topk`, bit for bit, whatever the values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.top_k import by_keys, keys_of

SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, -math.nan, 1e-45, -1e-45, 3e38, -3e38]


def chosen(ranks_TE: Tensor, top_k: int, *, in_place: bool = False) -> Tensor:
    ranks_TE = ranks_TE.clone()
    before_TE = ranks_TE.clone()
    keys_TE = keys_of(ranks_TE, ranks_TE if in_place else None)
    if not in_place:
        torch.testing.assert_close(ranks_TE, before_TE, rtol=0, atol=0, equal_nan=True)
    return keys_TE.topk(top_k, dim=-1).indices


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_as_torch_chooses(data: st.DataObject) -> None:
    """Of few different values, so that most are tied: torch leaves their choice to its algorithm."""
    experts = data.draw(st.integers(1, 80))
    top_k = data.draw(st.integers(1, experts))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    values = torch.tensor(data.draw(st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=5)), dtype=dtype)
    ranks_TE = values[torch.randint(len(values), (20, experts), generator=draw)]
    if data.draw(st.booleans()):
        some_TE = torch.rand(20, experts, generator=draw) < 0.5
        ranks_TE = torch.where(some_TE, torch.randn(20, experts, generator=draw, dtype=dtype), ranks_TE)
    want_TK = ranks_TE.topk(top_k, dim=-1).indices
    assert torch.equal(chosen(ranks_TE, top_k), want_TK)
    assert torch.equal(chosen(ranks_TE, top_k, in_place=True), want_TK)


@pytest.mark.parametrize(("experts", "top_k"), [(64, 8), (256, 8), (511, 8), (300, 32)])
def test_of_a_router(experts: int, top_k: int) -> None:
    logits_TE = torch.randn(500, experts, generator=torch.Generator().manual_seed(0))
    for ranks_TE in (logits_TE, logits_TE.sigmoid() - 0.5, logits_TE.bfloat16().float()):
        assert torch.equal(chosen(ranks_TE, top_k), ranks_TE.topk(top_k, dim=-1).indices)


def test_nothing_to_choose() -> None:
    assert chosen(torch.zeros(0, 4), 2).shape == (0, 2)


def test_where_keys_serve() -> None:
    """Not where torch.topk keeps a heap, nor on other devices."""
    ranks_TE = torch.zeros(4, 511)
    assert by_keys(ranks_TE, 8)
    assert not by_keys(torch.zeros(4, 512), 8)
    assert not by_keys(ranks_TE.to("meta"), 8)
    assert not by_keys(ranks_TE.half(), 8)


# torch's own import of its inductor passes warns.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_compiled() -> None:
    torch._dynamo.reset()
    logits_TE = torch.randn(60, 20, generator=torch.Generator().manual_seed(0))
    logits_TE[::7] = torch.tensor(SPECIAL)[torch.arange(20) % len(SPECIAL)]
    logits_TE[logits_TE == 0] = 0.0  # a compiler may think that adding 0 changes nothing
    keys_TE = torch.compile(keys_of, fullgraph=True)(logits_TE)
    assert torch.equal(keys_TE, keys_of(logits_TE))
    torch._dynamo.reset()
