"""Lazy tensors: any box of any result is what the same operations give on real ones, and nothing else is read."""

from math import prod

import pytest
import torch

from trimtab.train.lazy_tensor import LazyTensor, whole


class Sources:
    """Lazy twins of real tensors, which count what is read of them."""

    def __init__(self, tensors):
        self.num_read = [0] * len(tensors)
        self.lazy = [self._twin(i, tensor) for i, tensor in enumerate(tensors)]

    def _twin(self, i, tensor):
        def read(offset, out):
            self.num_read[i] += out.numel()
            out.copy_(tensor[tuple(slice(o, o + n) for o, n in zip(offset, out.shape, strict=True))])

        return LazyTensor(tensor.shape, tensor.dtype, read)


def tensors(count=4, shape=(4, 6)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def stacked(x):
    return torch.cat([torch.stack(x[:2]), torch.stack(x[2:])], dim=1)


OPERATIONS = {
    "stack": lambda x: torch.stack(x),
    "stack inside": lambda x: torch.stack(x, dim=1),
    "stack last": lambda x: torch.stack(x, dim=-1),
    "cat": lambda x: torch.cat(x),
    "cat last": lambda x: torch.cat(x, dim=-1),
    "experts": stacked,
    "transpose": lambda x: stacked(x).transpose(1, 2).contiguous(),
    "transpose others": lambda x: stacked(x).transpose(-3, -1),
    "matrix": lambda x: x[0].T.contiguous() * 1.0,
    "chunk": lambda x: torch.chunk(stacked(x), 2, dim=1)[1].contiguous(),
    "ragged chunk": lambda x: torch.chunk(x[0], 4, dim=1)[-1],
    "split": lambda x: torch.split(stacked(x), [5, 3], dim=-2)[1],
    "squeeze": lambda x: torch.chunk(stacked(x), 2, dim=0)[1].squeeze(0),
    "no squeeze": lambda x: x[0].squeeze(1),
    "unbind": lambda x: torch.unbind(stacked(x), dim=-1)[2],
    "select": lambda x: stacked(x)[:, -2],
    "clone": lambda x: stacked(x).clone().detach(),
    "computed": lambda x: (stacked(x).reshape(2, 2, -1, 6).transpose(1, 2) + 1).reshape(2, 8, 6),
    "computed many": lambda x: torch.stack(list(torch.sort(x[0], dim=0)[:1])),
    "converted": lambda x: stacked(x).to(torch.bfloat16),
    "promoted": lambda x: torch.cat([x[0], x[1].double()]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_any_box_is_as_of_real_tensors(name):
    operation = OPERATIONS[name]
    expected = operation(tensors())
    result = operation(Sources(tensors()).lazy)
    assert isinstance(result, LazyTensor)
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(whole(result), expected)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        low = [int(torch.randint(n, (), generator=generator)) for n in expected.shape]
        sizes = [
            int(torch.randint(1, n - o + 1, (), generator=generator))
            for o, n in zip(low, expected.shape, strict=True)
        ]
        out = torch.full(sizes, torch.nan, dtype=torch.float64)
        result.read(tuple(low), out)
        place = tuple(slice(o, o + n) for o, n in zip(low, sizes, strict=True))
        assert torch.equal(out, expected[place].double()), (low, sizes)


@pytest.mark.parametrize(
    "name", ["experts", "transpose", "chunk", "split", "squeeze", "unbind", "select", "clone"]
)
def test_only_the_box_is_read(name):
    sources = Sources(tensors())
    result = OPERATIONS[name](sources.lazy)
    assert sources.num_read == [0] * 4
    sizes = [max(1, n // 2) for n in result.shape]
    result.read(tuple(n - size for n, size in zip(result.shape, sizes, strict=True)), torch.empty(sizes))
    assert sum(sources.num_read) == prod(sizes)


def test_real_tensors_are_taken_as_they_are():
    (x,) = tensors(1)
    assert torch.equal(whole(x), x)
    assert whole(x, torch.bfloat16).dtype == torch.bfloat16
    assert "shape=(4, 6)" in repr(Sources([x]).lazy[0])


def test_shapes_are_checked_at_once():
    lazy = Sources([torch.zeros(2, 3), torch.zeros(2, 4)]).lazy
    with pytest.raises(RuntimeError, match=r"shapes \[\(2, 3\), \(2, 4\)\] cannot be stacked"):
        torch.stack(lazy)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        torch.cat(lazy)
