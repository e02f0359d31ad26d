"""Descriptions of microbatches, and what a failed forward leaves of one."""

from typing import Any

import pytest
import torch

import trimtab
from tests.toy import ToyModel
from trimtab import SequenceWise


def test_a_block_inside_a_block_gives_the_description_back() -> None:
    model = ToyModel()
    balancer = trimtab.attach(model, [SequenceWise.Config(coef=1e-2)])
    outer, inner = (torch.ones(1, 4), torch.ones(1, 3))
    with balancer.microbatch(valid_mask=outer):
        described = balancer.context.explicit
        with balancer.microbatch(valid_mask=inner):
            assert balancer.context.explicit is not described
        assert balancer.context.explicit is described
    assert balancer.context.explicit is None


def test_a_failed_forward_is_forgotten_with_its_step() -> None:
    model = ToyModel()
    balancer = trimtab.attach(model, [SequenceWise.Config(coef=1e-2)])

    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    broken = model.head.register_forward_pre_hook(fail)
    mask = torch.ones(2, 3).tril()
    with pytest.raises(RuntimeError, match="out of memory"):
        model(torch.zeros(2, 3, dtype=torch.int64), attention_mask=mask)
    broken.remove()
    balancer.discard_step()
    # A router called by itself: of the failed forward's tokens some were padding, and of these none is.
    router = model.blocks[0].moe.router
    router(torch.randn(2, 3, 8, dtype=torch.float64))
    assert int(balancer.ledger.settle()[0].counts_AE.sum()) == 2 * 3 * router.top_k


def test_a_removed_balancer_describes_nothing() -> None:
    balancer = trimtab.attach(ToyModel(), [SequenceWise.Config(coef=1e-2)])
    balancer.remove()
    with pytest.raises(RuntimeError, match=r"microbatch\(\) of a balancer that was removed; attach again"):
        balancer.microbatch(batch_shape=(1, 4))
