"""Processes for tests of several ranks: started once per test session, called like functions.

    def double(x):                           # a module-level function; runs on every rank
        torch.distributed.all_reduce(x)
        return x

    def test_sum(ranks):
        assert ranks.run(double, 2, torch.ones(1)) == [2.0, 2.0]

Starting Python and importing torch costs seconds, so workers are forked from a server that has imported
everything and computed nothing: the process that runs pytest has threads, which a fork would not copy.
Nothing here waits without a limit, and after any failure the workers of that world size are killed and
started again at the next call: a rank that fails leaves its peers in a collective that never ends.
"""

import contextlib
import faulthandler
import functools
import gc
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trimtab.parallel.mesh import Degrees, Groups, Mesh

# Imported by the server before it forks. It skips what cannot be imported; `missing_modules` tells.
PRELOAD = (
    "pytest",
    "torch",
    "torch._dynamo",
    "torch._dynamo.backends.debugging",
    "torch._functorch.aot_autograd",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.pipelining",
    "torch.distributed.checkpoint",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
    "transformers.masking_utils",
    "transformers.models.deepseek_v3.modeling_deepseek_v3",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.models.gpt_oss.modeling_gpt_oss",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.llama4.modeling_llama4",
    "trimtab",
    "trimtab.models.deepseek_v3",
    "trimtab.train.engine",
)
START_TIMEOUT = 180.0
# Peers of a rank that died fail a moment before or after it is seen dead; its own end is the news.
GRACE = 1.0
WarningFilter = tuple[Any, ...]  # arguments of `warnings.filterwarnings`


class RankError(Exception):
    """A function raised on some rank, or a rank died or did not finish; the text says where."""


class Ranks:
    """Workers of every world size asked for so far."""

    def __init__(self, filters: Sequence[WarningFilter] = (("error",),)) -> None:
        self.filters = tuple(filters)
        self._pools: dict[int, _Pool] = {}

    def run(
        self, fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0, **kwargs: Any
    ) -> list[Any]:
        """Call a function on every rank of a gloo world and return what it returned, in rank order.

        Args:
            fn: a module-level function. Warnings in it are errors, as in any test.
            world_size: number of ranks.
            args: arguments, the same on each rank; pickled.
            timeout: seconds for the call; starting workers is not part of it.
            kwargs: as ``args``.

        Raises:
            RankError: the function raised on some rank, or a rank died or did not finish.
        """
        pool = self._pools.get(world_size)
        if pool is None:
            pool = self._pools[world_size] = _Pool(world_size)
        try:
            return pool.run(fn, args, kwargs, timeout, self.filters)
        except BaseException:
            self._pools.pop(world_size).kill()
            raise

    def pids(self, world_size: int) -> list[int]:
        """Process ids of the workers of one world size; none before the first call and after a failure."""
        return self._pools[world_size].pids if world_size in self._pools else []

    def close(self) -> None:
        """End all workers."""
        while self._pools:
            self._pools.popitem()[1].kill()


@functools.cache
def mesh_of(degrees: Degrees) -> Mesh:
    """The mesh of these degrees, made once per worker; every rank must ask for the same ones in turn."""
    # Each gloo group has a thread that wakes a hundred times a second: meshes share theirs.
    return Mesh(degrees, "cpu", _groups())


@functools.cache
def _groups() -> Groups:
    return Groups()


def missing_modules() -> list[str]:
    """Modules that the server should have imported for this worker and did not."""
    return _missing


# ------------------------------------------------------------------ in the process that runs the tests


class _Pool:
    """The ranks of one world."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOAD))
        self.folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                worker = context.Process(
                    target=_work, args=(rank, world_size, theirs, self._stack_file(rank)), daemon=True
                )
                self.pipes.append(ours)
                self.processes.append(worker)
                worker.start()
                theirs.close()
            port = self._collect("start", START_TIMEOUT, [0])[0]
            for pipe in self.pipes[1:]:
                pipe.send_bytes(pickle.dumps(port))
            self._collect("start", START_TIMEOUT)
        except BaseException:
            self.kill()
            raise

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self.processes]

    def run(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout: float,
        filters: Sequence[WarningFilter],
    ) -> list[Any]:
        # Not Connection.send, which would pass tensors through shared memory that dies with its owner.
        message = pickle.dumps((fn, args, kwargs, filters))
        for pipe in self.pipes:
            # A worker that died since the last call is reported by `_collect`.
            with contextlib.suppress(OSError):
                pipe.send_bytes(message)
        return self._collect(getattr(fn, "__name__", repr(fn)), timeout)

    def _collect(self, what: str, timeout: float, ranks: Sequence[int] | None = None) -> list[Any]:
        """One answer of each rank; raises once a rank has failed and its peers had time to say so too."""
        ranks = range(len(self.processes)) if ranks is None else ranks
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        dead: list[int] = []
        end = time.monotonic() + timeout
        while waiting := [rank for rank in ranks if rank not in results and rank not in failures]:
            sources = [self.pipes[r] for r in waiting] + [self.processes[r].sentinel for r in waiting]
            ready = wait(sources, max(end - time.monotonic(), 0))
            if not ready:
                break
            for rank in waiting:
                pipe, worker = self.pipes[rank], self.processes[rank]
                if pipe not in ready and worker.sentinel not in ready:
                    continue
                try:
                    if not pipe.poll():
                        raise EOFError
                    succeeded, value = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionError):
                    worker.join(START_TIMEOUT)
                    succeeded, value = False, f"died with exit code {worker.exitcode}"
                    dead.append(rank)
                if succeeded:
                    results[rank] = value
                else:
                    failures[rank] = value
                    end = min(end, time.monotonic() + GRACE)
        if failures:
            # A rank that was killed closes its connections first and is gone only when its memory is given back.
            for rank in waiting:
                self.processes[rank].join(GRACE)
                if self.processes[rank].exitcode is not None:
                    failures[rank] = f"died with exit code {self.processes[rank].exitcode}"
                    dead.append(rank)
            # The first to fail is the cause, unless one died: its peers may notice before we do.
            order = dead + [rank for rank in failures if rank not in dead]
            texts = [f"rank {rank} of {len(self.processes)} {failures[rank]}" for rank in order]
            others = ["also " + text.splitlines()[0] for text in texts[1:]]
            raise RankError("\n".join([f"{what}: {texts[0]}", *others]))
        if waiting:
            stacks = [f"rank {rank} is at\n{self._stack(rank)}" for rank in waiting]
            text = f"ranks {waiting} of {len(self.processes)} did not finish in {timeout:g} s\n"
            raise RankError(f"{what}: {text}" + "\n".join(stacks))
        return [results[rank] for rank in ranks]

    def _stack_file(self, rank: int) -> Path:
        return self.folder / f"stack-{rank}.txt"

    def _stack(self, rank: int) -> str:
        """Where a rank is now."""
        with contextlib.suppress(OSError):
            os.kill(self.processes[rank].pid, signal.SIGUSR1)
            end = time.monotonic() + GRACE
            while time.monotonic() < end:
                if text := self._stack_file(rank).read_text():
                    return text
                time.sleep(0.05)
        return "  an unknown place"

    def kill(self) -> None:
        for worker in self.processes:
            if worker.pid is not None:
                worker.kill()
        for worker in self.processes:
            if worker.pid is not None:
                worker.join(START_TIMEOUT)
        for pipe in self.pipes:
            pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)


# ------------------------------------------------------------------ in a worker

_missing: list[str] = []


def _work(rank: int, world_size: int, pipe: Connection, stack_file: Path) -> None:
    """Answer calls until the process that runs the tests is gone."""
    _missing.extend(name for name in PRELOAD if name not in sys.modules)
    # Everything imported stays: a collection that looks at it would copy the memory that workers share.
    gc.freeze()
    parent = multiprocessing.parent_process()
    assert parent is not None
    # A worker in a collective does not read its pipe.
    threading.Thread(target=_follow_into_death, args=(parent.sentinel,), daemon=True).start()
    faulthandler.register(signal.SIGUSR1, file=stack_file.open("w"), all_threads=False)
    torch.set_num_threads(1)
    interfaces = {name for _, name in socket.if_nameindex()}
    loopback = next((name for name in ("lo", "lo0") if name in interfaces), None)
    if loopback is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = loopback
    limit = timedelta(seconds=START_TIMEOUT)
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=limit)
        _answer(pipe, (True, store.port))
    else:
        port = pickle.loads(pipe.recv_bytes())
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
    # Longer than any call may last: a call that hangs is ended from outside, with every rank's stack.
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(hours=1))
    _answer(pipe, (True, None))
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            os._exit(0)
        try:
            fn, args, kwargs, filters = pickle.loads(message)
            random.seed(0)
            torch.manual_seed(0)
            with _warnings_as_configured(filters):
                answer = pickle.dumps((True, fn(*args, **kwargs)))
        except BaseException as error:
            name = type(error).__name__
            answer = pickle.dumps((False, f"raised {name}: {error}\n{traceback.format_exc()}"))
        try:
            pipe.send_bytes(answer)
        except OSError:
            os._exit(0)


def _answer(pipe: Connection, value: tuple[bool, Any]) -> None:
    pipe.send_bytes(pickle.dumps(value))


def _follow_into_death(sentinel: Any) -> None:
    wait([sentinel])
    os._exit(1)


@contextlib.contextmanager
def _warnings_as_configured(filters: Sequence[WarningFilter]) -> Iterator[None]:
    with warnings.catch_warnings():
        for arguments in filters:
            warnings.filterwarnings(*arguments)
        yield
