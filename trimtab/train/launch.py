"""Starts the processes of a run on this machine, shows what the chosen ones print, and reports how they ended.

Processes are started by PyTorch's elastic agent, as torchrun does. What is added: ranks that `LOG_RANK` does not
name are silent, a failure is told once and by the rank that failed first, and a signal reaches every rank once
and leaves it time to finish its step.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

# Set for processes that `launch` starts: what they would print as they fail goes to it instead.
LAUNCHED = "TRIMTAB_LAUNCHED"
# Seconds that ranks get to finish a step and save, after a signal.
PATIENCE = 600
# The agent kills a rank that outlives another's failure by 30 seconds; whoever was killed sooner failed itself.
_KILLED_BY_AGENT = 25
_TAIL = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig:
    """Processes to start.

    Args:
        nproc: processes on this machine.
        nnodes: machines; each starts its own processes with the same command.
        node_rank: number of this machine; machine 0 is where the others look for it.
        master_addr: name or address of machine 0.
        master_port: free port of machine 0.

    Raises:
        ValueError: a number out of range, or machines that cannot find each other.
    """

    nproc: int = 1
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int = 29500

    def __post_init__(self) -> None:
        """Validate."""
        for name in ("nproc", "nnodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        if not 0 <= self.node_rank < self.nnodes:
            raise ValueError(
                f"--node-rank {self.node_rank} must be in [0, {self.nnodes}), the number of this machine among "
                "--nnodes"
            )
        if not 0 < self.master_port < 65536:
            raise ValueError(f"--master-port {self.master_port} must be in [1, 65535]")
        if self.nnodes > 1 and not self.master_addr:
            raise ValueError(f"--nnodes {self.nnodes} needs --master-addr, the name or address of machine 0")

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.nproc * self.nnodes


def launch(command: Sequence[str], config: LaunchConfig, *, log_ranks: Sequence[int] = (0,)) -> int:
    """Run a command in every process and wait for all of them.

    Each finds its place in the environment as under torchrun (`RANK`, `LOCAL_RANK`, `WORLD_SIZE`, `MASTER_ADDR`,
    `MASTER_PORT`).

    Args:
        command: program and arguments.
        config: how many processes.
        log_ranks: ranks whose output is shown. That of others is shown only where it explains a failure.

    Returns:
        Exit status: 0, that of the rank that failed first, or 128 + signal.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    folder = Path(tempfile.mkdtemp(prefix="trimtab-ranks-"))
    program, *arguments = command
    # The agent replaces ${local_rank} in arguments, and with it every $$.
    arguments = [argument.replace("$", "$$") for argument in arguments]
    try:
        with _environment(config), _undisturbed():
            elastic_launch(_agent_config(config, folder, log_ranks), program)(*arguments)
    except ChildFailedError as error:
        return _report(error.failures, folder, log_ranks)
    except SignalException as error:
        return 128 + int(error.sigval)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _agent_config(config: LaunchConfig, folder: Path, log_ranks: Sequence[int]) -> Any:
    """Settings of the agent: as many machines as said, found through a store on machine 0, no restarts."""
    from torch.distributed.launcher.api import LaunchConfig as AgentConfig

    several = config.nnodes > 1
    address = config.master_addr if several and config.master_addr else "localhost"
    settings: dict[str, Any] = {
        "min_nodes": config.nnodes,
        "max_nodes": config.nnodes,
        "nproc_per_node": config.nproc,
        "run_id": "trimtab" if several else uuid.uuid4().hex,
        "rdzv_backend": "c10d",
        "rdzv_endpoint": f"{address}:{config.master_port if several else 0}",
        # Left to guess from its name, a machine may wait for a store that nobody hosts.
        "rdzv_configs": {"is_host": config.node_rank == 0},
        # Its own name, which the agent would take, is not always one that resolves.
        "local_addr": _own_address(address, config.master_port) if several else "localhost",
        "max_restarts": 0,
        "logs_specs": _logs(folder, log_ranks),
        "shutdown_timeout": PATIENCE,
    }
    known = {field.name for field in fields(AgentConfig)}
    return AgentConfig(**{name: value for name, value in settings.items() if name in known})


def _logs(folder: Path, log_ranks: Sequence[int]) -> Any:
    """Where each rank's output and its first error go."""
    from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs

    class Logs(LogsSpecs):
        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            out: dict[int, str] = {}
            err: dict[int, str] = {}
            errors: dict[int, str] = {}
            for local_rank, environment in envs.items():
                rank = int(environment["RANK"])
                # An empty name is this process's own stream.
                shown = rank in log_ranks
                out[local_rank] = "" if shown else str(folder / f"{rank}.out")
                err[local_rank] = "" if shown else str(folder / f"{rank}.err")
                errors[local_rank] = str(folder / f"{rank}.json")
                environment["TORCHELASTIC_ERROR_FILE"] = errors[local_rank]
            return LogsDest(stdouts=out, stderrs=err, error_files=errors)

        @property
        def root_log_dir(self) -> str:
            return str(folder)

    return Logs()


def _own_address(master: str, port: int) -> str:
    """Address of this machine by which machine 0 reaches it."""
    family, kind, protocol, _, address = socket.getaddrinfo(master, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # sends nothing: it only chooses a route
        return str(probe.getsockname()[0])


@contextlib.contextmanager
def _environment(config: LaunchConfig) -> Iterator[None]:
    """What the agent and the ranks inherit."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        cores = os.cpu_count() or 1
    added = {
        LAUNCHED: "1",
        # Ranks that meet at the agent's own store cannot meet there again after a restart.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // config.nproc)),
    }
    before = {name: os.environ.get(name) for name in (*added, "TORCHELASTIC_SIGNALS_TO_HANDLE")}
    os.environ |= added
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Without the agent's own messages, and with this process's signal handlers back at the end."""
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    handlers = {name: signal.getsignal(name) for name in names}
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(disabled)
        for name, handler in handlers.items():
            signal.signal(name, handler)


# ---------------------------------------------------------------- failures


def record_failure(message: str, *, status: int, error: BaseException | None = None) -> None:
    """Leave a rank's error where `launch`, or torchrun, finds it.

    Args:
        message: what the user is to read, of a failure that is understood.
        status: exit status that goes with it.
        error: an exception that is not; its traceback is told.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    now = time.time()
    trace = "" if error is None else "".join(traceback.format_exception(error))
    details = {"py_callstack": trace or message, "timestamp": str(int(now)), "time": now, "status": status}
    record = {"message": {"message": message, "extraInfo": details}}
    # Renamed into place: a rank may be killed as it writes.
    Path(f"{path}.new").write_text(json.dumps(record), encoding="utf-8")
    os.replace(f"{path}.new", path)


def is_launched() -> bool:
    """Whether `launch` started this process and tells its errors."""
    return LAUNCHED in os.environ


def leave(status: int) -> None:
    """End a rank that failed at once: its peers wait for it until its connections close."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def prepare_rank() -> None:
    """In a process that `launch` started: print the stack at a fault, and end with the launcher."""
    faulthandler.enable()
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class _Failure:
    rank: int
    status: int
    text: str


def _report(failures: dict[int, Any], folder: Path, log_ranks: Sequence[int]) -> int:
    """Tell the first failure on stderr; returns its exit status."""
    first = _first_failure(failures, folder)
    print(f"trimtab: {first.text}", file=sys.stderr)
    output = folder / f"{first.rank}.err"
    if first.rank not in log_ranks and not (folder / f"{first.rank}.json").is_file() and output.is_file():
        tail = output.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
        if tail:
            print("\n".join([f"the last that rank {first.rank} printed:", *tail]), file=sys.stderr)
    return first.status


def _first_failure(failures: dict[int, Any], folder: Path) -> _Failure:
    """The failure that the others follow from.

    Args:
        failures: what the agent saw, by rank, of ranks that did not end with 0; it ends the others itself.
        folder: holds the errors that ranks recorded.
    """
    start = min(failure.timestamp for failure in failures.values())
    for rank, failure in failures.items():
        number = -failure.exitcode
        ended_by_agent = number == signal.SIGKILL and failure.timestamp - start >= _KILLED_BY_AGENT
        # A killed rank records nothing, and its peers record that they lost it. They may abort as they do.
        if number > 0 and number not in (signal.SIGTERM, signal.SIGABRT) and not ended_by_agent:
            hint = "; did the machine run out of memory?" if number == signal.SIGKILL else ""
            return _Failure(rank, 128 + number, f"rank {rank} was ended by {_signal_name(number)}{hint}")
    recorded = []
    for path in folder.glob("*.json"):
        message = json.loads(path.read_text(encoding="utf-8"))["message"]
        details = message["extraInfo"]
        # Another program than the trainer may have used torch's own record.
        at = float(details.get("time", details["timestamp"]))
        recorded.append((at, int(path.stem), message["message"], details))
    if recorded:
        _, rank, text, details = min(recorded, key=lambda record: record[:2])
        if details["py_callstack"] != text:
            text = f"rank {rank} failed\n{details['py_callstack'].rstrip()}"
        status = details.get("status") or max(1, getattr(failures.get(rank), "exitcode", 1))
        return _Failure(rank, status, text)
    rank, failure = min(
        failures.items(), key=lambda item: (item[1].exitcode == -signal.SIGTERM, item[1].timestamp)
    )
    if failure.exitcode < 0:
        return _Failure(
            rank, 128 - failure.exitcode, f"rank {rank} was ended by {_signal_name(-failure.exitcode)}"
        )
    return _Failure(rank, failure.exitcode, f"rank {rank} ended with exit status {failure.exitcode}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
