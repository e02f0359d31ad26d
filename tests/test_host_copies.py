"""Copies to the host: exact, not waited for, in order, in bounded memory that is used again."""

import copy
import gc
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from tests.side_stream import SideStream
from trimtab.host_copies import HostCopies, HostMemoryError
from trimtab.host_tensor import HostTensor, is_ready, wait
from trimtab.pinned_pool import SMALLEST, size_class

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.bool]
SHAPES = {
    "contiguous": lambda x: x,
    "first rows": lambda x: x[:3],
    "inner rows": lambda x: x[2:5],
    "columns": lambda x: x[:, 1:4],
    "every other row": lambda x: x[::2],
    "transposed": lambda x: x.T,
    "one column": lambda x: x[:, 2],
    "expanded": lambda x: x[0].expand(3, -1),
    "no dimension": lambda x: x[1, 2],
    "three dimensions": lambda x: x.view(2, 3, 5).permute(2, 0, 1),
    "one element": lambda x: x[4:5, 4:5],
}


def values(
    dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (6, 5), seed: int = 0
) -> torch.Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10
    return drawn > 0 if dtype == torch.bool else drawn.to(dtype)


def engine_and_copies(**settings: object) -> tuple[SideStream, HostCopies]:
    engine = SideStream()
    return engine, HostCopies(engine, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_arrive_bit_for_bit(shape: str, dtype: torch.dtype) -> None:
    engine, copies = engine_and_copies()
    tensor = SHAPES[shape](values(dtype))
    sent = copies.send(tensor)
    assert (sent.shape, sent.dtype, sent.device.type) == (tensor.shape, tensor.dtype, "cpu")
    assert not is_ready(sent)
    assert engine.num_waiting == 1
    have = wait(sent)
    assert type(have) is torch.Tensor
    assert torch.equal(have, tensor)
    assert have.stride() == sent.stride()
    assert not engine.mistakes


def test_nothing_is_there_before_it_is_waited_for() -> None:
    """The engine of these tests is strict: memory that is read too early is NaN."""
    _engine, copies = engine_and_copies()
    sent = copies.send(torch.ones(6, 5))
    assert isinstance(sent, HostTensor)
    assert sent.promise._values.isnan().all()  # type: ignore[attr-defined]
    assert sent.sum() == 30
    assert is_ready(sent)


@pytest.mark.parametrize(
    "shape", ["contiguous", "first rows", "inner rows", "transposed", "no dimension", "one column"]
)
def test_what_lies_together_goes_by_one_copy_of_its_bytes(shape: str) -> None:
    engine, copies = engine_and_copies()
    tensor = SHAPES[shape](values(torch.float64))
    sent = copies.send(tensor)
    assert [entry for entry in engine.log if entry.startswith("to_host")] == [f"to_host {tensor.numel() * 8}"]
    engine.run()
    assert torch.equal(wait(sent), tensor)


@pytest.mark.parametrize("shape", ["contiguous", "inner rows", "transposed", "three dimensions"])
def test_dense_memory_is_not_copied_on_the_device(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _engine, copies = engine_and_copies()
    tensor = SHAPES[shape](values())
    monkeypatch.setattr(torch.Tensor, "contiguous", None)
    sent = copies.send(tensor)
    assert sent.stride() == tensor.stride()
    assert torch.equal(wait(sent), tensor)


def test_a_copy_waits_for_compute_and_compute_for_nothing() -> None:
    engine, copies = engine_and_copies()
    tensor = torch.zeros(4)
    engine.later(lambda: tensor.fill_(7))
    sent = copies.send(tensor)
    assert engine.log == ["allocate 512", "side_waits", "to_host 16", "keep 16", "record"]
    assert sent.tolist() == [7] * 4


def test_memory_that_is_let_go_of_is_kept_until_the_copy_is_through() -> None:
    engine, copies = engine_and_copies()
    tensor = values()
    want, storage = tensor.clone(), StorageWeakRef(tensor.untyped_storage())
    sent = copies.send(tensor)
    del tensor
    assert not storage.expired()
    engine.run()
    assert storage.expired()
    assert torch.equal(wait(sent), want)
    assert not engine.mistakes


def test_a_tensor_that_may_change_is_copied_first() -> None:
    _engine, copies = engine_and_copies()
    tensor = values()
    want = tensor.clone()
    racing, safe = copies.send(tensor), copies.send(tensor, may_change=True)
    tensor.zero_()
    assert torch.equal(wait(safe), want)
    assert not torch.equal(wait(racing), want)


def test_what_is_sent_has_no_history() -> None:
    _, copies = engine_and_copies()
    weight = nn.Parameter(torch.ones(3, 3))
    for tensor in (weight, weight * 2, weight[:0], weight.detach().cpu()):
        assert not copies.send(tensor).requires_grad
    assert not HostCopies().send(weight).requires_grad


def test_negated_and_conjugated_views_are_resolved() -> None:
    _, copies = engine_and_copies()
    tensor = torch.randn(3, 4, dtype=torch.complex64)
    for view in (tensor.conj(), tensor.conj().imag):
        assert torch.equal(wait(copies.send(view)), view)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0, 2)])
def test_empty_tensors_are_ordinary(shape: tuple[int, ...]) -> None:
    engine, copies = engine_and_copies()
    sent = copies.send(torch.empty(shape, dtype=torch.bfloat16))
    assert (type(sent), sent.shape, sent.dtype) == (torch.Tensor, torch.Size(shape), torch.bfloat16)
    assert engine.log == []


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tensor_on_the_cpu_is_copied_at_once(shape: str) -> None:
    copies = HostCopies()
    tensor = SHAPES[shape](values())
    want = tensor.clone()
    sent = copies.send(tensor)
    assert type(sent) is torch.Tensor
    if shape != "expanded":  # whose elements are one
        tensor.zero_()
    assert torch.equal(sent, want)
    assert copies.pinned_bytes == 0


def test_only_the_engines_device_is_served() -> None:
    engine = SideStream("meta")
    copies = HostCopies(engine)
    assert copies.serves(torch.empty(2, device="meta"))
    assert type(copies.send(torch.ones(2))) is torch.Tensor
    assert engine.log == []


@pytest.mark.parametrize("engine", [None, SideStream()], ids=["cpu", "engine"])
def test_what_inference_sends_training_may_use(engine: SideStream | None) -> None:
    """Rollouts run in inference mode, and what they record is trained on."""
    copies = HostCopies(engine)
    with torch.inference_mode():
        first, second = copies.send(torch.ones(3)), copies.send(torch.ones(3) * 2)
        joined = torch.stack([first, second]) if engine else torch.stack([first.clone(), second])
        view = first[:2]
    for sent in (first, second, view, *([joined] if engine else [])):
        assert not sent.is_inference()
        assert not wait(sent).is_inference()
    weight = torch.ones(3, requires_grad=True)
    (first * weight + wait(second) * weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [3, 3, 3]
    assert view.sum() + joined.sum() == 11
    wait(view).add_(weight.detach()[:2])
    assert wait(first).tolist() == [2, 2, 1]
    del first, second, view, sent
    copies.send(torch.zeros(3)).sum()  # into the memory that was allocated in inference mode


OTHERS = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "subclass": lambda: HostCopies(SideStream()).send(torch.ones(2)),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.filterwarnings("ignore:.*quantized tensor.*:UserWarning")
def test_other_kinds_of_tensors_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"expected an ordinary strided tensor; send tensor.to_local\(\)"):
        HostCopies(SideStream()).send(OTHERS[kind]())


# -------------------------------------------------------------------------------------------- the pool


def test_memory_comes_back_with_the_last_view() -> None:
    engine, copies = engine_and_copies()
    sent = copies.send(values())
    view = wait(sent)[2:4].T
    lazy = sent[1]
    del sent
    assert copies.used_bytes == 512
    del lazy
    assert copies.used_bytes == 512
    assert torch.equal(view, values()[2:4].T)
    del view
    assert copies.used_bytes == 0
    assert copies.pinned_bytes == 512
    copies.send(values())
    assert engine.count("allocate") == 1


def test_numpy_keeps_the_memory() -> None:
    _, copies = engine_and_copies()
    sent = copies.send(values())
    array = sent.numpy()
    del sent
    copies.send(torch.zeros(6, 5)).sum()
    assert array.tolist() == values().tolist()
    assert copies.used_bytes == 512


def test_an_autograd_graph_keeps_the_memory() -> None:
    _, copies = engine_and_copies()
    weight = torch.ones(6, 5, requires_grad=True)
    loss = (copies.send(values()) * weight).sum()
    for _ in range(3):
        copies.send(torch.zeros(6, 5)).sum()
    loss.backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, values())


def test_memory_is_not_used_again_while_it_is_fetched_from() -> None:
    engine, copies = engine_and_copies()
    held = copies.start(values())
    assert held is not None
    engine.run()
    fetched, event = held.fetch()
    del held
    copies.send(values(seed=1))
    assert engine.count("allocate") == 2
    assert copies.used_bytes == 1024
    engine.compute_waits(event, fetched.device)
    assert torch.equal(fetched, values())
    assert not engine.mistakes


def test_memory_is_not_used_again_before_its_copy_is_through() -> None:
    engine, copies = engine_and_copies()
    copies.send(values())  # nobody wants it, but it is on its way
    assert copies.used_bytes == 512
    second = copies.send(values(seed=1))
    assert engine.count("allocate") == 2
    engine.run()
    assert copies.used_bytes == 512
    copies.send(values(seed=2))
    assert engine.count("allocate") == 2
    assert torch.equal(wait(second), values(seed=1))
    assert not engine.mistakes


def test_a_full_pool_waits_for_a_copy_that_nobody_wants() -> None:
    engine, copies = engine_and_copies(max_bytes=1024)
    held = copies.send(values())
    copies.send(values(seed=1))
    engine.log.clear()
    third = copies.send(values(seed=2))
    assert engine.log[0] == "wait 4"  # two steps a copy: wait for compute, copy
    assert engine.count("allocate") == 0
    assert torch.equal(wait(third), values(seed=2))
    assert torch.equal(wait(held), values())
    assert copies.pinned_bytes == engine.num_pinned == 1024
    assert not engine.mistakes


def test_a_full_pool_waits_for_one_copy_at_a_time() -> None:
    engine, copies = engine_and_copies(max_bytes=2048)
    for seed in range(4):
        copies.send(values(seed=seed))
    engine.log.clear()
    copies.send(values())
    assert engine.log[0] == "wait 2"
    assert engine.num_waiting == 4  # three that were not waited for, and the new one


def test_a_full_pool_in_use_is_an_error_that_says_what_to_do() -> None:
    _, copies = engine_and_copies(max_bytes=1024)
    held = [copies.send(values()), copies.send(values())]
    want = (
        r"max_bytes=1024 of pinned memory, 1024 of it in use, have no room for 512 bytes more, a torch.float32 "
        r"tensor of shape \(6, 5\); let go of earlier"
    )
    with pytest.raises(HostMemoryError, match=want):
        copies.send(values())
    assert torch.equal(wait(held.pop()), values())
    copies.send(values())
    with pytest.raises(HostMemoryError, match="no room for 2048 bytes more"):
        copies.send(torch.zeros(300))


def test_memory_stays_bounded_over_many_steps() -> None:
    engine, copies = engine_and_copies(max_bytes=12 * 512)  # two steps
    for step in range(50):
        records = [copies.send(values(seed=step * 6 + layer)) for layer in range(6)]
        joined = torch.stack(records)
        del records
        if step % 10 == 0:
            assert torch.equal(wait(joined)[4], values(seed=step * 6 + 4))
    assert engine.num_pinned == copies.pinned_bytes <= 12 * 512
    assert not engine.mistakes


def test_a_full_pool_uses_a_larger_buffer_or_trades_small_ones() -> None:
    engine, copies = engine_and_copies(max_bytes=1024)
    wait(copies.send(torch.zeros(200)))
    assert copies.pinned_bytes == 1024
    small = copies.send(torch.ones(3))
    assert small.sum() == 3
    assert engine.count("allocate") == 1
    del small
    engine, copies = engine_and_copies(max_bytes=1024)
    held = [wait(copies.send(torch.zeros(3))) for _ in range(2)]
    with pytest.raises(HostMemoryError):
        copies.send(torch.ones(200))
    del held
    assert copies.send(torch.ones(200)).sum() == 200
    assert engine.log.count("discard 1024") == 1
    assert engine.num_pinned == copies.pinned_bytes == 1024


def test_a_full_pool_is_patient_with_other_threads() -> None:
    _, copies = engine_and_copies(max_bytes=512, patience_s=30.0)
    held = [copies.send(values())]
    timer = threading.Timer(0.05, held.clear)
    timer.start()
    sent = copies.send(values(seed=1))
    timer.join()
    assert torch.equal(wait(sent), values(seed=1))
    impatient = HostCopies(SideStream(), max_bytes=512, patience_s=0.01)
    kept = impatient.send(values())
    with pytest.raises(HostMemoryError):
        impatient.send(values())
    assert torch.equal(wait(kept), values())


def test_memory_that_the_system_refuses_is_not_counted() -> None:
    engine, copies = engine_and_copies(max_bytes=1024)
    allocate = engine.allocate

    def refuse(num_bytes: int) -> torch.Tensor:
        raise MemoryError

    engine.allocate = refuse  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        copies.send(values())
    engine.allocate = allocate  # type: ignore[method-assign]
    assert copies.pinned_bytes == 0
    assert torch.equal(wait(copies.send(values())), values())


def test_garbage_may_be_collected_inside_the_pool() -> None:
    """Finalizers run where the collector happens to; they must not meet a lock that their thread holds."""
    engine, copies = engine_and_copies()
    allocate = engine.allocate

    def collecting(num_bytes: int) -> torch.Tensor:
        gc.collect()
        return allocate(num_bytes)

    engine.allocate = collecting  # type: ignore[method-assign]
    for _ in range(2):
        cycle = [copies.send(values())]
        cycle.append(cycle)  # type: ignore[arg-type]
        del cycle
        copies.send(torch.zeros(1000))


def test_several_threads_share_a_pool() -> None:
    _engine, copies = engine_and_copies(max_bytes=64 * 512, patience_s=30.0)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for step in range(40):
            want = values(seed=seed * 100 + step)
            sent = [copies.send(want), copies.send(want)]
            if not torch.equal(torch.cat(sent), torch.cat([want, want])):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert copies.used_bytes == 0
    assert copies.pinned_bytes <= 64 * 512


def test_tensors_outlive_the_pool() -> None:
    _engine, copies = engine_and_copies()
    sent = copies.send(values())
    del copies
    gc.collect()
    assert torch.equal(wait(sent), values())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_the_object_has_a_pool_of_its_own(duplicate: object) -> None:
    copies = HostCopies(max_bytes=4096, patience_s=1.5)
    other = duplicate(copies)  # type: ignore[operator]
    assert (other.pool.max_bytes, other.pool.patience_s) == (4096, 1.5)
    assert other.pool is not copies.pool
    assert other.pool.engine is other.engine


@pytest.mark.parametrize(("num_bytes", "want"), [(1, SMALLEST), (512, 512), (513, 1024), (8 << 20, 8 << 20)])
def test_sizes_are_powers_of_two(num_bytes: int, want: int) -> None:
    assert size_class(num_bytes) == want


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (dict(max_bytes=0), "max_bytes=0 must be at least 1"),
        (dict(patience_s=-1.0), r"patience_s=-1.0 must be 0 or more seconds"),
    ],
)
def test_settings_are_checked(settings: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        HostCopies(**settings)  # type: ignore[arg-type]


def test_importing_and_using_it_on_the_cpu_leaves_cuda_alone() -> None:
    code = (
        "import torch; torch.cuda._lazy_init = None\n"
        "from trimtab.host_copies import HostCopies; from trimtab.host_logits import HostLogits\n"
        "copies = HostCopies(); copies.send(torch.ones(3)); HostLogits(copies)\n"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
