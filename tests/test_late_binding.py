"""Late binding: what backward sees of the step's counts under every mode, and how far off it is."""

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab
from tests.toy import (
    Batch,
    ToyModel,
    assert_grads_equal,
    batch,
    grads,
    recorded,
    reference_grads,
    task_loss,
    toy_model,
)
from trimtab import Accumulation, GlobalBatch, SequenceWise, ZLoss
from trimtab.reference import naive_counts

M = 4
STEP = [batch(2, 5, seed=seed, padded=True) for seed in range(M)]
LAST_STEP = [batch(2, 5, seed=10 + seed, padded=True) for seed in range(M)]


def totals(batches: list[Batch]) -> dict[str, int]:
    return {"num_tokens": sum(b.num_tokens for b in batches)}


def counts(model: ToyModel, batches: list[Batch]) -> list[list[Tensor]]:
    """[layer][microbatch] executed counts of valid tokens."""
    with recorded(model) as calls, torch.no_grad():
        for one in batches:
            model(**one.call)
    return [
        [
            naive_counts(ids[b.valid_BS.reshape(-1)], 6).double()
            for (_, ids), b in zip(record, batches, strict=True)
        ]
        for record in calls
    ]


def expected_load(mode: str, now: list[Tensor], before: list[Tensor]) -> list[Tensor]:
    """(E,) load fraction at each of M alternating backwards, from the definition of the mode."""
    seen = []
    for m in range(1, M + 1):
        total = {
            "running": sum(now[:m]),
            "prior": sum(now[:m]) + (M - m) / M * sum(before),
            "previous": sum(before),
        }[mode]
        seen.append(total / total.mean())
    return seen


def alternate(model: ToyModel, balancer: trimtab.Balancer, batches: list[Batch]) -> dict[str, Tensor]:
    balancer.start_step(**totals(batches))
    for one in batches:
        task_loss(model, one).backward()
    balancer.step()
    return grads(model)


@pytest.mark.parametrize("mode", ["prior", "running", "previous"])
def test_alternating_counts(mode: str) -> None:
    model = toy_model()
    objective = GlobalBatch.Config(coef=0.4, counts=mode)
    now, before = counts(model, STEP), counts(model, LAST_STEP)
    load = [expected_load(mode, n, b) for n, b in zip(now, before, strict=True)]
    want = reference_grads(model, [objective.build()], STEP, "softmax", load)
    balancer = trimtab.attach(model, [objective], accumulation=M)
    alternate(model, balancer, LAST_STEP)
    assert_grads_equal(alternate(model, balancer, STEP), want)
    final = [sum(n) / sum(n).mean() for n in now]
    errors = [max((f - last).abs().max().item() for f in fs) for fs, last in zip(load, final, strict=True)]
    assert balancer.metrics()["count_error"] == pytest.approx(errors, rel=1e-12)


@pytest.mark.parametrize("mode", ["prior", "previous"])
def test_first_step_has_no_prior_and_runs(mode: str) -> None:
    model = toy_model()
    now = counts(model, STEP)
    load = [expected_load("running", n, n) for n in now]
    want = reference_grads(model, [GlobalBatch.Config(coef=0.4).build()], STEP, "softmax", load)
    balancer = trimtab.attach(model, [GlobalBatch.Config(coef=0.4, counts=mode)], accumulation=M)
    assert_grads_equal(alternate(model, balancer, STEP), want)


@pytest.mark.parametrize("mode", ["prior", "running", "exact"])
def test_complete_counts_are_exact(mode: str) -> None:
    """With all forwards first, every mode but "previous" sees the final counts: no error at all."""
    model = toy_model()
    want = reference_grads(model, [GlobalBatch.Config(coef=0.4).build()], STEP, "softmax")
    order = Accumulation(num_microbatches=M, order="forward_first")
    balancer = trimtab.attach(model, [GlobalBatch.Config(coef=0.4, counts=mode)], accumulation=order)
    for _ in range(2):
        for loss in [task_loss(model, one) for one in STEP]:
            loss.backward()
        balancer.step()
        assert_grads_equal(grads(model), want)
        assert balancer.metrics()["count_error"] == [0.0, 0.0]


def test_residual_fractions() -> None:
    """Share of the micro-batch excess that is left, averaged over orders: (H_M - 1)/(M - 1) and 1/(2M)."""
    generator = torch.Generator().manual_seed(0)
    f = torch.rand(M, 6, generator=generator, dtype=torch.float64)
    p = torch.rand(M, 6, generator=generator, dtype=torch.float64)
    f_mean = f.mean(dim=0)
    exact = (f_mean * p.mean(dim=0)).sum()
    excess = (f * p).sum(dim=1).mean() - exact
    residual = {"running": 0.0, "prior": 0.0}
    orders = list(permutations(range(M)))
    for order in orders:
        now = [f[m] for m in order]
        for mode in residual:
            seen = [sum(now[: m + 1]) / (m + 1) for m in range(M)]
            if mode == "prior":
                seen = [(sum(now[: m + 1]) + (M - m - 1) * f_mean) / M for m in range(M)]
            loss = sum((s * p[m]).sum() for s, m in zip(seen, order, strict=True)) / M
            residual[mode] += ((loss - exact) / excess).item() / len(orders)
    harmonic = sum(1 / m for m in range(1, M + 1))
    assert residual["running"] == pytest.approx((harmonic - 1) / (M - 1))
    # drift (M - 1)/(2M) sum (f_prev - f) P vanishes here because the prior is the step's own mean
    assert residual["prior"] == pytest.approx(1 / (2 * M))


def test_measured_residuals_follow_the_formulas() -> None:
    """The same fractions, measured through the balancer on the logits' gradient of a frozen-router model."""
    model = toy_model(num_layers=1)
    orders = list(permutations(range(3)))
    batches = [batch(2, 6, seed=30 + s) for s in range(3)]
    weight = "blocks.0.moe.router.weight"

    def excess(config: Any) -> Tensor:
        total = torch.zeros_like(model.get_parameter(weight))
        for order in orders:
            balancer = trimtab.attach(model, [config], accumulation=3)
            for _repeat in range(2):  # the first step fills the prior
                for index in order:
                    task_loss(model, batches[index]).backward()
                balancer.step()
                gradient = grads(model)[weight]
            total += gradient / len(orders)
            balancer.remove()
        return total

    exact_objective = GlobalBatch.Config(coef=1.0).build()
    exact = reference_grads(model, [exact_objective], batches, "softmax")[weight]
    micro = excess(trimtab.BatchWise.Config(coef=1.0, average_microbatches=True)) - exact
    running = excess(GlobalBatch.Config(coef=1.0, counts="running")) - exact
    prior = excess(GlobalBatch.Config(coef=1.0, counts="prior")) - exact
    torch.testing.assert_close(running, micro * ((1 + 1 / 2 + 1 / 3 - 1) / 2), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(prior, micro / 6, rtol=1e-9, atol=1e-12)


def test_exact_counts_are_refused_where_the_order_cannot_give_them() -> None:
    model = toy_model()
    with pytest.raises(ValueError, match=r"router: counts='exact' cannot be had with num_microbatches=4"):
        trimtab.attach(model, [GlobalBatch.Config(coef=1, counts="exact")], accumulation=4)


def test_breaking_the_declared_order_is_an_error() -> None:
    model = toy_model()
    order = Accumulation(num_microbatches=2, order="forward_first")
    trimtab.attach(model, [GlobalBatch.Config(coef=1, counts="exact")], accumulation=order)
    with pytest.raises(RuntimeError, match=r"backward started after 1 of 2 microbatches.*'forward_first'"):
        task_loss(model, STEP[0]).backward()


def test_a_declared_counting_pass_must_run() -> None:
    model = toy_model()
    order = Accumulation(num_microbatches=2, order="counting_pass")
    trimtab.attach(model, [GlobalBatch.Config(coef=1)], accumulation=order)
    with pytest.raises(RuntimeError, match=r"started after 0 of 2 microbatches .*'counting_pass'"):
        task_loss(model, STEP[0]).backward()


def test_an_undeclared_counting_pass_is_refused() -> None:
    balancer = trimtab.attach(toy_model(), [])
    with pytest.raises(RuntimeError, match="a counting pass was not declared"), balancer.counting_pass():
        pass


def test_batch_wise_with_accumulation_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"use the global-batch loss .*GlobalBatch.* or the sequence-wise loss .*SequenceWise",
    ):
        trimtab.attach(toy_model(), [trimtab.BatchWise.Config(coef=1)], accumulation=2)


def test_another_number_of_microbatches_is_checked_too() -> None:
    balancer = trimtab.attach(toy_model(), [trimtab.BatchWise.Config(coef=1)])
    with pytest.raises(ValueError, match="balances each microbatch on its own"):
        balancer.start_step(num_microbatches=3)


def test_ragged_microbatches_without_totals_warn() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, [ZLoss.Config(coef=1)], accumulation=2)
    for one in (batch(2, 5, seed=1), batch(1, 5, seed=2)):
        task_loss(model, one).backward()
    balancer.step()
    with pytest.warns(
        UserWarning, match=r"hold from 5 to 10 \(num_tokens\).*start_step\(num_tokens=\.\.\.\)"
    ):
        balancer.metrics()


def test_wrong_totals_warn() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, [SequenceWise.Config(coef=1)])
    balancer.start_step(num_sequences=5)
    task_loss(model, batch(2, 5, seed=1)).backward()
    balancer.step()
    with pytest.warns(UserWarning, match=r"num_sequences=5\) was declared, but .* counted 2"):
        balancer.metrics()


def test_a_step_may_hold_fewer_microbatches() -> None:
    model = toy_model()
    short = STEP[:2]
    want = reference_grads(model, [SequenceWise.Config(coef=0.3).build()], short, "softmax")
    balancer = trimtab.attach(model, [SequenceWise.Config(coef=0.3)], accumulation=M)
    balancer.start_step(num_sequences=sum(b.num_sequences for b in STEP))
    for one in STEP:
        task_loss(model, one).backward()
    balancer.step()
    grads(model)
    balancer.start_step(num_microbatches=2, num_sequences=sum(b.num_sequences for b in short))
    for one in short:
        task_loss(model, one).backward()
    balancer.step()
    assert_grads_equal(grads(model), want)
