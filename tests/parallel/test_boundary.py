"""A MoE layer in a model whose activations are whole over tp: values, gradients, bits, collectives, compile."""

import contextlib
import copy
import dataclasses
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from tests.parallel.boundary import TP2_EP2, TP2_ETP2, B, D, S, check, make_batch, make_host
from tests.parallel.pool import Ranks, mesh_of
from trimtab.parallel.experts import parallelize_moe, split_tokens, sum_gradients
from trimtab.parallel.mesh import Degrees

TP2 = Degrees(tp=2)
DP2_TP2_EP2 = Degrees(dp_shard=2, tp=2, ep=2)
DP2_TP2_EP4 = Degrees(dp_shard=2, tp=2, ep=4)
DP2_TP2_EP2_ETP2 = Degrees(dp_shard=2, tp=2, ep=2, etp=2)
HSDP = Degrees(dp_replicate=2, tp=2, ep=2)
EVERY = [TP2, TP2_EP2, TP2_ETP2, DP2_TP2_EP2, DP2_TP2_EP4, DP2_TP2_EP2_ETP2, HSDP]


def name_of(degrees: Degrees) -> str:
    sizes = dataclasses.asdict(degrees)
    return "-".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1)


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("before", [False, True], ids=["score after", "score before"])
@pytest.mark.parametrize("degrees", EVERY, ids=name_of)
def test_outputs_and_every_gradient_are_those_of_one_process(
    ranks: Ranks, degrees: Degrees, before: bool, shared: bool
) -> None:
    for result in ranks.run(check, degrees.world_size, degrees, {"before": before, "shared": shared}):
        assert max(result["errors"].values()) < 1e-10, result["errors"]
        assert {"x.grad", "inner.0.weight", "moe.0.router.weight"} < result["errors"].keys()


@pytest.mark.parametrize("degrees", EVERY, ids=name_of)
def test_copies_stay_the_same_bits_in_training(ranks: Ranks, degrees: Degrees) -> None:
    settings = {"before": False, "shared": True, "num_layers": 2}
    for result in ranks.run(check, degrees.world_size, degrees, settings, steps=20):
        assert set(result["drift"].values()) == {0.0}, result["drift"]
        assert "moe.1.router.weight" in result["drift"]
        assert "moe.1.router.expert_bias_E" in result["drift"]
        assert result["after"] < 1e-9


def test_replayed_ids_are_split_as_tokens_are(ranks: Ranks) -> None:
    assert max(ranks.run(replay_error, 2)) < 1e-12


def replay_error() -> float:
    mesh = mesh_of(TP2_EP2)
    host = make_host(before=False, shared=True)
    layer = host.moe[0]
    x_BSD, _ = make_batch(B, 0)
    ids_TK = torch.rand(B * S, 4, generator=torch.Generator().manual_seed(3)).argsort(-1)[:, :2]
    want = layer(x_BSD, replay_ids_TK=ids_TK)
    parallelize_moe(layer, mesh)
    split_tokens(layer, mesh)
    return float((layer(x_BSD=x_BSD, replay_ids_TK=ids_TK) - want).abs().max().detach())


@pytest.mark.parametrize("degrees", [TP2_EP2, TP2_ETP2], ids=name_of)
def test_the_boundary_compiles(ranks: Ranks, degrees: Degrees) -> None:
    for error, graphs in ranks.run(compiled_error, 2, degrees, timeout=120):
        assert error < 1e-12
        assert graphs == 1


def compiled_error(degrees: Degrees) -> tuple[float, int]:
    mesh = mesh_of(degrees)
    host = make_host(before=False, shared=True)
    parallelize_moe(host.moe[0], mesh)
    split_tokens(host.moe[0], mesh)
    eager = copy.deepcopy(host)
    torch._dynamo.reset()
    counters.clear()
    host.compile(fullgraph=True, backend="aot_eager")
    worst = 0.0
    for step in range(2):
        x_BSD, grad_BSD = make_batch(B, step)
        grads = []
        for one in (eager, host):
            x = x_BSD.clone().requires_grad_()
            (one(x) * grad_BSD).sum().backward()
            assert x.grad is not None
            grads.append(x.grad)
        worst = max(worst, float((grads[0] - grads[1]).abs().max() / grads[0].abs().max()))
    graphs = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    return worst, graphs


def test_sequences_must_divide(ranks: Ranks) -> None:
    message = (
        "input of shape (2, 5, 8) cannot be split over tp=2 along its tokens (dimension -2); pad sequences"
    )
    for found in ranks.run(indivisible, 2):
        assert found.startswith(message)


def indivisible() -> str:
    host = make_host(before=False, shared=False)
    split_tokens(host.moe[0], mesh_of(TP2))
    try:
        host(torch.zeros(2, 5, D, dtype=torch.float64))
    except ValueError as error:
        return str(error)
    return ""


# ------------------------------------------------------------------ and needs no collective too many


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Collectives that run inside the block, whoever calls them, by kind."""
    calls: Counter[str] = Counter()
    with torch.autograd.profiler.profile() as profile:
        yield calls
    for event in profile.function_events or ():
        if event.name.startswith("c10d::"):
            calls[event.name.removeprefix("c10d::").strip("_")] += 1


def count_collectives(degrees: Degrees) -> list[dict[str, int]]:
    mesh = mesh_of(degrees)
    host = make_host(before=False, shared=True, num_layers=2)
    for layer in host.moe:
        parallelize_moe(layer, mesh)
        split_tokens(layer, mesh)
    x_BSD, grad_BSD = make_batch(B, 0)
    x_BSD.requires_grad_()
    with counted() as forward:
        y_BSD = host(x_BSD)
    with counted() as backward:
        (y_BSD * grad_BSD).sum().backward()
    with counted() as reduction:
        sum_gradients(host.moe.parameters(), mesh)
    return [dict(forward), dict(backward), dict(reduction)]


@pytest.mark.parametrize(
    ("degrees", "forward", "backward"),
    [
        # one gather at the boundary each way, and nothing else
        (TP2, {"allgather_base": 1}, {"allgather_base": 1}),
        # forward: counts, rows there, rows back
        (TP2_EP2, {"allgather_base": 1, "alltoall_base": 3}, {"allgather_base": 1, "alltoall_base": 2}),
        # forward: tokens, ids and weights gathered; backward: tokens and weights scattered, output gathered
        (
            TP2_ETP2,
            {"allgather_base": 4, "reduce_scatter_base": 1},
            {"allgather_base": 2, "reduce_scatter_base": 2},
        ),
    ],
    ids=["ep1", "ep2", "etp2"],
)
def test_number_of_collectives(
    ranks: Ranks, degrees: Degrees, forward: dict[str, int], backward: dict[str, int]
) -> None:
    for found in ranks.run(count_collectives, 2, degrees):
        assert found == [
            {kind: 2 * num for kind, num in forward.items()},  # two layers
            {kind: 2 * num for kind, num in backward.items()},
            {"allreduce": 1},  # all layers together
        ]
