"""Data parallelism by DistributedDataParallel: two real processes against one."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

import trimtab
from tests.toy import assert_grads_equal, batch, grads, reference_grads, task_loss, toy_model
from trimtab import BatchWise, DeviceLevel, GlobalBatch, GradReduction, SequenceWise, Sign, ZLoss

R = 2
OBJECTIVES = [
    SequenceWise.Config(coef=0.3),
    DeviceLevel.Config(coef=0.2, num_devices=2),
    ZLoss.Config(coef=0.1),
]
# rank r runs microbatches r and R + r: equal ones first, then ragged ones
EQUAL = [batch(2, 5, seed=seed) for seed in range(2 * R)]
RAGGED = [batch(1 + seed, 5, seed=seed, padded=True) for seed in range(2 * R)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=R)
    results: dict[str, Any] = {"errors": []}
    model = toy_model()
    refused = [
        ([SequenceWise.Config(coef=1)], {}),
        ([GlobalBatch.Config(coef=1)], {"reduction": GradReduction(ranks="mean", num_ranks=R)}),
        ([BatchWise.Config(coef=1)], {"reduction": GradReduction(ranks="mean", num_ranks=R)}),
        ([], {"bias": Sign.Config(), "reduction": GradReduction(ranks="mean", num_ranks=R)}),
    ]
    for objectives, settings in refused:
        try:
            trimtab.attach(model, objectives, **settings)
        except ValueError as error:
            results["errors"].append(str(error))
    for name, batches in (("equal", EQUAL), ("ragged", RAGGED)):
        model = toy_model()
        reduction = GradReduction(ranks="mean", num_ranks=R)
        balancer = trimtab.attach(model, OBJECTIVES, accumulation=2, reduction=reduction)
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
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: Any) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ddp")
    mp.spawn(run_rank, (free_port(), str(folder)), nprocs=R, join=True)
    loaded: dict[str, Any] = torch.load(folder / "results.pt", weights_only=True)
    return loaded


@pytest.mark.parametrize(("name", "batches"), [("equal", EQUAL), ("ragged", RAGGED)])
def test_gradients_are_those_of_one_process(results: dict[str, Any], name: str, batches: Any) -> None:
    want = reference_grads(toy_model(), [c.build() for c in OBJECTIVES], batches, "softmax")
    assert_grads_equal(results[name], want)


def test_audit_over_ranks(results: dict[str, Any]) -> None:
    assert results["audit"] == pytest.approx([1.0, 1.0], abs=1e-9)


def test_what_needs_counts_of_other_ranks_is_refused(results: dict[str, Any]) -> None:
    undeclared, step_scope, microbatch_scope, bias = results["errors"]
    assert "torch.distributed runs 2 processes; say how they reduce gradients" in undeclared
    assert "objective 'global_batch' needs counts summed over 2 ranks" in step_scope
    assert "objective 'batch_wise' needs counts summed over 2 ranks" in microbatch_scope
    assert "bias rule Sign needs counts summed over 2 ranks" in bias
