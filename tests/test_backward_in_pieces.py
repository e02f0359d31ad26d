"""Targets of all layers are formed at the first read: what follows may differ in scale, dtype or place."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import trimtab
from tests.toy import ToyModel, assert_grads_equal, batch, grads, task_loss, toy_model
from trimtab import GlobalBatch, SequenceWise, ZLoss

ONE = batch(2, 5, seed=1, padded=True)


@pytest.mark.parametrize("fused", [True, False])
def test_a_backward_with_another_scale_takes_it(fused: bool) -> None:
    """A first backward through the last layer alone forms the targets of all; a second one has its own scale."""
    model = toy_model()
    balancer = trimtab.attach(model, [SequenceWise.Config(coef=0.3), ZLoss.Config(coef=0.1)], fused=fused)
    loss = balancer.follow(task_loss(model, ONE))
    torch.autograd.grad(loss, model.blocks[1].moe.router.weight, retain_graph=True)
    (loss * 1024).backward()
    balancer.step()
    have = grads(model)
    (balancer.follow(task_loss(model, ONE)) * 1024).backward()
    balancer.step()
    assert_grads_equal(have, grads(model))


def test_layers_of_several_dtypes_read_the_same_step() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, [GlobalBatch.Config(coef=0.3)], fused=False)
    model.blocks[0].moe.router.forward = partial(in_float32, model.blocks[0].moe.router.forward)
    task_loss(model, ONE).backward()
    balancer.step()
    assert all(grad.isfinite().all() for grad in grads(model).values())


def in_float32(forward: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    logits_TE, weights_TK, ids_TK = forward(x)
    return logits_TE.float(), weights_TK, ids_TK


def test_state_loads_before_parameters_are_anywhere() -> None:
    """On the meta device counts would be lost."""
    model = toy_model()
    balancer = trimtab.attach(model, [GlobalBatch.Config(coef=0.1)])
    task_loss(model, ONE).backward()
    balancer.step()
    with torch.device("meta"):
        other = ToyModel()
    its = trimtab.attach(toy_model(), [GlobalBatch.Config(coef=0.1)])
    for layer, router in zip(its.layers, other.blocks, strict=True):
        layer.router = replace(layer.router, module=router.moe.router)
    its.load_state_dict(balancer.state_dict())
    assert torch.equal(its.ledger.rows[0].prior_counts_AE, balancer.ledger.rows[0].prior_counts_AE)
