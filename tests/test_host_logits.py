"""`attach(..., keep="host")`: the gradients of keep="logits" bit for bit, and nothing of size [T, E] on the device.

The engine of these tests hands out NaN before its copies run, and a copy runs only when compute waits for it:
whoever reads logits too early has other gradients.
"""

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.multiprocessing.reductions import StorageWeakRef

import trimtab
from tests.hf_reference import OBJECTIVES as HF_OBJECTIVES
from tests.hf_reference import stock_model
from tests.host_runs import BATCHES, OBJECTIVES, L, M, Run, assert_equal, model_of
from tests.side_stream import SideStream
from tests.toy import Batch, grads, task_loss
from tests.turns import PAIR, ROWS, by_turns, step, together
from trimtab import Accumulation, ZLoss
from trimtab.host_copies import HostCopies
from trimtab.host_logits import HostLogits, _held, hold, take


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Any:
    yield
    if _held:
        gc.collect()
    assert not _held


# ---------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "hook"])
@pytest.mark.parametrize("checkpoint", [None, "nonreentrant", "reentrant", "selective"])
def test_gradients_are_those_of_kept_logits(checkpoint: str | None, fused: bool) -> None:
    """Two steps of several forwards in flight; checkpointed layers recompute their logits and send nothing."""
    model = model_of(checkpoint=checkpoint)
    want, have = Run(model, "logits", fused=fused), Run(model, fused=fused)
    for _ in range(2):
        assert_equal(have.step(), want.step())
        have.assert_all_is_returned()
    sent = 2 * L * M if checkpoint is None else 0
    assert have.engine.count("to_host") == have.engine.count("to_device") == sent
    assert want.engine.log == []


@pytest.mark.parametrize("score", ["softmax", "sqrt_softplus"])
def test_other_scores(score: str) -> None:
    model = model_of(score)
    assert_equal(Run(model).step(), Run(model, "logits").step())


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_backwards_in_any_order(order: tuple[int, ...]) -> None:
    have, want = Run(model_of()), Run(model_of(), "logits")
    assert_equal(have.step(order=order), want.step(order=order))
    have.assert_all_is_returned()


@pytest.mark.parametrize(("losses", "pair"), [(by_turns, PAIR), (by_turns, ROWS), (together, ROWS)])
def test_several_microbatches_in_one_forward(losses: Any, pair: list[Batch]) -> None:
    engine = SideStream()
    want = step(losses, model_of(), pair, OBJECTIVES, keep="logits")
    have = step(losses, model_of(), pair, OBJECTIVES, keep="host", host_copies=HostCopies(engine))
    assert_equal(have[0], want[0])
    assert engine.count("to_host") == engine.count("to_device") == 2 * L
    assert not engine.mistakes


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_hugging_face_models(family: str) -> None:
    engine = SideStream()
    found = []
    for settings in (dict(keep="logits"), dict(keep="host", host_copies=HostCopies(engine))):
        model, make_batch = stock_model(family, dtype=torch.float32, num_layers=2)
        trimtab.attach(model, HF_OBJECTIVES["all"], **settings)  # type: ignore[arg-type]
        model(**make_batch(3, 12, seed=1, padding=True)).loss.backward()
        found.append(grads(model))
    assert_equal(found[1], found[0])
    assert engine.count("to_host") == 2
    assert not engine.mistakes


def test_returned_losses() -> None:
    found = {}
    for keep in ("logits", "host"):
        run = Run(model_of(), keep, losses="returned")
        task = sum(task_loss(run.model, one) for one in BATCHES)
        losses = run.balancer.finalize()
        (task + losses.balance_loss + losses.z_loss).backward()
        run.balancer.step()
        found[keep] = grads(run.model)
    assert_equal(found["host"], found["logits"])
    assert run.engine.count("to_host") == run.engine.count("to_device") == L * M
    del losses
    run.assert_all_is_returned()


def test_a_backward_that_runs_twice() -> None:
    """The second fetches once more."""
    found = {}
    for keep in ("logits", "host"):
        run = Run(model_of(), keep, accumulation=1)
        loss = task_loss(run.model, BATCHES[0])
        parameters = [p for p in run.model.parameters() if p.requires_grad]
        first = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        second = torch.autograd.grad(loss, parameters, allow_unused=True)
        found[keep] = first
        for one, other in zip(first, second, strict=True):
            assert one is other is None or torch.equal(one, other)
        del loss
        if keep == "host":
            assert run.engine.count("to_device") == 2 * L
            run.assert_all_is_returned()
    for one, other in zip(found["logits"], found["host"], strict=True):
        assert one is other is None or torch.equal(one, other)


def test_a_backward_in_two_parts() -> None:
    """As pipelines split it: of the stage's input first, of its weights when there is time."""
    found = {}
    for keep in ("logits", "host"):
        run = Run(model_of(), keep, accumulation=1)
        blocks = run.model.blocks
        x_BSD = torch.ones(2, 5, 8, dtype=torch.float64).cumsum(dim=1).requires_grad_()
        h_BSD = x_BSD
        for block in blocks:
            h_BSD = block(h_BSD)
        inputs, groups = stage_backward_input([h_BSD.square().sum()], None, [x_BSD], blocks.parameters())
        del h_BSD
        stage_backward_weight(blocks.parameters(), groups)
        del groups
        found[keep] = {"x": inputs[0], **grads(blocks)}
    assert_equal(found["host"], found["logits"])
    assert run.engine.count("to_host") == L
    gc.collect()  # the split leaves cycles
    run.assert_all_is_returned()


# ---------------------------------------------------------------------------------------- order


def test_a_backward_fetches_one_layer_ahead() -> None:
    """The last layer's logits are waited for; while they are used those of the layer before are on their way."""
    run = Run(model_of(), accumulation=1)
    loss = task_loss(run.model, BATCHES[0])
    run.engine.run()
    run.engine.log.clear()
    loss.backward()
    calls = [entry.split()[0] for entry in run.engine.log]
    fetch = ["side_waits", "to_device", "keep", "record"]
    # Layer 3 fetches its own, then starts layer 2; layer 2 starts layer 1; layer 1 has nothing before it.
    assert calls == [*fetch, *fetch, "compute_waits", *fetch, "compute_waits", "compute_waits"]
    events = [int(entry.split()[1]) for entry in run.engine.log if entry.startswith("compute_waits")]
    assert events == sorted(events)
    assert events[1] - events[0] == 2  # one copy later: each waits for its own


def test_each_forward_fetches_its_own_layers() -> None:
    """With several forwards in flight the layer before is that of the same forward."""
    run = Run(model_of())
    losses = [task_loss(run.model, one) for one in BATCHES]
    run.engine.run()
    before = run.engine.count("to_device")
    losses[1].backward()
    assert run.engine.count("to_device") - before == L
    for loss in (losses[0], losses[2]):
        loss.backward()
    run.assert_all_is_returned()


def test_forward_waits_for_nothing() -> None:
    run = Run(model_of())
    losses = [task_loss(run.model, one) for one in BATCHES]
    assert run.engine.num_waiting == L * M
    assert run.engine.count("wait") == run.engine.count("compute_waits") == 0
    for loss in losses:
        loss.backward()


# ---------------------------------------------------------------------------------------- memory


def logits_held(run: Run) -> int:
    """Bytes of router logits that are on the device between forward and backward."""
    storages: list[StorageWeakRef] = []
    sizes: list[int] = []

    def note(module: Any, args: Any, output: tuple[Tensor, ...]) -> None:
        storages.append(StorageWeakRef(output[0].untyped_storage()))
        sizes.append(output[0].untyped_storage().nbytes())

    hooks = [block.moe.router.register_forward_hook(note) for block in run.model.blocks]
    loss = task_loss(run.model, BATCHES[0])
    run.engine.run()
    held = sum(size for storage, size in zip(storages, sizes, strict=True) if not storage.expired())
    loss.backward()
    for hook in hooks:
        hook.remove()
    return held


@pytest.mark.parametrize("num_layers", [1, 4])
def test_no_logits_are_held_on_the_device(num_layers: int) -> None:
    T, E = 3 * 6, 6
    model = model_of(num_layers=num_layers)
    assert logits_held(Run(model, "logits", accumulation=1)) == num_layers * T * E * 8
    host = Run(model, accumulation=1)
    assert logits_held(host) == 0
    host.assert_all_is_returned()
    assert host.copies.pinned_bytes == num_layers * 1024  # 864 bytes each, rounded up


def test_a_fetched_layer_is_let_go_of_when_its_backward_is_through() -> None:
    run = Run(model_of(), accumulation=1)
    fetched: list[StorageWeakRef] = []
    send = run.engine.copy

    def noting(destination: Tensor, source: Tensor) -> None:
        fetched.append(StorageWeakRef(destination.untyped_storage()))
        # Two at a time: the one in use and the next.
        assert sum(not storage.expired() for storage in fetched[L:]) <= 2
        send(destination, source)

    run.engine.copy = noting  # type: ignore[method-assign]
    run.step([BATCHES[0]])
    assert len(fetched) == 2 * L
    assert all(storage.expired() for storage in fetched[L:])


@pytest.mark.parametrize("waited", [False, True])
def test_a_forward_whose_backward_never_runs_leaves_nothing(waited: bool) -> None:
    run = Run(model_of(), accumulation=1)
    loss = task_loss(run.model, BATCHES[0])
    if waited:
        run.engine.run()
    assert run.copies.used_bytes == L * 1024
    del loss
    assert not _held
    run.balancer.discard_step()
    assert_equal(run.step([BATCHES[0]]), Run(model_of(), "logits", accumulation=1).step([BATCHES[0]]))
    run.assert_all_is_returned()


def test_many_steps_use_the_same_memory() -> None:
    run = Run(model_of())
    for _ in range(4):
        run.step()
        run.engine.run()
    assert run.engine.num_pinned == run.copies.pinned_bytes == L * M * 1024


def test_a_full_host_keeps_the_rest_on_the_device() -> None:
    run = Run(model_of(), memory=dict(max_bytes=4096))
    with pytest.warns(
        UserWarning, match=r"max_bytes=4096 of pinned memory are full: logits of routers stay on the device"
    ):
        have = run.step()
    want = Run(model_of(), "logits")
    assert_equal(have, want.step())
    assert_equal(run.step(), want.step())  # and the warning comes once
    assert run.engine.count("to_host") == 2 * 4
    run.assert_all_is_returned()


# ---------------------------------------------------------------------------------------- what is not sent


def test_evaluation_sends_nothing() -> None:
    run = Run(model_of())
    with torch.no_grad():
        task_loss(run.model, BATCHES[0])
    run.model.eval()
    task_loss(run.model, BATCHES[0])
    assert run.engine.log == []


def test_without_objectives_nothing_is_sent() -> None:
    run = Run(model_of(), objectives=[], bias=trimtab.CentredSign.Config())
    run.step()
    assert run.engine.log == []


def test_the_cpu_keeps_its_logits() -> None:
    """Without an engine that serves it."""
    model = model_of()
    trimtab.attach(
        model, OBJECTIVES, keep="host", accumulation=Accumulation(num_microbatches=M, order="forward_first")
    )
    losses = [task_loss(model, one) for one in BATCHES]
    assert not _held
    for loss in losses:
        loss.backward()
    assert_equal(grads(model), Run(model_of(), "logits").step())


def test_no_tokens() -> None:
    engine = SideStream()
    model = model_of()
    trimtab.attach(model, [ZLoss.Config(coef=0.1)], keep="host", host_copies=HostCopies(engine))
    task_loss(model, Batch(torch.zeros(2, 0, dtype=torch.int64))).backward()
    assert engine.log == []


def test_a_tensor_subclass_stays_where_it_is() -> None:
    copies = HostCopies(SideStream())
    logits_TE = copies.send(torch.ones(3, 4))
    held, rows_T0 = hold(logits_TE, HostLogits(copies).handle(), torch.tensor(0))
    assert held is logits_TE
    assert rows_T0 is None
    assert take(logits_TE, held, rows_T0, 4, torch.float32) is logits_TE


class Sizes:
    """Hooks that keep what they are given, as those that measure do."""

    def __init__(self) -> None:
        self.sizes: list[torch.Size] = []

    def pack(self, tensor: Tensor) -> Tensor:
        self.sizes.append(tensor.shape)
        return tensor


def test_other_hooks_on_saved_tensors_get_the_logits() -> None:
    run, sizes = Run(model_of(), accumulation=1), Sizes()
    with saved_tensors_hooks(sizes.pack, lambda tensor: tensor):
        loss = task_loss(run.model, BATCHES[0])
    assert run.engine.log == []
    assert sizes.sizes.count(torch.Size((18, 6))) >= L
    loss.backward()
    run.balancer.discard_step()
    grads(run.model)
    with save_on_cpu(pin_memory=False):
        loss = task_loss(run.model, BATCHES[0])
    loss.backward()
    assert_equal(grads(run.model), Run(model_of(), "logits", accumulation=1).step([BATCHES[0]]))
    assert run.engine.log == []


# ---------------------------------------------------------------------------------------- copies and settings


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_model_has_a_place_of_its_own(duplicate: Any) -> None:
    model = model_of()
    trimtab.attach(
        model, OBJECTIVES, keep="host", accumulation=Accumulation(num_microbatches=M, order="forward_first")
    )
    other = duplicate(model)
    states = [one.blocks[0].moe.router._trimtab_router for one in (model, other)]
    assert states[0].place.tolist() != states[1].place.tolist()
    assert states[1].host is other.blocks[1].moe.router._trimtab_router.host
    assert states[0].host.copies.pool is not states[1].host.copies.pool
    for loss in [task_loss(other, one) for one in BATCHES]:
        loss.backward()
    assert_equal(grads(other), Run(model_of(), "logits").step())


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="keep='disk' must be 'input', 'logits' or 'host'"):
        trimtab.attach(model_of(), OBJECTIVES, keep="disk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="host_copies has no effect with keep='logits'; set keep='host'"):
        trimtab.attach(model_of(), OBJECTIVES, keep="logits", host_copies=HostCopies())
