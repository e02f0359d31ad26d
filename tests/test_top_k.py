"""The choice of experts: in the order of floats, the lowest ids of equal ones, whatever the values and the size."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import trimtab
from trimtab import top_k as module
from trimtab.routing import Routing, choose
from trimtab.scores import ScoreName
from trimtab.top_k import keys_of, largest_ids, largest_ids_of_blocks

SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, -math.nan, 1e-45, -1e-45, 3e38, -3e38]


@pytest.fixture(params=["rounds", "sorting"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(module, "_LEAST_ELEMENTS", 0)
    monkeypatch.setattr(module, "_MOST_ROUNDS", 1000 if request.param == "rounds" else 0)
    return str(request.param)


def naive_ids(ranks_TE: Tensor, top_k: int) -> list[list[int]]:
    """Python's sort, which is stable, of values in which NaN is the largest."""
    rows = ranks_TE.tolist()
    keys = [[(-1, 0.0) if math.isnan(value) else (0, -value) for value in row] for row in rows]
    return [sorted(range(len(row)), key=row.__getitem__)[:top_k] for row in keys]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_order_and_ties(data: st.DataObject) -> None:
    """Of few different values, so that most are tied."""
    experts = data.draw(st.integers(1, 80))
    top_k = data.draw(st.integers(1, experts))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    values = torch.tensor(data.draw(st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=5)), dtype=dtype)
    ranks_TE = values[torch.randint(len(values), (20, experts), generator=draw)]
    if data.draw(st.booleans()):
        some_TE = torch.rand(20, experts, generator=draw) < 0.5
        ranks_TE = torch.where(some_TE, torch.randn(20, experts, generator=draw, dtype=dtype), ranks_TE)
    before_TE = ranks_TE.clone()
    ids_TK = largest_ids(ranks_TE, top_k)
    assert ids_TK.tolist() == naive_ids(ranks_TE, top_k)
    torch.testing.assert_close(ranks_TE, before_TE, rtol=0, atol=0, equal_nan=True)
    # With another number of rows, columns lie elsewhere in vector registers.
    assert torch.equal(largest_ids(ranks_TE[7:8], top_k), ids_TK[7:8])


@pytest.mark.parametrize(("experts", "top_k"), [(64, 8), (256, 8), (512, 8), (300, 32)])
def test_of_a_router(experts: int, top_k: int) -> None:
    logits_TE = torch.randn(500, experts, generator=torch.Generator().manual_seed(0))
    for ranks_TE in (logits_TE, logits_TE.sigmoid() - 0.5, logits_TE.bfloat16().float()):
        want_TE = ranks_TE.sort(dim=-1, descending=True, stable=True).indices
        assert torch.equal(largest_ids(ranks_TE, top_k), want_TE[:, :top_k])


def test_into_given_memory() -> None:
    ranks_TE = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    all_TK = torch.full((7, 3), -1)
    largest_ids(ranks_TE, 3, all_TK[1:6])
    assert all_TK[1:6].tolist() == naive_ids(ranks_TE, 3)
    assert all_TK[[0, 6]].eq(-1).all()


def test_nothing_to_choose() -> None:
    assert largest_ids(torch.zeros(0, 4), 2).shape == (0, 2)


def test_groups_of_experts() -> None:
    ranks_THN = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(largest_ids(ranks_THN, 2), ranks_THN.topk(2).indices)


# torch's own import of its inductor passes warns.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_compiled() -> None:
    torch._dynamo.reset()
    logits_TE = torch.randn(60, 20, generator=torch.Generator().manual_seed(0))
    logits_TE[::7] = torch.tensor(SPECIAL)[torch.arange(20) % len(SPECIAL)]
    keys_TE = torch.compile(keys_of, fullgraph=True)(logits_TE)
    assert torch.equal(keys_TE, keys_of(logits_TE))
    torch._dynamo.reset()


def test_the_operator_of_compiled_models(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks_TE = torch.randn(700, 20, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    monkeypatch.setattr("trimtab.blocks.BLOCK_ELEMENTS", 512)
    assert torch.equal(largest_ids_of_blocks(ranks_TE, 3), largest_ids(ranks_TE, 3))
    torch.library.opcheck(largest_ids_of_blocks, (ranks_TE, 3))
    assert largest_ids_of_blocks(ranks_TE[:0], 3).shape == (0, 3)


def test_one_graph_for_all_numbers_of_tokens() -> None:
    torch._dynamo.reset()
    routing = Routing(top_k=2, score="sigmoid", normalize_top_k=True)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda logits_TE: choose(logits_TE, routing, None), backend=backend, dynamic=True
    )
    for tokens in (5, 8, 300, 7):
        logits_TE = torch.randn(tokens, 6, generator=torch.Generator().manual_seed(tokens))
        assert torch.equal(compiled(logits_TE), choose(logits_TE, routing, None))
    assert len(graphs) == 1
    # torch 2.11 says of everything that it compiles that it exports it, which has torch's operators alone.
    is_exporting = torch.compile(lambda x: x + torch.compiler.is_exporting(), backend="eager")
    assert ("trimtab.largest_ids" in str(graphs[0].graph)) == (is_exporting(torch.zeros(())) == 0)
    torch._dynamo.reset()


def evaluated_router(score: ScoreName) -> trimtab.Router:
    config = trimtab.Router.Config(dim=4, num_experts=6, top_k=2, score=score, normalize_top_k=True)
    return config.build().eval()


def test_what_is_exported_needs_no_operator_of_the_package() -> None:
    router = (
        trimtab.Router.Config(dim=4, num_experts=6, top_k=2, score="sigmoid", normalize_top_k=True)
        .build()
        .eval()
    )
    x_TD = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(router, (x_TD,))
    assert "trimtab" not in str(program.graph)
    for one, other in zip(program.module()(x_TD), router(x_TD), strict=True):
        torch.testing.assert_close(one, other)


def test_over_a_batch_axis() -> None:
    router = (
        trimtab.Router.Config(dim=4, num_experts=6, top_k=2, score="softmax", normalize_top_k=True)
        .build()
        .eval()
    )
    x_BTD = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for one, other in zip(torch.vmap(router)(x_BTD), router(x_BTD.flatten(0, 1)), strict=True):
            torch.testing.assert_close(one.flatten(0, 1), other)
