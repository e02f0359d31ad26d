"""Dispatch between ranks against one process that holds all tokens and all experts.

Shapes: T tokens, K top-k, N rows, D model, E experts, R ranks.
"""

import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters

from tests.parallel.pool import Ranks, mesh_of
from trimtab.dispatch import DispatchedTokens, Dispatcher, LocalDispatcher
from trimtab.parallel.dispatch import ExpertParallelDispatcher, swapped_blocks
from trimtab.parallel.mesh import Degrees

E, D = 8, 4

EP2 = Degrees(dp_shard=2, ep=2)
EP4 = Degrees(dp_shard=4, ep=4)
EP2_OF_4 = Degrees(dp_shard=4, ep=2)
ETP2 = Degrees(tp=2, etp=2)
EP2_ETP2 = Degrees(dp_shard=2, tp=2, ep=2, etp=2)
# tp ranks hold tokens of their own, so experts may be divided over them
EP4_OVER_TP = Degrees(dp_shard=2, tp=2, ep=4)


# ------------------------------------------------------------------ what ranks do


def make_tokens(num_tokens: int, top_k: int, which: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x_TD, ids_TK, weights_TK) in float64; ``which`` says what experts the tokens choose."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(num_tokens, D, generator=generator, dtype=torch.float64)
    ids_TK = torch.rand(num_tokens, E, generator=generator).argsort(-1)[:, :top_k].contiguous()
    if which == "last rank":
        ids_TK = E - 1 - ids_TK.argsort(-1)
    elif which == "one expert":
        ids_TK = torch.full((num_tokens, top_k), 2)
    weights_TK = torch.rand(num_tokens, top_k, generator=generator, dtype=torch.float64)
    return x_TD, ids_TK, weights_TK


def expert_outputs(tokens: DispatchedTokens, first_expert: int, etp_rank: int, num_etp: int) -> Tensor:
    """What experts might do: every row gets a nonlinear function of its own expert's number.

    With etp it is the sum over ranks, of which each has another share.
    """
    num_local = tokens.num_tokens_per_expert_e.shape[0]
    numbers_e = torch.arange(first_expert + 1, first_expert + num_local + 1, dtype=torch.float64)
    number_N1 = torch.repeat_interleave(numbers_e, tokens.num_tokens_per_expert_e)[:, None]
    share = (etp_rank + 1) / (num_etp * (num_etp + 1) / 2)
    return (tokens.x_ND * number_N1).sin() * number_N1 * share


def run(dispatcher: Dispatcher, inputs: Any, before: bool, *place: int) -> tuple[Tensor, Tensor, Tensor]:
    """Output and the gradients of tokens and weights."""
    x_TD, ids_TK, weights_TK = inputs
    x_TD, weights_TK = x_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
    tokens = dispatcher.dispatch(x_TD, ids_TK, weights_TK, score_before_experts=before)
    y_TD = dispatcher.combine(expert_outputs(tokens, *place), tokens.plan)
    y_TD.cos().sum().backward()
    assert x_TD.grad is not None
    assert weights_TK.grad is not None
    return y_TD.detach(), x_TD.grad, weights_TK.grad


def compare_with_one_process(
    degrees: Degrees, num_tokens: list[int], top_k: int, which: str, before: bool
) -> tuple[float, int]:
    """Largest difference on this rank, and the rows its experts got."""
    mesh, rank = mesh_of(degrees), dist.get_rank()
    every = [make_tokens(num, top_k, which, seed) for seed, num in enumerate(num_tokens)]
    whole = tuple(torch.cat(parts) for parts in zip(*every, strict=True))
    want = run(LocalDispatcher(num_experts=E), whole, before, 0, 0, 1)
    dispatcher = ExpertParallelDispatcher.make(E, mesh)
    first = mesh.rank("ep") * (E // mesh.size("ep"))
    place = (first, mesh.rank("etp"), mesh.size("etp"))
    have = run(dispatcher, every[rank], before, *place)
    error = 0.0
    for mine, theirs in zip(have, want, strict=True):
        theirs = theirs.split(num_tokens)[rank]
        assert mine.shape == theirs.shape
        error = max(error, float((mine - theirs).abs().max()) if mine.numel() else 0.0)
    tokens = dispatcher.dispatch(*every[rank], score_before_experts=before)
    return error, tokens.x_ND.shape[0]


def received_rows() -> tuple[list[list[float]], list[int], list[int]]:
    """What rank's experts get when rank r's tokens t have the value 10 r + t."""
    rank = dist.get_rank()
    x_TD = (10.0 * rank + torch.arange(3.0))[:, None].expand(3, 2)
    ids_TK = torch.tensor([[[3, 0], [0, 2], [3, 2]], [[0, 1], [3, 0], [2, 3]]])[rank]
    dispatcher = ExpertParallelDispatcher.make(4, mesh_of(EP2))
    tokens = dispatcher.dispatch(x_TD, ids_TK, torch.ones(3, 2), score_before_experts=False)
    exchange = tokens.plan.exchange
    return tokens.x_ND.tolist(), tokens.num_tokens_per_expert_e.tolist(), exchange.receive_R.tolist()


def unordered_sums(degrees: Degrees, before: bool) -> set[str]:
    """Autograd nodes of one dispatch and combine whose backward adds rows in no fixed order."""
    torch.use_deterministic_algorithms(True)
    try:
        x_TD, ids_TK, weights_TK = make_tokens(5, 2, "random", dist.get_rank())
        x_TD.requires_grad_()
        weights_TK.requires_grad_()
        dispatcher = ExpertParallelDispatcher.make(E, mesh_of(degrees))
        x_ND, _, plan = dispatcher.dispatch(x_TD, ids_TK, weights_TK, score_before_experts=before)
        y_TD = dispatcher.combine(x_ND, plan)
        nodes, names = [y_TD.grad_fn], set()
        while nodes:
            node = nodes.pop()
            assert node is not None
            names.add(node.name())
            nodes += [n for n, _ in node.next_functions if n is not None]
        y_TD.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert "IndexCopyBackward0" in names
    return names & {"IndexBackward0", "IndexSelectBackward0", "GatherBackward0"}


def compiled(degrees: Degrees, backend: str) -> tuple[float, int]:
    """Largest difference between compiled and eager over several routings, and the graphs compiled."""
    mesh, rank = mesh_of(degrees), dist.get_rank()
    dispatcher = ExpertParallelDispatcher.make(E, mesh)

    def layer(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        tokens = dispatcher.dispatch(x_TD, ids_TK, weights_TK, score_before_experts=False)
        return dispatcher.combine(tokens.x_ND.sin(), tokens.plan)

    torch._dynamo.reset()
    counters.clear()
    fast = torch.compile(layer, fullgraph=True, backend=backend)
    error = 0.0
    for seed, which in enumerate(("random", "last rank", "one expert", "random")):
        x_TD, ids_TK, weights_TK = make_tokens(6, 2, which, 10 * seed + rank)
        results = []
        for call in (layer, fast):
            x, weights = x_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
            y_TD = call(x, ids_TK, weights)
            y_TD.cos().sum().backward()
            assert x.grad is not None
            assert weights.grad is not None
            results.append((y_TD.detach(), x.grad, weights.grad))
        error = max(error, *(float((a - b).abs().max()) for a, b in zip(*results, strict=True)))
    return error, counters["stats"]["unique_graphs"]


def refusal() -> str:
    try:
        ExpertParallelDispatcher.make(7, mesh_of(EP2))
    except ValueError as error:
        return str(error)
    return ""


def pickled() -> bool:
    dispatcher = ExpertParallelDispatcher.make(E, mesh_of(EP2))
    return pickle.loads(pickle.dumps(dispatcher)) == dispatcher


# ------------------------------------------------------------------ tests


@given(sizes=st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=4))
def test_swapped_blocks_sorts_blocks_the_other_way(sizes: list[list[int]]) -> None:
    sizes_AB = torch.tensor(sizes)
    num_rows = int(sizes_AB.sum())
    # each row says which block it is in, and which row of it
    rows = [(b, a, n) for a, row in enumerate(sizes) for b, size in enumerate(row) for n in range(size)]
    target_N = swapped_blocks(sizes_AB, num_rows).tolist()
    moved: list[Any] = [None] * num_rows
    for row, target in zip(rows, target_N, strict=True):
        moved[target] = row
    assert moved == sorted(rows)
    back_N = swapped_blocks(sizes_AB.t(), num_rows)
    assert back_N[target_N].tolist() == list(range(num_rows))


@pytest.mark.parametrize("before", [False, True], ids=["score after", "score before"])
@pytest.mark.parametrize(
    ("degrees", "num_tokens", "top_k", "which"),
    [
        pytest.param(EP2, [5, 5], 2, "random", id="ep2"),
        pytest.param(EP2, [7, 2], 3, "random", id="ep2 uneven"),
        pytest.param(EP2, [0, 4], 2, "random", id="ep2, a rank without tokens"),
        pytest.param(EP2, [0, 0], 2, "random", id="ep2, no tokens at all"),
        pytest.param(EP2, [5, 3], 1, "random", id="ep2, K=1"),
        pytest.param(EP4, [3, 6, 0, 1], 2, "random", id="ep4 uneven"),
        pytest.param(EP4, [3, 6, 2, 1], 2, "last rank", id="ep4, all to one rank"),
        pytest.param(EP4, [3, 6, 2, 1], 1, "one expert", id="ep4, all to one expert"),
        pytest.param(EP2_OF_4, [3, 6, 0, 1], 2, "random", id="two groups of ep2"),
        pytest.param(EP4_OVER_TP, [3, 3, 2, 2], 2, "random", id="ep4 over dp and tp"),
        pytest.param(ETP2, [5, 5], 2, "random", id="etp2"),
        pytest.param(ETP2, [0, 0], 2, "random", id="etp2, no tokens at all"),
        pytest.param(EP2_ETP2, [4, 4, 1, 1], 2, "random", id="ep2 x etp2 uneven"),
        pytest.param(EP2_ETP2, [3, 3, 0, 0], 1, "one expert", id="ep2 x etp2, all to one expert"),
    ],
)
def test_output_and_gradients_are_those_of_one_process(
    ranks: Ranks, degrees: Degrees, num_tokens: list[int], top_k: int, which: str, before: bool
) -> None:
    results = ranks.run(
        compare_with_one_process, degrees.world_size, degrees, num_tokens, top_k, which, before
    )
    assert max(error for error, _ in results) < 1e-12
    rows = [num for _, num in results]
    # every token-expert pair is computed once on each rank of etp
    assert sum(rows) == sum(num_tokens) * top_k * degrees.etp
    if which == "last rank":
        assert rows == [0, 0, 0, sum(num_tokens) * top_k]


def test_rows_are_sorted_by_expert_then_rank_then_token(ranks: Ranks) -> None:
    (rows0, counts0, received0), (rows1, counts1, received1) = ranks.run(received_rows, 2)
    assert rows0 == [[v, v] for v in (0.0, 1.0, 10.0, 11.0, 10.0)]
    assert counts0 == [4, 1]
    assert received0 == [2, 3]
    assert rows1 == [[v, v] for v in (1.0, 2.0, 12.0, 0.0, 2.0, 11.0, 12.0)]
    assert counts1 == [3, 4]
    assert received1 == [4, 3]


@pytest.mark.parametrize("before", [False, True])
def test_nothing_is_summed_in_no_order(ranks: Ranks, before: bool) -> None:
    assert ranks.run(unordered_sums, 4, EP2_ETP2, before) == [set()] * 4


@pytest.mark.parametrize("degrees", [EP2, ETP2], ids=["ep2", "etp2"])
def test_compiles_as_one_graph_for_every_routing(ranks: Ranks, degrees: Degrees) -> None:
    for error, num_graphs in ranks.run(compiled, 2, degrees, "aot_eager"):
        assert error < 1e-12
        assert num_graphs == 1


def test_ep_must_divide_the_experts(ranks: Ranks) -> None:
    for message in ranks.run(refusal, 2):
        assert message == (
            "ep=2 must divide num_experts=7, so that ranks hold equally many; choose another ep"
        )


def test_a_dispatcher_pickles(ranks: Ranks) -> None:
    assert ranks.run(pickled, 2) == [True, True]
