"""Router records: the routing of every forward that somebody asks for, and nothing otherwise.

Shapes: T tokens, E experts, K top-k, B sequences, S length, L layers, M forwards.
"""

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import trimtab
from tests.routings import NAMES, SEQUENCE, TWO, assert_records, routing_of
from tests.side_stream import SideStream
from tests.toy import batch, task_loss, toy_model
from tests.turns import PAIR, ROWS, by_turns, loss_of, together
from trimtab import Accumulation
from trimtab.host_copies import HostCopies
from trimtab.host_tensor import HostTensor, is_ready
from trimtab.records import WHATS

RAGGED = [batch(3, 6, seed=5, padded=True), batch(2, 5, seed=6, packed="position_ids")]


# -------------------------------------------------------------------- values


@pytest.mark.parametrize("mode", ["training", "evaluation", "no_grad", "inference"])
@pytest.mark.parametrize("way", ["fused", "hooks", "without objectives", "without a balancer"])
def test_records_are_what_routers_did(way: str, mode: str) -> None:
    model = toy_model(score="sigmoid", expert_bias=True, scale=2.5).train(mode == "training")
    want = routing_of(model, RAGGED)
    target: Any = model
    if way != "without a balancer":
        configs = [] if way == "without objectives" else SEQUENCE
        target = trimtab.attach(model, configs, accumulation=TWO, fused=way != "hooks")
    off = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(mode, torch.enable_grad)
    with trimtab.record_routing(target, what=WHATS) as records, off():
        for one in RAGGED:
            model(**one.call)
    assert tuple(records) == NAMES
    assert_records(records, want)
    for name in records:
        for record in records[name]:
            assert not any(record[what].requires_grad or record[what].is_inference() for what in WHATS)


@pytest.mark.parametrize("copies", [None, HostCopies(SideStream())])
def test_records_do_not_change_with_the_model(copies: HostCopies | None) -> None:
    """They are copies: later in-place changes of what a router returned are not seen in them."""
    model = toy_model()
    balancer = trimtab.attach(model, [])

    def spoil(module: Any, args: Any, output: Any) -> None:
        for tensor in output:
            tensor.zero_()

    model.blocks[0].moe.router.register_forward_hook(spoil)
    with trimtab.record_routing(balancer, what=WHATS, copies=copies) as records, torch.no_grad():
        model(**RAGGED[0].call)
    assert all(bool(records[NAMES[0]][0][what].any()) for what in WHATS)


def test_only_what_is_asked_for() -> None:
    model = toy_model()
    with trimtab.record_routing(model) as records:
        model(**RAGGED[0].call)
    (record,) = records[NAMES[1]]
    assert record.ids_TK is not None
    assert (record.logits_TE, record.scores_TE, record.weights_TK) == (None, None, None)
    with pytest.raises(KeyError, match=r"'logits' was not recorded; ask for it: record_routing\(..., what="):
        record["logits"]
    with trimtab.record_routing(model, what="weights") as records:
        model(**RAGGED[0].call)
    assert records[NAMES[0]][0].ids_TK is None
    assert records[NAMES[0]][0]["weights"].shape == (18, 2)


# -------------------------------------------------------------------- forwards and their order


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("way", [by_turns, together])
def test_several_microbatches_at_a_time(way: Any, fused: bool, training: bool) -> None:
    """As one after the other, in the order in which they are described."""
    model = toy_model().train(training)
    want = routing_of(model, ROWS)
    balancer = trimtab.attach(model, SEQUENCE, accumulation=TWO, fused=fused)
    with trimtab.record_routing(balancer, what=WHATS) as records:
        way(model, balancer, ROWS)
    assert_records(records, want)


def test_turns_in_another_order() -> None:
    model = toy_model()
    want = routing_of(model, PAIR)
    balancer = trimtab.attach(model, SEQUENCE, accumulation=TWO)
    describe = [balancer.microbatch(batch_shape=tuple(one.input_ids.shape)) for one in PAIR]
    with trimtab.record_routing(balancer, what=WHATS) as records, balancer.interleaved(describe) as runs:
        for run, one in reversed(list(zip(runs, PAIR, strict=True))):
            run(model, one.input_ids)
    assert_records(records, want)


@pytest.mark.parametrize("checkpoint", ["nonreentrant", "reentrant", "selective"])
def test_recomputation_is_not_recorded(checkpoint: str) -> None:
    model = toy_model()
    want = routing_of(model, RAGGED)
    model.checkpoint = checkpoint
    balancer = trimtab.attach(model, SEQUENCE, accumulation=TWO)
    with trimtab.record_routing(balancer, what=WHATS) as records:
        for loss in [task_loss(model, one) for one in RAGGED]:
            loss.backward()
    assert_records(records, want)


def test_counting_passes_are_not_recorded() -> None:
    model = toy_model()
    want = routing_of(model, RAGGED)
    plan = Accumulation(num_microbatches=2, order="counting_pass")
    balancer = trimtab.attach(model, SEQUENCE, accumulation=plan)
    with trimtab.record_routing(balancer, what=WHATS) as records:
        with balancer.counting_pass():
            for one in RAGGED:
                model(**one.call)
        for one in RAGGED:
            task_loss(model, one)
    assert_records(records, want)


def test_a_router_by_itself() -> None:
    router = toy_model().blocks[0].moe.router
    x_BSD = torch.randn(2, 3, 8, dtype=torch.float64)
    with trimtab.record_routing(router, what=("ids",)) as records:
        ids_TK = router(x_BSD)[2]
    assert torch.equal(records[""][0].by_sequence("ids"), ids_TK.view(2, 3, 2))


def test_shape_of_the_batch() -> None:
    """All tokens are there, padding too, in the model's order."""
    model = toy_model()
    with trimtab.record_routing(model, what=("ids", "logits")) as records:
        for one in RAGGED:
            logits = model.blocks[0].moe.router(model.blocks[0].norm(model.embed(one.input_ids)))[0]
            model(**one.call)
            record = records[NAMES[0]][-1]
            assert torch.equal(record.by_sequence("logits"), logits.view(*one.input_ids.shape, 6))
            assert record.by_sequence("ids").shape == (*one.input_ids.shape, 2)
    balancer = trimtab.attach(model, [])
    part = balancer.microbatch(batch_shape=(2, 5), tokens=torch.arange(7))
    with trimtab.record_routing(balancer) as records, part:
        model(torch.zeros(1, 7, dtype=torch.int64))
    assert records[NAMES[0]][0]["ids"].shape == (7, 2)
    with pytest.raises(ValueError, match="7 tokens are not rows of one length: this forward held a part"):
        records[NAMES[0]][0].by_sequence("ids")


# -------------------------------------------------------------------- reading


def test_stacking() -> None:
    model = toy_model()
    with trimtab.record_routing(model, what=("ids", "weights")) as records:
        for seed in range(3):
            model(batch(2, 5, seed=seed).input_ids)
    whole_MLTK = records.stacked("ids")
    assert whole_MLTK.shape == (3, 2, 10, 2)
    for place, name in enumerate(records):
        for number in range(3):
            assert torch.equal(whole_MLTK[number, place], records[name][number]["ids"])
            assert torch.equal(
                records.stacked("weights", microbatch=number)[place], records[name][number]["weights"]
            )
    with pytest.raises(KeyError, match="microbatch=3 of 3 forwards"):
        records.stacked("ids", microbatch=3)
    with pytest.raises(KeyError, match="no layer 'head' ran while records were taken"):
        records["head"]


def test_records_travel_between_processes() -> None:
    model = toy_model()
    want = routing_of(model, RAGGED)
    with trimtab.record_routing(model, what=WHATS) as records:
        for one in RAGGED:
            model(**one.call)
    assert_records(pickle.loads(pickle.dumps(records)), want)


def test_what_does_not_stack() -> None:
    model = toy_model()
    with trimtab.record_routing(model) as records:
        with pytest.raises(ValueError, match="nothing was recorded: no router ran"):
            records.stacked("ids")
        for one in RAGGED:
            model(**one.call)
        with pytest.raises(ValueError, match=r"in forward 1 have shape \(10, 2\), those of .* \(18, 2\)"):
            records.stacked("ids")
        assert records.stacked("ids", microbatch=1).shape == (2, 10, 2)
        model.blocks[1].moe.router(torch.randn(4, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"blocks\.0\.moe\.router ran 2 times and another layer 3 times"):
        records.stacked("ids")


def test_forwards_that_do_not_continue() -> None:
    model = toy_model()
    with trimtab.record_routing(model) as records:
        for one in RAGGED:
            model(**one.call)
    with pytest.raises(ValueError, match=r"2 forwards of \[2, 3\] sequences do not continue each other"):
        records.joined()


def test_copies_do_not_wait() -> None:
    """Every value is sent once; stacking waits for none of them, reading for what is read."""
    model, engine = toy_model(), SideStream()
    want = routing_of(model, RAGGED[:1])
    copies = HostCopies(engine)
    with trimtab.record_routing(model, what=("ids", "scores"), copies=copies) as records:
        model(**RAGGED[0].call)
        stacked = records.stacked("ids")
        joined = records.joined("scores")[NAMES[1]]
        assert not is_ready(records.joined("ids", length=50)[NAMES[1]])
        assert engine.count("to_host") == 4
        assert not is_ready(stacked)
        assert not is_ready(joined)
        assert isinstance(records[NAMES[1]][0].by_sequence("ids"), HostTensor)
        assert engine.num_waiting == 4
    assert torch.equal(stacked[0].clone(), torch.stack([layer[0]["ids"] for layer in want]))
    assert torch.equal(joined.clone(), want[1][0]["scores"])
    assert not engine.mistakes


# -------------------------------------------------------------------- layers of all kinds


def test_parts_with_balancers_of_their_own() -> None:
    model = toy_model()
    want = routing_of(model, RAGGED)
    with trimtab.record_routing([model.blocks[0], model.blocks[1].moe], what=WHATS) as records:
        for one in RAGGED:
            model(**one.call)
    assert tuple(records) == ("moe.router", "router")
    assert_records(records, want)
    for part in (model.blocks[0], model.blocks[1].moe):
        trimtab.attach(part, [], accumulation=2)
    with trimtab.record_routing(model, what=WHATS) as records:
        for one in RAGGED:
            model(**one.call)
    assert_records(records, want)
    with pytest.raises(ValueError, match="two of the parts given have a layer 'blocks"):
        trimtab.record_routing([toy_model(), toy_model(num_layers=1)]).__enter__()


# -------------------------------------------------------------------- nothing while nobody asks


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_computed_or_kept_while_nobody_asks(training: bool, fused: bool) -> None:
    model = toy_model().train(training)
    balancer = trimtab.attach(model, SEQUENCE, fused=fused)

    def operators() -> list[str]:
        model.zero_grad()
        with Operators() as seen:
            loss = task_loss(model, RAGGED[0])
            if training:
                loss.backward()
        balancer.discard_step()
        return seen.called

    before = operators()
    with trimtab.record_routing(balancer, what=("scores",)) as records:
        during = operators()
        assert balancer.context.taps is not None
    assert len(during) >= len(before) + 4
    assert operators() == before
    assert balancer.context.taps is None
    kept = weakref.ref(records[NAMES[0]][0]["scores"])
    assert kept() is not None
    del records
    gc.collect()
    assert kept() is None


def test_a_block_that_fails_is_left() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, [])
    with pytest.raises(KeyError, match="stop"), trimtab.record_routing(balancer):
        raise KeyError("stop")
    assert balancer.context.taps is None
    bare = toy_model()
    with pytest.raises(KeyError, match="stop"), trimtab.record_routing(bare):
        raise KeyError("stop")
    assert not hasattr(bare, "_trimtab_balancer")


def test_a_bare_model_is_left_as_it_was() -> None:
    model = toy_model()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    want = task_loss(model, RAGGED[0])
    with trimtab.record_routing(model):
        for _ in range(3):  # its forwards are no steps
            assert torch.equal(task_loss(model, RAGGED[0]), want)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="no balancer is attached"):
        trimtab.balancer_of(model)


def test_gradients_do_not_change() -> None:
    found = []
    for record in (False, True):
        model = toy_model(checkpoint="nonreentrant")
        balancer = trimtab.attach(model, SEQUENCE, measure_every=1)
        if record:
            with trimtab.record_routing(balancer, what=WHATS):
                loss = task_loss(model, RAGGED[0])
            loss.backward()
        else:
            task_loss(model, RAGGED[0]).backward()
        balancer.step()
        found.append(([p.grad for p in model.parameters()], balancer.metrics()))
    (grads, metrics), (want, want_metrics) = found
    assert all(torch.equal(a, b) for a, b in zip(grads, want, strict=True))
    assert metrics == want_metrics


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_the_model_are_not_recorded(how: Any) -> None:
    model = toy_model()
    balancer = trimtab.attach(model, [])
    with trimtab.record_routing(balancer) as records:
        model(**RAGGED[0].call)
        copied = how(model)
        trimtab.balancer_of(copied).discard_step()
        copied(**RAGGED[0].call)
    assert records.num_forwards == 1
    assert trimtab.balancer_of(copied).context.taps is None


# -------------------------------------------------------------------- mistakes


def test_messages() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, [])
    for what in (("ids", "gates"), ()):
        with pytest.raises(ValueError, match="must be one or more of 'logits', 'scores', 'ids', 'weights'"):
            trimtab.record_routing(model, what=what).__enter__()  # type: ignore[arg-type]
    with trimtab.record_routing(balancer):
        with pytest.raises(RuntimeError, match="inside another of the same model; read what both need"):
            trimtab.record_routing(model).__enter__()
        loss_of(model(**RAGGED[0].call), RAGGED[0])
    with (
        pytest.warns(UserWarning, match="no router has run; was the model"),
        trimtab.record_routing(balancer),
    ):
        pass
    balancer.remove()
    with pytest.raises(RuntimeError, match="of a balancer that was removed; attach again, or give the model"):
        trimtab.record_routing(balancer).__enter__()
    with pytest.raises(
        ValueError, match=r"record_routing\(3\) takes a balancer, a model, or a list of these"
    ):
        trimtab.record_routing(3).__enter__()  # type: ignore[arg-type]
