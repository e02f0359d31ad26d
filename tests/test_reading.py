"""What backward reads is formed once: one batch is not taken for another, and few operators are left."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import profile

import trimtab
from tests.toy import Batch, batch, grads, task_loss, toy_model
from trimtab import BatchWise, DeviceLevel, GlobalBatch, SequenceWise, ZLoss
from trimtab.counts import TokenGroups
from trimtab.objective import Objective

OBJECTIVES: list[Objective.Config] = [
    SequenceWise.Config(coef=0.3),
    SequenceWise.Config(coef=0.2, weighting="token", assignments="unbiased", unit="document"),
    # Without counts of the last step each step has the gradients of a first one.
    GlobalBatch.Config(coef=0.1, counts="running"),
    BatchWise.Config(coef=0.7, average_microbatches=True),
    DeviceLevel.Config(coef=0.4, num_devices=3),
    ZLoss.Config(coef=0.05),
]
SHAPES = [(2, 4), (2, 4), (1, 8), (4, 2), (2, 4), (3, 5), (2, 4)]
BATCHES = [batch(*shape, seed, padded=seed == 4) for seed, shape in enumerate(SHAPES)]


def step(model: Any, balancer: Any, batches: list[Batch]) -> dict[str, Tensor]:
    for one in batches:
        task_loss(model, one).backward()
    balancer.step()
    return grads(model)


def balanced(**settings: Any) -> tuple[Any, Any]:
    model = toy_model()
    return model, trimtab.attach(model, OBJECTIVES, measure_every=0, **settings)


@pytest.mark.parametrize("described", [False, True], ids=["called", "described"])
@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_a_batch_is_not_taken_for_the_one_before(num_microbatches: int, described: bool) -> None:
    model, balancer = balanced(accumulation=num_microbatches)
    for one in BATCHES:
        batches = [one] * num_microbatches
        if described:
            with balancer.microbatch(batch_shape=tuple(one.input_ids.shape), valid_mask=one.attention_mask):
                found = step(model, balancer, batches)
        else:
            found = step(model, balancer, batches)
        for name, expected in step(*balanced(accumulation=num_microbatches), batches).items():
            torch.testing.assert_close(found[name], expected, rtol=0, atol=0)


def test_batches_of_one_shape_share_their_groups_and_others_do_not() -> None:
    model, balancer = balanced()
    known: list[TokenGroups] = []
    for one in BATCHES:
        loss = task_loss(model, one)
        (forward,) = balancer.ledger.sums.forwards.values()
        known.append(forward.groups)
        loss.backward()
        balancer.step()
    assert [groups.num_tokens_G.tolist() for groups in known[:3]] == [[4, 4], [4, 4], [8]]
    assert known[0] is known[1]
    assert known[3] is not known[4]
    assert known[4].num_tokens_G.tolist() == BATCHES[4].valid_BS.sum(dim=1).tolist()


def test_coefficients_that_change_leave_nothing_behind() -> None:
    model, balancer = balanced()
    for number in range(60):
        for objective in balancer.ledger.objectives:
            objective.coef = 0.1 + number / 60
        loss = task_loss(model, BATCHES[0])
        (forward,) = balancer.ledger.sums.forwards.values()
        _, formed = forward.groups.floats(torch.float64)
        assert len(formed) < 80
        loss.backward()
        balancer.step()


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")
@pytest.mark.parametrize(("objectives", "most"), [(OBJECTIVES, 22), ([OBJECTIVES[0], OBJECTIVES[-1]], 6)])
def test_few_operators_form_the_targets_of_all_layers(objectives: list[Objective.Config], most: int) -> None:
    model = toy_model(num_layers=3)
    balancer = trimtab.attach(model, objectives, measure_every=0)
    for first in (True, False):
        loss = task_loss(model, BATCHES[0])
        ((ticket, forward),) = balancer.ledger.sums.forwards.items()
        read = forward.counts[2], forward.groups.num_tokens_G, None, 0, None, torch.float64
        with profile() as measured:
            balancer.ledger.bind(2, ticket, *read)
        found = [event.name for event in measured.events() if computes(event)]
        assert set(forward.targets) == {0, 1}
        # What follows from the shape of the batch alone is formed in the first step.
        assert first or 0 < len(found) <= most, found
        loss.backward()
        balancer.step()


def computes(event: Any) -> bool:
    """Whether a profiled event is an operator that the package called, and no view."""
    name = event.name.removeprefix("aten::")
    views = ("view", "expand", "unsqueeze", "select", "slice", "narrow", "unbind", "reshape", "detach")
    if name == event.name or event.cpu_parent is not None or name in views:
        return False
    return name != "to" or bool(event.cpu_children)


def test_nobody_writes_to_what_later_batches_share() -> None:
    model, balancer = balanced()
    kept: list[Tensor] = []
    for number in range(3):
        loss = task_loss(model, BATCHES[0])
        (forward,) = balancer.ledger.sums.forwards.values()
        groups = forward.groups
        loss.backward()
        if number == 1:
            tokens_G, formed = groups.floats(torch.float64)
            _, totals = next(iter(balancer.ledger.totals._formed.values()))
            kept = [
                groups.num_tokens_G,
                groups.sizes,
                tokens_G,
                totals.num_tokens,
                *totals._inverses.values(),
            ]
            kept += [value for value in formed.values() if isinstance(value, Tensor)]
            versions = [value._version for value in kept]
        balancer.step()
    assert len(kept) > 6
    assert [value._version for value in kept] == versions


def test_what_a_cuda_stream_formed_is_not_taken_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor anything that a CUDA graph has recorded, which has no place at all."""
    now: list[str | None] = []
    for module in ("counts", "microbatch", "reduction", "reading"):
        monkeypatch.setattr(f"trimtab.{module}.place_of", lambda device: now[-1])
    model, balancer = balanced()
    seen: list[TokenGroups] = []
    places = ["one", "one", "two", "two", None, None, "two"]
    for place in places:
        now.append(place)
        loss = task_loss(model, BATCHES[0])
        (forward,) = balancer.ledger.sums.forwards.values()
        seen.append(forward.groups)
        loss.backward()
        balancer.step()
    same = [one is other for one, other in itertools.pairwise(seen)]
    assert same == [True, False, True, False, False, False]
    assert seen[6] is seen[3]
    assert not any(key[-1] is None for key in balancer.ledger.totals._formed)


def test_a_coefficient_is_a_number() -> None:
    objective = ZLoss.Config(coef=0.1).build()
    objective.coef = 0.2
    with pytest.raises(TypeError, match="must be a number"):
        objective.coef = torch.tensor(0.3)
