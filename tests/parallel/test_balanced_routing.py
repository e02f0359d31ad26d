"""The fused path under FSDP2: sharded gates, gathered again for backward, to the gradients of the hooked path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import trimtab
from tests.parallel.pool import Ranks
from tests.toy import batch, reference_grads, task_loss, toy_model
from trimtab import GlobalBatch, GradReduction, Objective, SequenceWise, ZLoss

OBJECTIVES: list[Objective.Config] = [
    SequenceWise.Config(coef=0.3),
    GlobalBatch.Config(coef=0.4),
    ZLoss.Config(coef=0.1),
]
BATCHES = [batch(2, 5, seed=1), batch(2, 5, seed=2)]


def sharded_step(keep: str, checkpoint: str | None) -> tuple[dict[str, Tensor], list[bool]]:
    """Whole gradients of one step on sharded layers, and which routers ran fused."""
    model = toy_model(score="sigmoid", expert_bias=True, linear_bias=True, checkpoint=checkpoint)
    mesh = init_device_mesh("cpu", (2,))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    reduction = GradReduction(ranks="mean", num_ranks=2)
    trimtab.attach(model, OBJECTIVES, reduction=reduction, keep=keep)
    fused = [not block.moe.router._forward_hooks for block in model.blocks]
    # Summed over ranks, as the reference is: gradients are averaged.
    (2 * task_loss(model, BATCHES[mesh.get_rank()])).backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}, fused


# The toy model's head returns a view, which nobody changes in place.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
@pytest.mark.parametrize(
    ("keep", "checkpoint"), [("input", None), ("logits", None), ("input", "nonreentrant")]
)
def test_fsdp(ranks: Ranks, keep: str, checkpoint: str | None) -> None:
    model = toy_model(score="sigmoid", expert_bias=True, linear_bias=True)
    one = batch(4, 5, seed=0)
    one.input_ids = torch.cat([each.input_ids for each in BATCHES])
    want = reference_grads(model, [c.build() for c in OBJECTIVES], [one], "sigmoid")
    for have, fused in ranks.run(sharded_step, 2, keep, checkpoint):
        assert fused == [True, True]
        for name in want:
            torch.testing.assert_close(have[name], want[name], rtol=1e-10, atol=1e-12, msg=name)
