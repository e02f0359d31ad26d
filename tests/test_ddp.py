"""Data parallelism by DistributedDataParallel: two real processes against one."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

import trimtab
from tests.toy import Batch, assert_grads_equal, batch, grads, reference_grads, task_loss, toy_model
from trimtab import (
    Accumulation,
    BatchWise,
    DeviceLevel,
    GlobalBatch,
    GradReduction,
    ImportanceCV,
    Quantile,
    SequenceWise,
    Sign,
    TokenRanks,
    ZLoss,
)

R = 2
OBJECTIVES = [
    SequenceWise.Config(coef=0.3),
    DeviceLevel.Config(coef=0.2, num_devices=2),
    ZLoss.Config(coef=0.1),
]
EVERY = [
    *OBJECTIVES,
    BatchWise.Config(coef=0.4, average_microbatches=True),
    GlobalBatch.Config(coef=0.5, counts="exact"),
]
# rank r runs microbatches r and R + r: equal ones first, then ragged ones
EQUAL = [batch(2, 5, seed=seed) for seed in range(2 * R)]
RAGGED = [batch(1 + seed, 5, seed=seed, padded=True) for seed in range(2 * R)]
REDUCTION = GradReduction(ranks="mean", num_ranks=R)
FORWARD_FIRST = Accumulation(num_microbatches=2, order="forward_first")


def together(batches: list[Batch]) -> list[Batch]:
    """What the ranks process together in one forward, as one microbatch each."""
    groups = [batches[first : first + R] for first in range(0, len(batches), R)]
    return [
        Batch(
            torch.cat([one.input_ids for one in group]),
            torch.cat([one.valid_BS.long() for one in group]),
        )
        for group in groups
    ]


def all_at_once(batches: list[Batch], model: Any, scale: float, **settings: Any) -> Any:
    """One step with every loss, on the microbatches given; metrics."""
    balancer = trimtab.attach(model, EVERY, accumulation=FORWARD_FIRST, measure_every=1, **settings)
    for loss in [task_loss(model, one) * scale for one in batches]:
        loss.backward()
    balancer.step()
    metrics = balancer.metrics()
    balancer.remove()
    return metrics


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def errors() -> list[str]:
    found = []
    group = torch.distributed.group.WORLD
    refused: list[tuple[Any, dict[str, Any]]] = [
        ([SequenceWise.Config(coef=1)], {}),
        ([GlobalBatch.Config(coef=1)], {"reduction": GradReduction(num_ranks=3)}),
        ([], {"reduction": GradReduction(), "ranks": TokenRanks(tokens=group)}),
        ([ImportanceCV.Config(coef=1)], {"reduction": REDUCTION}),
    ]
    for objectives, settings in refused:
        try:
            trimtab.attach(toy_model(), objectives, **settings)
        except ValueError as error:
            found.append(str(error))
    return found


def biased_model() -> Any:
    return toy_model(score="sigmoid", expert_bias=True)


def biases(batches: list[Batch], rule: Any, **settings: Any) -> list[torch.Tensor]:
    model = biased_model()
    balancer = trimtab.attach(model, [], bias=rule, accumulation=2, **settings)
    for _ in range(2):
        for one in batches:
            task_loss(model, one).backward()
        balancer.step()
    return [block.moe.router.expert_bias_E.clone() for block in model.blocks]


RULES = {"sign": Sign.Config(speed=0.1), "quantile": Quantile.Config()}


def run_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=R)
    results: dict[str, Any] = {"errors": errors()}
    for name, batches in (("equal", EQUAL), ("ragged", RAGGED)):
        model = toy_model()
        balancer = trimtab.attach(model, OBJECTIVES, accumulation=2, reduction=REDUCTION)
        parallel = torch.nn.parallel.DistributedDataParallel(model)

        def step(batches: Any = batches, parallel: Any = parallel) -> None:
            # DDP averages task gradients too; a trainer that sums token losses scales them by R itself
            for one in batches[rank::R]:
                (task_loss(parallel, one) * R).backward()

        if name == "ragged":
            balancer.start_step(
                num_tokens=sum(one.num_tokens for one in batches),
                num_sequences=sum(one.num_sequences for one in batches),
            )
        step()
        balancer.step()
        results[name] = grads(model)
        if name == "equal":
            results["audit"] = [layer.effective_coef for layer in trimtab.audit(balancer, step).layers]
        model = toy_model()
        results[f"metrics {name}"] = all_at_once(batches[rank::R], model, R, reduction=REDUCTION)
        for parameter in model.parameters():
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= R
        results[f"every {name}"] = grads(model)
    for name, rule in RULES.items():
        results[name] = biases(RAGGED[rank::R], rule, reduction=REDUCTION)
    torch.save(results, Path(folder) / f"results{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: Any) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ddp")
    mp.spawn(run_rank, (free_port(), str(folder)), nprocs=R, join=True)
    return [torch.load(folder / f"results{rank}.pt", weights_only=True) for rank in range(R)]


@pytest.mark.parametrize(("name", "batches"), [("equal", EQUAL), ("ragged", RAGGED)])
def test_gradients_are_those_of_one_process(results: Any, name: str, batches: Any) -> None:
    want = reference_grads(toy_model(), [c.build() for c in OBJECTIVES], batches, "softmax")
    assert_grads_equal(results[0][name], want)


@pytest.mark.parametrize(("name", "batches"), [("equal", EQUAL), ("ragged", RAGGED)])
def test_counts_over_ranks_make_every_loss_exact(results: Any, name: str, batches: Any) -> None:
    want = reference_grads(toy_model(), [c.build() for c in EVERY], together(batches), "softmax")
    assert_grads_equal(results[0][f"every {name}"], want)
    metrics = all_at_once(together(batches), toy_model(), 1)
    for have in (one[f"metrics {name}"] for one in results):
        for key in ("num_tokens", "load", "maxvio", "dead_experts", "layers"):
            assert have[key] == metrics[key], key
        for key in ("logit_max", "router_entropy"):
            assert have[key] == pytest.approx(metrics[key], rel=1e-12), key
        for loss, values in metrics["losses"].items():
            assert have["losses"][loss]["value"] == pytest.approx(values["value"], rel=1e-12), loss


@pytest.mark.parametrize("name", RULES)
def test_next_bias_is_that_of_one_process_on_every_rank(results: Any, name: str) -> None:
    want = biases(together(RAGGED), RULES[name])
    assert any(bias.abs().max() > 0.01 for bias in want)
    for have in results:
        assert all(torch.equal(a, b) for a, b in zip(have[name], want, strict=True))


def test_audit_over_ranks(results: Any) -> None:
    assert results[0]["audit"] == pytest.approx([1.0, 1.0], abs=1e-9)


def test_what_does_not_fit_the_ranks_is_refused(results: Any) -> None:
    undeclared, which, disagree, unsummed = results[0]["errors"]
    assert "torch.distributed runs 2 processes; say how they reduce gradients" in undeclared
    assert "num_ranks=3 of 2 processes share a step; say which: ranks=TokenRanks(tokens=group)" in which
    assert "ranks.tokens has 2 ranks, but reduction has num_ranks=1" in disagree
    assert "ImportanceCV is not summed over ranks; use ImportanceCV.Config(local=True)" in unsummed
