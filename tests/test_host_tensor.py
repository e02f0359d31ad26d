"""Host tensors: what does not wait, what does, and that nobody can tell them from tensors that were never away."""

import contextlib
import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.side_stream import SideStream
from trimtab.host_copies import HostCopies
from trimtab.host_tensor import HostTensor, is_ready, wait

VALUES = torch.arange(24.0).view(4, 6)
MODES = {"default": contextlib.nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}

VIEWS: dict[str, Callable[[Tensor], Any]] = {
    "view": lambda x: x.view(2, 12),
    "view of bytes": lambda x: x.view(torch.int32),
    "view_as": lambda x: x.view_as(torch.empty(6, 4)),
    "reshape": lambda x: x.reshape(-1),
    "flatten": lambda x: x.flatten(),
    "unflatten": lambda x: x.unflatten(1, (2, 3)),
    "slice": lambda x: x[1:3],
    "steps": lambda x: x[:, None, ::2],
    "select": lambda x: x[2],
    "element": lambda x: x[2, 3],
    "ellipsis": lambda x: x[..., 0],
    "narrow": lambda x: x.narrow(1, 2, 2),
    "T": lambda x: x.T,
    "transpose": lambda x: x.transpose(0, 1),
    "permute": lambda x: x.permute(1, 0),
    "movedim": lambda x: x.movedim(0, 1),
    "unbind": lambda x: x.unbind()[1],
    "iteration": lambda x: list(x)[3],
    "split": lambda x: x.split(3, dim=1)[1],
    "sizes": lambda x: x.split([1, 3])[1],
    "chunk": lambda x: x.chunk(2)[1],
    "tensor_split": lambda x: x.tensor_split(3)[2],
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "unsqueeze": lambda x: x.unsqueeze(0),
    "squeeze": lambda x: x[:1].squeeze(0),
    "expand": lambda x: x.unsqueeze(0).expand(3, -1, -1),
    "expand_as": lambda x: x.expand_as(torch.empty(2, 4, 6)),
    "broadcast": lambda x: torch.broadcast_to(x, (2, 4, 6)),
    "diagonal": lambda x: x.diagonal(),
    "unfold": lambda x: x.unfold(0, 2, 1),
    "as_strided": lambda x: x.as_strided((2, 2), (1, 6)),
    "view of a view": lambda x: x[1:].T[2:4].unsqueeze(1),
    "no change of dtype": lambda x: x.float(),
    "no change of device": lambda x: x.cpu().to("cpu"),
    "contiguous": lambda x: x.contiguous(),
    "stack": lambda x: torch.stack([x, x + 0 if type(x) is Tensor else x], dim=1),
    "stack with an ordinary one": lambda x: torch.stack([torch.ones(4, 6), x], dim=-1),
    "cat": lambda x: torch.cat([x[:1], x[1:], torch.zeros(2, 6)]),
    "cat that promotes": lambda x: torch.cat([x, torch.zeros(2, 6, dtype=torch.float64)]),
    "vstack": lambda x: torch.vstack([x, x]),
    "hstack": lambda x: torch.hstack([x, x]),
    "stack of stacks": lambda x: torch.stack([torch.stack([x[0], x[1]]), torch.stack([x[2], x[3]])]),
    "view of a stack": lambda x: torch.stack([x, x]).flatten(0, 1)[3:5],
    "cat of views of a stack": lambda x: torch.cat([torch.stack([x, x])[1], x.T.T]),
}


def saved(x: Tensor) -> Any:
    buffer = io.BytesIO()
    torch.save({"all": x, "row": x[1]}, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


USES: dict[str, Callable[[Tensor], Any]] = {
    "add": lambda x: x + 1,
    "sum": lambda x: x.sum(),
    "matmul": lambda x: x @ x.T,
    "clone": lambda x: x.clone(),
    "convert": lambda x: x.to(torch.float64),
    "not contiguous": lambda x: x.T.contiguous(),
    "index": lambda x: x[torch.tensor([1, 2])],
    "mask": lambda x: x[x > 3],
    "as index": lambda x: VALUES[0][x[0].long()],
    "topk": lambda x: x.topk(2).indices,
    "where": lambda x: torch.where(x > 1, x, 0),
    "split of values": lambda x: x.sort(descending=True).values,
    "copy into": lambda x: torch.empty(4, 6).copy_(x),
    "assign": lambda x: torch.zeros(4, 6).index_put_((torch.arange(4),), x),
    "equal": lambda x: torch.equal(x, VALUES),
    "item": lambda x: x[1, 2].item(),
    "float": lambda x: float(x[1, 2]),
    "int": lambda x: int(x[1, 2]),
    "bool": lambda x: bool(x[1, 2]),
    "tolist": lambda x: x.tolist(),
    "contains": lambda x: 7.0 in x,
    "numpy": lambda x: x.numpy(),
    "forced numpy": lambda x: x.numpy(force=True),
    "asarray": lambda x: np.asarray(x, dtype=np.float64),
    "dlpack": lambda x: torch.from_dlpack(x),
    "repr": repr,
    "format": lambda x: f"{x[1, 2]:.2f} {x}",
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "save": saved,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "bytes of storage": lambda x: x.untyped_storage().nbytes(),
    "unique": lambda x: x.unique(),
    "linear": lambda x: torch.nn.functional.linear(x, torch.ones(2, 6)),
}


class Sent:
    """A host tensor and the engine that has not sent it yet."""

    def __init__(self, tensor: Tensor = VALUES) -> None:
        self.engine = SideStream()
        self.copies = HostCopies(self.engine)
        self.tensor = self.copies.send(tensor)

    @property
    def num_waits(self) -> int:
        return self.engine.count("wait")


def same(have: Any, want: Any) -> bool:
    if isinstance(want, dict):
        return all(same(have[key], want[key]) for key in want)
    if isinstance(want, Tensor):
        return type(have) is Tensor and have.dtype == want.dtype and torch.equal(have, want)
    if isinstance(want, np.ndarray):
        return type(have) is np.ndarray and have.dtype == want.dtype and np.array_equal(have, want)
    return type(have) is type(want) and have == want


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", VIEWS)
def test_views_and_joins_do_not_wait(name: str, mode: str) -> None:
    sent = Sent()
    with MODES[mode]():
        view, want = VIEWS[name](sent.tensor), VIEWS[name](VALUES)
        assert isinstance(view, HostTensor)
        assert (view.shape, view.stride(), view.dtype) == (want.shape, want.stride(), want.dtype)
        assert (view.device, view.requires_grad, view.layout) == (want.device, False, want.layout)
        assert (len(view) if view.dim() else 1, view.numel(), view.nbytes) == (
            len(want) if want.dim() else 1,
            want.numel(),
            want.nbytes,
        )
        assert not is_ready(view)
        assert sent.num_waits == 0
        assert same(wait(view), want)
    assert is_ready(view)
    assert is_ready(sent.tensor)
    assert not sent.engine.mistakes


@pytest.mark.parametrize("name", USES)
def test_uses_wait_once_and_are_ordinary(name: str) -> None:
    sent = Sent()
    want = USES[name](VALUES)
    assert same(USES[name](sent.tensor), want)
    assert sent.num_waits == 1
    assert same(USES[name](sent.tensor), want)
    assert sent.num_waits == 1


@pytest.mark.parametrize("use", ["add", "tolist", "numpy", "repr", "pickle", "save", "deepcopy"])
@pytest.mark.parametrize("view", ["slice", "T", "unbind", "stack", "cat"])
def test_uses_of_views_and_joins(view: str, use: str) -> None:
    want = VIEWS[view](VALUES)
    function = USES[use] if use != "save" else saved
    assert same(function(VIEWS[view](Sent().tensor)), function(want))


def test_views_share_one_copy_and_one_memory() -> None:
    sent = Sent()
    rows, columns = sent.tensor.unbind(), sent.tensor.T
    assert sent.engine.count("to_host") == 1
    assert wait(rows[1]).data_ptr() == wait(sent.tensor).data_ptr() + 6 * 4
    assert wait(columns).data_ptr() == sent.tensor.data_ptr()
    assert sent.copies.pinned_bytes == 512


def test_a_join_lets_its_inputs_go_when_it_is_formed() -> None:
    sent = Sent()
    joined = torch.stack([sent.tensor, sent.tensor])
    sent.tensor = torch.empty(0)
    assert sent.copies.used_bytes == 512
    assert torch.equal(joined.sum(dim=0), VALUES * 2)
    assert sent.copies.used_bytes == 0
    assert wait(joined).data_ptr() == wait(joined).data_ptr()


def test_a_join_is_ready_when_its_inputs_are() -> None:
    engine = SideStream()
    copies = HostCopies(engine)
    joined = torch.stack([copies.send(VALUES), copies.send(VALUES + 1), VALUES])
    engine.run(2)
    assert not is_ready(joined)
    engine.run()
    assert is_ready(joined)
    assert engine.count("wait") == 0


def test_joins_that_cannot_be_are_errors_at_once() -> None:
    sent = Sent()
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        torch.stack([sent.tensor, VALUES[0]])
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        torch.cat([sent.tensor, VALUES.T])
    assert sent.num_waits == 0


def test_a_join_with_another_device_is_left_to_torch() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        wait(torch.stack([Sent().tensor, torch.empty(4, 6, device="meta")]))


def test_a_join_has_the_values_of_its_time() -> None:
    """As ordinary tensors would have been joined at once, whatever is written to them later."""
    sent, ordinary = Sent(), VALUES.clone()
    first = torch.stack([sent.tensor, ordinary])
    second = torch.cat([sent.tensor[0], sent.tensor[1]])
    ordinary.zero_()
    sent.tensor.numpy()[:] = 0
    sent.tensor[1] = 5
    assert torch.equal(wait(first), torch.stack([VALUES, VALUES]))
    assert torch.equal(wait(second), VALUES[:2].flatten())
    after = torch.stack([sent.tensor[0], sent.tensor[1]])
    wait(first).zero_()
    assert after.tolist() == [[0.0] * 6, [5.0] * 6]


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "add_": lambda x: x.add_(1),
    "assign": lambda x: x.__setitem__((slice(None), 1), 3),
    "to a view": lambda x: x[1].mul_(2),
    "out": lambda x: torch.add(VALUES, 1, out=x),
    "two outs": lambda x: torch.max(VALUES, dim=0, out=(x[0], torch.empty(6, dtype=torch.int64))),
    "copy_": lambda x: x.copy_(VALUES.flip(0)),
    "foreach": lambda x: torch._foreach_add_([x, x[0]], 1.0),
    "wait": lambda x: wait(x).zero_(),
}


@pytest.mark.parametrize("name", WRITES)
def test_writing_waits_and_is_seen_by_views(name: str) -> None:
    sent, want = Sent(), VALUES.clone()
    view = sent.tensor.T
    returned, expected = WRITES[name](sent.tensor), WRITES[name](want)
    assert type(returned) is type(expected) or isinstance(returned, HostTensor)
    assert torch.equal(wait(sent.tensor), want)
    assert torch.equal(wait(view), want.T)


def test_writing_returns_what_was_written_to() -> None:
    tensor = Sent().tensor
    assert tensor.add_(1) is tensor
    assert torch.mul(VALUES, 2, out=tensor) is tensor
    result = torch.empty(4, 6)
    assert result.copy_(tensor) is result


@pytest.mark.parametrize(
    "reshape",
    [
        lambda x: x.t_(),
        lambda x: x.unsqueeze_(0),
        lambda x: x.resize_(3),
        lambda x: x.as_strided_((2,), (1,)),
    ],
)
def test_a_shape_does_not_change_in_place(reshape: Callable[[Tensor], Tensor]) -> None:
    sent = Sent()
    with pytest.raises(
        RuntimeError, match="changes the shape of a host tensor in place; use the operator without"
    ):
        reshape(sent.tensor)
    assert sent.tensor.shape == (4, 6)
    assert torch.equal(wait(sent.tensor), VALUES)


def test_the_ordinary_tensor_may_be_reshaped() -> None:
    sent = Sent()
    wait(sent.tensor).unsqueeze_(0).requires_grad_()
    assert wait(sent.tensor).shape == (4, 6)
    assert not wait(sent.tensor).requires_grad


def test_gradients_flow_through_operations_on_it() -> None:
    sent = Sent()
    weight = torch.full((4, 6), 2.0, requires_grad=True)
    leaf = sent.tensor.detach().requires_grad_()
    assert leaf.requires_grad
    assert sent.num_waits == 0
    (torch.stack([leaf, weight]).sum() + (leaf * weight).sum()).backward()
    assert leaf.grad is not None
    assert weight.grad is not None
    assert torch.equal(leaf.grad, torch.full((4, 6), 3.0))
    assert torch.equal(weight.grad, VALUES + 1)


def test_what_is_pickled_is_an_ordinary_tensor_of_its_size() -> None:
    """The memory that it lies in may be larger."""
    sent = Sent()
    assert len(pickle.dumps(sent.tensor)) < 512 + 24 * 4
    assert sent.tensor.untyped_storage().nbytes() == 24 * 4


def test_ordinary_tensors_pass() -> None:
    tensor = torch.ones(2)
    assert wait(tensor) is tensor
    assert is_ready(tensor)


def test_threads_form_a_join_once() -> None:
    sent = Sent()
    joined = torch.stack([sent.tensor] * 8)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(joined.data_ptr())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1


def test_compiled_code_takes_what_was_waited_for() -> None:
    sent = Sent()
    function = torch.compile(lambda x: x * 2, backend="eager", fullgraph=True)
    assert torch.equal(function(wait(sent.tensor)), VALUES * 2)


def test_a_join_of_memory_that_somebody_may_write_to_is_formed_at_once() -> None:
    engine = SideStream()
    sent = HostCopies(engine).send(VALUES.clone())
    engine.run()
    ordinary = wait(sent)
    joined = torch.stack([sent, sent])
    ordinary.zero_()
    assert torch.equal(joined.clone(), torch.stack([VALUES, VALUES]))
