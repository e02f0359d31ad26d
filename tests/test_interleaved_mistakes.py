"""Forwards by turns: what does not count, blocks that are broken off, and mistakes, which are loud."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab
from tests.test_exactness import OBJECTIVES, RAGGED
from tests.toy import Batch, ToyModel, assert_grads_equal, batch, toy_model
from tests.turns import (
    FORWARD_FIRST,
    PAIR,
    ROWS,
    assert_same,
    by_turns,
    described,
    in_turn,
    loss_of,
    step,
    together,
)
from trimtab import Accumulation, Balancer, GlobalBatch, Quantile, SequenceWise, ZLoss

# ---------------------------------------------------------------- what does not count


def test_evaluation_counts_nothing() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, OBJECTIVES["all"], accumulation=FORWARD_FIRST)
    with torch.no_grad():
        by_turns(model, balancer, PAIR)
        together(model, balancer, ROWS)
    by_turns(model.eval(), balancer, PAIR)
    assert all(row.num_forwards == 0 and row.counts_AE is None for row in balancer.ledger.settle())
    assert not balancer.ledger.in_step


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("compiled", [False, True])
def test_evaluation_between_two_parts(compiled: bool) -> None:
    """It does not count, and the microbatches go on, with their own masks when they are computed again."""
    model = toy_model(checkpoint="nonreentrant")
    want = step(in_turn, model, PAIR, OBJECTIVES["all"], num_steps=2)

    def evaluating(model: ToyModel, balancer: Balancer, batches: Sequence[Batch]) -> list[Tensor]:
        if compiled:
            for block in model.blocks:
                block.compile(fullgraph=True, backend="aot_eager")
        with balancer.interleaved([described(balancer, one) for one in batches]) as runs:
            x_M = [run(model.embed, one.input_ids) for run, one in zip(runs, batches, strict=True)]
            for block in model.blocks:
                with torch.no_grad():
                    model.eval()(RAGGED[2].input_ids)
                model.train()
                x_M = [run(model.run, block, x) for run, x in zip(runs, x_M, strict=True)]
        return [loss_of(model.head(x), one) for x, one in zip(x_M, batches, strict=True)]

    have = step(evaluating, model, PAIR, OBJECTIVES["all"], num_steps=2)
    assert_grads_equal(have[0], want[0], rtol=1e-12)
    assert have[1]["load"] == want[1]["load"]
    torch._dynamo.reset()


class BrokenOffError(Exception):
    pass


@pytest.mark.parametrize("declared", [False, True])
def test_a_block_that_raises_counts_nothing(declared: bool) -> None:
    """Not its microbatches, but those before it; and the same batch may be run again."""
    batches = [batch(2, 5, seed=seed, padded=True, packed="position_ids") for seed in range(4)]
    objectives = [GlobalBatch.Config(coef=0.4), *OBJECTIVES["all"][:3], ZLoss.Config(coef=0.1)]
    model, plan = toy_model(score="sigmoid", expert_bias=True), Accumulation(num_microbatches=4)
    settings: Any = {"accumulation": plan, "num_turns": 2, "bias": Quantile.Config()}
    want = step(in_turn, model, batches, objectives, **settings)
    calls = []

    def failing(model: ToyModel, balancer: Balancer, batches: Sequence[Batch]) -> list[Tensor]:
        calls.append(None)
        if len(calls) == 2:
            context = balancer.context
            state = (context.current, context.running, context.in_run, context.interleaved, context.explicit)
            hook = model.blocks[1].moe.experts.register_forward_hook(fail_at(2))
            with pytest.raises(BrokenOffError):
                by_turns(model, balancer, batches)
            hook.remove()
            assert state == (
                context.current,
                context.running,
                context.in_run,
                context.interleaved,
                context.explicit,
            )
            assert balancer.ledger.under_way is None
        return by_turns(model, balancer, batches)

    assert_same(step(failing, model, batches, objectives, **settings), want)


def fail_at(number: int) -> Callable[..., None]:
    """A hook that raises at its ``number``-th call."""
    calls: list[None] = []

    def hook(*args: Any) -> None:
        calls.append(None)
        if len(calls) == number:
            raise BrokenOffError

    return hook


def test_what_has_ended_stays_counted() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, [SequenceWise.Config(coef=1)], accumulation=2)

    kept = []

    def interrupted() -> None:
        with block_of(balancer) as (run_a, run_b):
            kept.append(run_b)
            run_a(model, PAIR[0].input_ids)
            run_a.end()
            run_a.end()
            run_b(model.blocks[0], model.embed(PAIR[1].input_ids))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [row.num_counted for row in balancer.ledger.settle()] == [1, 1]
    assert [int(row.sizes[0]) for row in balancer.ledger.rows] == [PAIR[0].num_tokens] * 2
    with pytest.raises(RuntimeError, match=r"microbatch 2 .* has ended"):
        kept[0](model.blocks[1], embedded(model, 1))


def test_discarding_within_a_block() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, OBJECTIVES["sequence"], accumulation=4)
    with balancer.interleaved([described(balancer, one) for one in PAIR]) as (run_a, run_b):
        run_a(model.blocks[0], model.embed(PAIR[0].input_ids))
        balancer.discard_step()
        with pytest.raises(RuntimeError, match="in none of its microbatches, or in one that has ended"):
            run_b(model.blocks[0], model.embed(PAIR[1].input_ids))
    assert not balancer.ledger.in_step


# ---------------------------------------------------------------- mistakes


def block_of(balancer: Balancer) -> Any:
    return balancer.interleaved([described(balancer, one) for one in PAIR])


def in_block(act: Callable[[ToyModel, Balancer, Any, Any], object]) -> None:
    """Run a mistake inside a block, and see that nothing is left of it."""
    model = toy_model()
    balancer = trimtab.attach(model, OBJECTIVES["sequence"], accumulation=FORWARD_FIRST)
    try:
        with block_of(balancer) as (run_a, run_b):
            act(model, balancer, run_a, run_b)
    finally:
        assert not balancer.ledger.in_step
        assert not balancer.context.running
        assert not balancer.context.in_run
        assert not balancer.context.interleaved


def embedded(model: ToyModel, place: int) -> Tensor:
    return model.embed(PAIR[place].input_ids)


def test_a_part_of_a_microbatch_that_has_ended() -> None:
    def act(model: ToyModel, balancer: Balancer, run_a: Any, run_b: Any) -> None:
        run_a.end()
        run_a(model.blocks[0], embedded(model, 0))

    with pytest.raises(RuntimeError, match=r"microbatch 1 of .* has ended and cannot run another part"):
        in_block(act)


def test_a_part_after_the_block() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, OBJECTIVES["sequence"], accumulation=2)
    with block_of(balancer) as (_, run_b):
        pass
    with pytest.raises(RuntimeError, match=r"microbatch 2 .* has ended"):
        run_b(model.head, embedded(model, 0))


@pytest.mark.parametrize("same", [False, True])
def test_runs_within_runs(same: bool) -> None:
    def act(model: ToyModel, balancer: Balancer, run_a: Any, run_b: Any) -> None:
        run_a(run_a if same else run_b, model.blocks[0], embedded(model, 0))

    with pytest.raises(RuntimeError, match=r"is run inside a part of another or of itself"):
        in_block(act)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_outside_of_any_run(compiled: bool) -> None:
    def act(model: ToyModel, balancer: Balancer, run_a: Any, run_b: Any) -> None:
        if compiled:
            model.blocks[0].compile(fullgraph=True, backend="aot_eager")
        run_a(model.blocks[0], embedded(model, 0))
        run_b(model.blocks[0], embedded(model, 1))
        model.blocks[0](embedded(model, 0))

    with pytest.raises(RuntimeError, match=r"blocks\.0\.moe\.router ran inside .* call the layer as run\("):
        in_block(act)
    torch._dynamo.reset()


def test_a_model_called_in_a_block() -> None:
    with pytest.raises(RuntimeError, match=r"but in none of its microbatches"):
        in_block(lambda model, balancer, run_a, run_b: model(PAIR[0].input_ids))


def test_a_layer_twice() -> None:
    def act(model: ToyModel, balancer: Balancer, run_a: Any, run_b: Any) -> None:
        run_a(model.blocks[0], embedded(model, 0))
        run_a(model.blocks[0], embedded(model, 0))

    with pytest.raises(RuntimeError, match=r"blocks\.0\.moe\.router ran twice in one microbatch"):
        in_block(act)


def test_a_layer_that_one_microbatch_leaves_out() -> None:
    def act(model: ToyModel, balancer: Balancer, run_a: Any, run_b: Any) -> None:
        x_a, x_b = (run_a(model.blocks[0], embedded(model, 0)), run_b(model.blocks[0], embedded(model, 1)))
        run_a(model.blocks[1], x_a)
        run_b(model.head, x_b)

    message = r"microbatch 2 of .* did not run blocks\.1\.moe\.router, as others did"
    with pytest.raises(RuntimeError, match=message):
        in_block(act)


def test_a_microbatch_that_has_ended_before_its_last_layers() -> None:
    model = toy_model(num_layers=3)
    balancer = trimtab.attach(model, OBJECTIVES["sequence"], accumulation=FORWARD_FIRST)

    def too_early() -> None:
        with block_of(balancer) as (run_a, run_b):
            run_a(model.blocks[0], embedded(model, 0))
            run_a.end()
            run_b(model, PAIR[1].input_ids)

    with pytest.raises(RuntimeError, match=r"microbatch 1 .* blocks\.1\.moe\.router \(and 1 more\)"):
        too_early()


def test_tokens_of_the_other_microbatch() -> None:
    def act(model: ToyModel, balancer: Balancer, run_a: Any, run_b: Any) -> None:
        run_a(model.blocks[0], embedded(model, 1))

    with pytest.raises(ValueError, match=r"routed 14 tokens, but .* with 15"):
        in_block(act)


def test_rows_that_do_not_add_up() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, OBJECTIVES["sequence"], accumulation=2)
    with (
        balancer.concatenated([described(balancer, one) for one in ROWS]),
        pytest.raises(ValueError, match=r"routed 18 tokens, but .* with 24"),
    ):
        model(ROWS[0].input_ids)


def test_parts_that_hide_what_they_compute() -> None:
    def act(model: ToyModel, balancer: Balancer, run_a: Any, run_b: Any) -> None:
        kept = []
        run_a(lambda: kept.append(model.embed(PAIR[0].input_ids)))  # no router runs
        run_a(lambda: kept.append(model.blocks[0](kept[0])))

    with pytest.raises(TypeError, match=r"ran a router and returned NoneType, in which no tensor is found"):
        in_block(act)


def test_backward_before_the_end() -> None:
    def act(model: ToyModel, balancer: Balancer, run_a: Any, run_b: Any) -> None:
        run_a(model, PAIR[0].input_ids).sum().backward()

    with pytest.raises(RuntimeError, match=r"backward runs before the forward of its microbatch has ended"):
        in_block(act)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda model, balancer: balancer.step(), r"step\(\) inside balancer.interleaved"),
        (lambda model, balancer: balancer.state_dict(), r"state_dict\(\) belongs between steps"),
        (lambda model, balancer: balancer.start_step(num_tokens=1), r"start_step comes before"),
        (lambda model, balancer: copy.deepcopy(model), r"copied inside balancer.interleaved"),
        (lambda model, balancer: block_of(balancer).__enter__(), r"inside another"),
        (
            lambda model, balancer: described(balancer, PAIR[0]).__enter__(),
            r"microbatch\(\.\.\.\) is entered inside",
        ),
    ],
)
def test_what_does_not_belong_into_a_block(act: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        in_block(lambda model, balancer, run_a, run_b: act(model, balancer))


def test_a_block_inside_a_description() -> None:
    balancer = trimtab.attach(toy_model(), OBJECTIVES["sequence"], accumulation=2)
    block = block_of(balancer)
    with (
        described(balancer, PAIR[0]),
        pytest.raises(RuntimeError, match=r"give the description to interleaved\("),
        block,
    ):
        pass
    assert not balancer.context.interleaved


@pytest.mark.parametrize("name", ["interleaved", "concatenated"])
def test_wrong_microbatches(name: str) -> None:
    balancer, other = (trimtab.attach(toy_model(), []) for _ in range(2))

    def give(microbatches: Any) -> None:
        made = getattr(balancer, name)(microbatches)
        if name == "interleaved":
            made.__enter__()

    for wrong in (described(balancer, PAIR[0]), [PAIR[0]]):
        with pytest.raises(ValueError, match=rf"takes a list of microbatches, as in balancer\.{name}\("):
            give(wrong)
    with pytest.raises(ValueError, match=rf"{name}\(\[\]\) has no microbatch"):
        give([])
    with pytest.raises(ValueError, match="by the balancer of another model"):
        give([described(other, PAIR[0])])
    assert not balancer.context.interleaved


def test_more_microbatches_than_the_step_has() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, OBJECTIVES["sequence"], accumulation=1)
    with pytest.raises(RuntimeError, match=r"training forward 2 of a step of num_microbatches=1"):
        by_turns(model, balancer, PAIR)
    with pytest.raises(RuntimeError, match=r"training forward 2 of a step of num_microbatches=1"):
        together(model, balancer, ROWS)
