"""The audit measures 1.000 where all is right, and names what is wrong where it is not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import trimtab
from tests.toy import ToyModel, batch, grads, task_loss, toy_model
from trimtab import Accumulation, GlobalBatch, GradReduction, SequenceWise, Sign, ZLoss

M = 3
OBJECTIVES = [SequenceWise.Config(coef=0.3), ZLoss.Config(coef=0.1)]
BATCHES = [batch(2, 6, seed=seed) for seed in range(M)]


def step_of(model: ToyModel, scale: Callable[[Any], Any] = lambda loss: loss) -> Callable[[], None]:
    def run_step() -> None:
        for one in BATCHES:
            scale(task_loss(model, one)).backward()

    return run_step


def divide_gradients(model: ToyModel, by: float) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= by


def test_all_is_right() -> None:
    model = toy_model(score="sigmoid", expert_bias=True)
    balancer = trimtab.attach(model, OBJECTIVES, accumulation=M, bias=Sign.Config())
    step_of(model)()
    balancer.step()
    grads(model)
    bias, state = model.blocks[0].moe.router.expert_bias_E.clone(), balancer.state_dict()
    result = trimtab.audit(balancer, step_of(model))
    assert result.ok
    for layer in result.layers:
        assert layer.effective_coef == pytest.approx(1, abs=1e-9)
        assert layer.residual < 1e-9
        assert layer.finding == "exact"
    assert "blocks.1.moe.router" in str(result)
    # and training goes on as if nothing had run
    assert torch.equal(model.blocks[0].moe.router.expert_bias_E, bias)
    after = balancer.state_dict()
    assert after["num_steps"] == state["num_steps"]
    assert not after["bias_frozen"]
    for name, layer in state["layers"].items():
        assert torch.equal(after["layers"][name]["prior_counts_AE"], layer["prior_counts_AE"])
    assert all(parameter.grad is None for parameter in model.parameters())
    step_of(model)()
    balancer.step()


@pytest.mark.parametrize(
    ("reduction", "divide", "ratio", "finding"),
    [
        (GradReduction(), M, 1 / M, "divided by the number of microbatches"),
        # one process stands for four with the same tokens: their mean is its own gradient, their sum four
        (GradReduction(ranks="mean", num_ranks=4), 1, 1, "exact"),
        (GradReduction(ranks="mean", num_ranks=4), 1 / 4, 4, "multiplied by the number of ranks"),
        (GradReduction(ranks="sum", num_ranks=4), 1 / 4, 1, "exact"),
        (GradReduction(ranks="sum", num_ranks=4), 1, 1 / 4, "divided by the number of ranks"),
        (GradReduction(), 1024, 1 / 1024, "neither microbatches nor ranks"),
        (GradReduction(divisor=7.0), 7, 1, "exact"),
    ],
)
def test_scaling_faults_are_named(
    reduction: GradReduction, divide: float, ratio: float, finding: str
) -> None:
    model = toy_model()
    balancer = trimtab.attach(model, OBJECTIVES, accumulation=M, reduction=reduction)

    def run_step() -> None:
        step_of(model)()
        divide_gradients(model, divide)

    result = trimtab.audit(balancer, run_step)
    for layer in result.layers:
        assert layer.effective_coef == pytest.approx(ratio, rel=1e-6)
        assert finding in layer.finding
        assert layer.ok == (ratio == 1)


def test_a_loss_scale_that_nobody_follows() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, OBJECTIVES, accumulation=M, reduction=GradReduction(microbatches="mean"))

    def scaled(follow: bool) -> Callable[[], None]:
        def run_step() -> None:
            for one in BATCHES:
                loss = task_loss(model, one)
                loss = balancer.follow(loss) if follow else loss
                (1024 * loss / M).backward()
            divide_gradients(model, 1024)

        return run_step

    assert not trimtab.audit(balancer, scaled(False)).ok
    assert trimtab.audit(balancer, scaled(True)).ok


def test_detached_weights_are_named() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, OBJECTIVES, accumulation=M)
    router = model.blocks[1].moe.router
    router.register_forward_hook(lambda module, args, out: (out[0], out[1].detach(), out[2]))
    first, second = trimtab.audit(balancer, step_of(model)).layers
    assert first.ok
    assert second.effective_coef == 0
    assert "nothing arrives" in second.finding


def test_counts_that_are_not_final_are_named() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, [GlobalBatch.Config(coef=1, counts="running")], accumulation=M)
    result = trimtab.audit(balancer, step_of(model), layers=["blocks.1.moe.router"])
    assert len(result.layers) == 1
    assert not result.ok
    assert "counts of the step are not the final ones" in result.layers[0].finding


def test_exact_global_batch() -> None:
    model = toy_model()
    order = Accumulation(num_microbatches=M, order="counting_pass")
    balancer = trimtab.attach(model, [GlobalBatch.Config(coef=1, counts="exact")], accumulation=order)

    def run_step() -> None:
        with balancer.counting_pass():
            for one in BATCHES:
                model(**one.call)
        step_of(model)()

    assert trimtab.audit(balancer, run_step).ok


def test_errors() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, [])
    with pytest.raises(ValueError, match="there is no objective to audit"):
        trimtab.audit(balancer, lambda: None)
    balancer.remove()
    balancer = trimtab.attach(model, OBJECTIVES)
    with pytest.raises(ValueError, match=r"no router is called 'x'; they are blocks\.0\.moe\.router"):
        trimtab.audit(balancer, lambda: None, layers=["x"])
    model.blocks[0].moe.router.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="has no trainable gate weight to audit"):
        trimtab.audit(balancer, lambda: task_loss(model, BATCHES[0]).backward())
