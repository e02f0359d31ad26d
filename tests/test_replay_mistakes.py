"""What may be given to replay_routing, and what it says of the rest. Shapes: L layers, T tokens, K top-k."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab
from tests.routings import BATCHES, TWO, ids_of, random_ids
from tests.side_stream import SideStream
from tests.toy import batch, toy_model
from trimtab.host_copies import HostCopies


def test_forms_of_ids() -> None:
    model = toy_model().eval()
    ids_MLTK = torch.stack(ids_of(BATCHES))
    names = [f"blocks.{layer}.moe.router" for layer in range(2)]
    engine = SideStream()
    source = trimtab.attach(toy_model(), [], accumulation=TWO)
    with (
        trimtab.replay_routing(source, ids_MLTK),
        trimtab.record_routing(source, copies=HostCopies(engine)) as on_their_way,
    ):
        for one in BATCHES:
            source.model(**one.call)  # type: ignore[misc]
    forms: list[Any] = [
        ids_MLTK,
        list(ids_MLTK),
        [dict(zip(names, one, strict=True)) for one in ids_MLTK.to(torch.int32)],
        [{name: ids.view(3, 6, 2) for name, ids in zip(names, one, strict=True)} for one in ids_MLTK],
        on_their_way,
    ]
    for form in forms:
        with (
            torch.no_grad(),
            trimtab.replay_routing(model, form),
            trimtab.record_routing(model) as records,
        ):
            for one in BATCHES:
                model(**one.call)
        assert torch.equal(records.stacked("ids"), ids_MLTK)
    for single in (ids_MLTK[0], dict(zip(names, ids_MLTK[0], strict=True))):
        with torch.no_grad(), trimtab.replay_routing(model, single), trimtab.record_routing(model) as records:
            model(**BATCHES[0].call)
        assert torch.equal(records.stacked("ids")[0], ids_MLTK[0])


@pytest.mark.parametrize("order", ["replay", "record"])
def test_a_bare_model_whose_backward_may_come_after_the_block(order: str) -> None:
    """Its hooks are gone by then, and checkpointed layers would be computed again with other experts."""
    model = toy_model()
    blocks = [trimtab.replay_routing(model, ids_of(BATCHES)[0]), trimtab.record_routing(model)]
    with contextlib.ExitStack() as stack:
        for block in blocks if order == "replay" else reversed(blocks):
            stack.enter_context(block)
        with pytest.raises(RuntimeError, match="Attach one that stays"):
            model(**BATCHES[0].call)
        with torch.no_grad():
            model(**BATCHES[0].call)


def test_a_part_of_a_model_with_a_balancer() -> None:
    model = toy_model()
    trimtab.attach(model, [])
    with (
        pytest.raises(RuntimeError, match="balancer is of the whole"),
        trimtab.record_routing(model.blocks[0]),
    ):
        pass


GOOD = random_ids(18)
FIRST, SECOND = "blocks.0.moe.router", "blocks.1.moe.router"


def spoiled(token: int, values: list[int]) -> Tensor:
    ids = GOOD.clone()
    ids[token] = torch.tensor(values)
    return ids


MISTAKES: list[tuple[Any, str]] = [
    ([], "was given the ids of no microbatch; give those of one or more"),
    (3, "replay_routing was given int; expected records of record_routing, or for each microbatch {layer: "),
    (GOOD, r"was given a tensor of shape \(18, 2\); expected records"),
    ([GOOD], r"ids of microbatch 0 are a tensor of shape \(18, 2\); expected {layer: \(T, K\) ids} or an"),
    (
        GOOD.expand(3, 18, 2),
        r"are of 3 layers, \(L, T, K\) = \(3, 18, 2\), but the model has L = 2: blocks.0.moe",
    ),
    (
        {FIRST: GOOD},
        f"ids of microbatch 0 lack {SECOND}; give the ids of every layer of this model, and None",
    ),
    (
        {FIRST: GOOD, SECOND: GOOD, "head": GOOD},
        "are also of head, which this model does not have; it has blocks",
    ),
    ({FIRST: GOOD, SECOND: None, "head": None}, "are also of head"),
    ({FIRST: None, SECOND: None}, "are None for every layer, which replays nothing"),
    ({FIRST: GOOD, SECOND: GOOD[:7]}, f"{SECOND} has ids of 7 tokens, layers before it of 18"),
    ({FIRST: GOOD.double(), SECOND: GOOD}, r"has torch.float64 of shape \(18, 2\), expected integers"),
    (
        {FIRST: GOOD[:, :1], SECOND: GOOD},
        r"that is K = 1, but its router chooses K = 2 experts for each token",
    ),
    (
        {FIRST: GOOD, SECOND: spoiled(4, [0, 6])},
        rf"microbatch 0: {SECOND} has ids from 0 to 6, expected \[0, 6\)",
    ),
    ({FIRST: GOOD, SECOND: spoiled(4, [0, -2])}, "has ids from -2 to 5"),
    (
        {FIRST: GOOD, SECOND: spoiled(4, [0, -1])},
        r"has \[0, -1\] for token 4; a token has all of its 2 experts",
    ),
    ({FIRST: GOOD, SECOND: spoiled(4, [3, 3])}, r"has \[3, 3\] for token 4; its 2 experts must differ"),
]


@pytest.mark.parametrize(("ids", "message"), MISTAKES)
def test_ids_that_do_not_fit(ids: Any, message: str) -> None:
    balancer = trimtab.attach(toy_model(), [])
    with pytest.raises(ValueError, match=message):
        trimtab.replay_routing(balancer, ids).__enter__()
    assert balancer.context.taps is None


def test_records_without_ids() -> None:
    model = toy_model()
    with trimtab.record_routing(model, what="weights") as records:
        model(**BATCHES[0].call)
    with pytest.raises(ValueError, match=r"was given records of \('weights',\); record ids"):
        trimtab.replay_routing(model, records).__enter__()


def test_forwards_that_do_not_fit() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, [], accumulation=4)
    ids_M = ids_of(BATCHES)
    missing = pytest.raises(RuntimeError, match="the ids of 2 microbatches, and 1 forwards ran in the block")
    with missing, trimtab.replay_routing(balancer, ids_M):
        model(**BATCHES[0].call)
    with trimtab.replay_routing(balancer, ids_M[0]):
        model(**BATCHES[0].call)
        with pytest.raises(
            RuntimeError, match=r"forward 2 runs inside .* given the ids of 1 microbatch; give"
        ):
            model(**BATCHES[0].call)
    other = pytest.raises(RuntimeError, match=r"forward 1 inside .* has 10 tokens, but the ids .* are of 18")
    with other, trimtab.replay_routing(balancer, ids_M[0]):
        model(batch(2, 5, seed=0).input_ids)
    balancer.discard_step()
    # And not that forwards are missing.
    with pytest.raises(KeyError, match="stop"), trimtab.replay_routing(balancer, ids_M):
        raise KeyError("stop")
    with trimtab.replay_routing(balancer, ids_M[0]):
        with pytest.raises(RuntimeError, match="inside another of the same model; end that one first"):
            trimtab.replay_routing(model, ids_M[0]).__enter__()
        router = model.blocks[0].moe.router
        x_TD = torch.zeros(18, 8, dtype=torch.float64)
        with pytest.raises(RuntimeError, match=r"router is called by itself inside replay_routing"):
            router(x_TD)
        with pytest.raises(
            ValueError, match=r"replay_ids_TK is given inside replay_routing\(...\), which says"
        ):
            router(x_TD, replay_ids_TK=GOOD)
        model(**BATCHES[0].call)
    assert balancer.context.taps is None


def test_ids_on_a_device_are_not_read() -> None:
    """Reading them would wait; shapes are checked. The meta device has no values to read at all."""
    model = toy_model().to("meta")
    balancer = trimtab.attach(model, [])
    ids_LTK = torch.empty(2, 18, 2, dtype=torch.int64, device="meta")
    with trimtab.replay_routing(balancer, ids_LTK):
        balancer.context.taps.replay.take(18, False, torch.device("meta"))
    with pytest.raises(ValueError, match="K = 3"):
        trimtab.replay_routing(balancer, torch.empty(2, 18, 3, dtype=torch.int64, device="meta")).__enter__()
