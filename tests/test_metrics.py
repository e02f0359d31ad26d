"""Metrics: literal values, and measured losses against the reference."""

import math

import pytest
import torch

import trimtab
from tests.test_exactness import OBJECTIVES, RAGGED
from tests.toy import recorded, task_loss, toy_model
from trimtab import Accumulation
from trimtab.metrics import load_entropy, max_violation, mutual_information
from trimtab.reference import RoutedTokens, naive_probs, reference_loss


def test_max_violation() -> None:
    assert max_violation(torch.tensor([[4, 0, 2, 2], [1, 1, 1, 1], [0, 0, 0, 0]])).tolist() == [1.0, 0.0, 0.0]


def test_load_entropy() -> None:
    assert load_entropy(torch.tensor([[5, 5], [7, 0], [0, 0]])).tolist() == pytest.approx([1.0, 0.0, 1.0])
    assert load_entropy(torch.tensor([1, 1, 2])).item() == pytest.approx(1.5 * math.log(2) / math.log(3))


def test_mutual_information() -> None:
    assert mutual_information(torch.tensor([[4, 0], [0, 4]])).item() == pytest.approx(1.0)
    assert mutual_information(torch.tensor([[3, 1], [3, 1]])).item() == pytest.approx(0.0, abs=1e-12)
    assert mutual_information(torch.eye(4)).item() == pytest.approx(2.0)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_measured_losses_are_the_reference(score: str) -> None:
    """Every loss value, the entropy and the largest logit, over a ragged, padded, packed step."""
    model = toy_model(score=score, expert_bias=True)
    objectives = OBJECTIVES["all"]
    with recorded(model) as calls, torch.no_grad():
        for one in RAGGED:
            model(**one.call)
    order = Accumulation(num_microbatches=3, order="forward_first")
    balancer = trimtab.attach(model, objectives, accumulation=order, measure_every=1)
    for loss in [task_loss(model, one) for one in RAGGED]:
        loss.backward()
    balancer.step()
    metrics = balancer.metrics()
    for layer, record in enumerate(calls):
        routed = [
            RoutedTokens(logits, ids, one.sequence_T, one.document_T, one.valid_BS.reshape(-1))
            for (logits, ids), one in zip(record, RAGGED, strict=True)
        ]
        for config in objectives:
            objective = config.build()
            scaled = reference_loss(objective, routed, score).item()
            assert metrics["losses"][objective.name]["scaled"][layer] == pytest.approx(scaled, rel=1e-10)
            value = metrics["losses"][objective.name]["value"][layer]
            assert value == pytest.approx(scaled / objective.coef, rel=1e-10)
        probs = torch.cat([naive_probs(r.logits_TE, score)[r.valid_T] for r in routed])
        entropy = torch.special.entr(probs).sum(dim=1).mean().item()
        assert metrics["router_entropy"][layer] == pytest.approx(entropy, rel=1e-10)
        largest = max(r.logits_TE[r.valid_T].max().item() for r in routed)
        assert metrics["logit_max"][layer] == pytest.approx(largest)
        counts = sum(torch.bincount(r.ids_TK[r.valid_T].flatten(), minlength=6) for r in routed)
        assert metrics["load"][layer] == pytest.approx((counts / counts.float().mean()).tolist())
        assert metrics["maxvio"][layer] == pytest.approx(max_violation(counts).item())
        assert metrics["dead_experts"][layer] == int((counts == 0).sum())


def test_values_are_measured_only_when_due() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, [trimtab.ZLoss.Config(coef=1)], measure_every=3)
    measured = []
    for _ in range(6):
        task_loss(model, RAGGED[0]).backward()
        balancer.step()
        measured.append("z" in balancer.metrics()["losses"])
    assert measured == [False, False, True, False, False, True]
    assert balancer.metrics()["num_tokens"] == [RAGGED[0].num_tokens] * 2


def test_values_are_counted_once_under_checkpointing() -> None:
    values = []
    for checkpoint in (None, "nonreentrant", "reentrant"):
        model = toy_model(checkpoint=checkpoint)
        balancer = trimtab.attach(model, OBJECTIVES["sequence"] + OBJECTIVES["z"], measure_every=1)
        task_loss(model, RAGGED[0]).backward()
        balancer.step()
        values.append(balancer.metrics())
    assert values[0] == values[1] == values[2]


def test_running_load_is_a_decayed_mean() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, [])
    loads = []
    for one in RAGGED:
        task_loss(model, one).backward()
        balancer.step()
        loads.append(torch.tensor(balancer.metrics()["load"][0]))
    running = loads[0]
    for load in loads[1:]:
        running = 0.98 * running + 0.02 * load
    assert balancer.metrics()["maxvio_running"][0] == pytest.approx(max_violation(running).item(), rel=1e-5)
