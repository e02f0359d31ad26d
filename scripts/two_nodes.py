#!/usr/bin/env python3
"""Two machines on one: trains across two network namespaces, kills a worker, cuts the link, and checks the result.

    sudo python scripts/two_nodes.py                 # needs root for the namespaces; about three minutes
    sudo python scripts/two_nodes.py --only cut

Each machine runs torchrun with two processes. What is asserted, in each part, is that the run ends finished, that
it went on from its last checkpoint, and that loss and balance of its last step are those of a run that nobody
disturbed:

    plain   nothing happens
    kill    one worker of the second machine is ended by SIGKILL
    cut     the link between the machines goes down for longer than a collective may wait, and comes back

The parallel plan spans the machines: with 2 x 2 processes, FSDP and experts go across the link.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NAMES = ("trimtab0", "trimtab1")
LINKS = ("trimtab-v0", "trimtab-v1")
ADDRESSES = ("10.77.13.1", "10.77.13.2")
PORT = 29417
STEPS, INTERVAL = 30, 5
TIMEOUT = 12  # seconds that a collective may wait
LIMIT = 240  # seconds for one part


def run(*command: str) -> None:
    """Run a command that must succeed."""
    subprocess.run(command, check=True, timeout=30)


@contextlib.contextmanager
def network() -> Iterator[None]:
    """Two namespaces and a link between them."""
    clear_network()
    try:
        for name in NAMES:
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        run(
            "ip",
            "link",
            "add",
            LINKS[0],
            "netns",
            NAMES[0],
            "type",
            "veth",
            "peer",
            LINKS[1],
            "netns",
            NAMES[1],
        )
        for name, link, address in zip(NAMES, LINKS, ADDRESSES, strict=True):
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", link)
            run("ip", "-n", name, "link", "set", link, "up")
        yield
    finally:
        clear_network()


def clear_network() -> None:
    """Remove what an earlier run may have left."""
    for name in NAMES:
        subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False, timeout=30)


def start(machine: int, folder: Path, run_name: str) -> subprocess.Popen[bytes]:
    """torchrun on one machine, in a process group of its own."""
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": LINKS[machine],
        # Without it, workers that restart meet in a store that still holds the addresses of those that died.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        # Sources other than a fixed one are found on the machine; this text is shipped.
        "LOG_RANK": "0",
    }
    # Left to guess from its addresses, no machine may host the store. A machine that lost the other closes its
    # rendezvous only when its own waits end, so each has an end of its own.
    rendezvous = f"is_host={int(machine == 0)},join_timeout=120,last_call_timeout=5"
    command = ["ip", "netns", "exec", NAMES[machine], "timeout", "-k", "5", str(LIMIT)]
    command += [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    command += ["--max-restarts", "5", "--rdzv-backend", "c10d", "--rdzv-id", run_name]
    command += ["--rdzv-endpoint", f"{ADDRESSES[0]}:{PORT}", "--rdzv-conf", rendezvous]
    command += ["--local-addr", ADDRESSES[machine], "-m", "trimtab.train.cli", "train"]
    command += ["--module", "deepseek_v3", "--config", "deepseek_v3_tiny", "--dump-folder", str(folder)]
    command += ["--run-name", run_name, "--training.steps", str(STEPS), "--training.global-batch-size", "16"]
    command += ["--training.timeout-seconds", str(TIMEOUT), "--checkpoint.interval", str(INTERVAL)]
    command += ["--metrics.log-interval", "1", "--metrics.no-tensorboard", "--metrics.no-report"]
    command += ["--validation.no-enable", "--parallelism.expert-parallel-degree", "4"]
    log = (folder / f"{run_name}-machine{machine}.log").open("wb")
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def records(folder: Path, run_name: str, event: str) -> list[dict[str, Any]]:
    """What the run has logged so far."""
    path = folder / run_name / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    parsed = [json.loads(line) for line in lines if line.endswith("}")]
    return [record for record in parsed if record["event"] == event]


def wait_for_step(folder: Path, run_name: str, step: int, deadline: float) -> None:
    """Wait until a step has been logged."""
    while not any(record["step"] >= step for record in records(folder, run_name, "step")):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{run_name}: step {step} was not reached")
        time.sleep(0.1)


def worker_of(machine: int) -> int:
    """Process id of one worker of a machine."""
    pids = subprocess.run(
        ["ip", "netns", "pids", NAMES[machine]], capture_output=True, text=True, check=True, timeout=30
    ).stdout.split()
    for pid in map(int, pids):
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if b"LOCAL_RANK=1" in environment:
                return pid
    raise RuntimeError(f"{NAMES[machine]} has no worker")


def train(folder: Path, run_name: str, disturb: str | None) -> dict[str, Any]:
    """One run, disturbed or not; its last step record."""
    began = time.monotonic()
    deadline = began + LIMIT
    machines = [start(machine, folder, run_name) for machine in (0, 1)]
    try:
        if disturb is not None:
            # Between two checkpoints, so that going on means going back.
            wait_for_step(folder, run_name, 2 * INTERVAL + 3, deadline)
        if disturb == "kill":
            pid = worker_of(1)
            print(f"  SIGKILL to process {pid} of {NAMES[1]}", flush=True)
            os.kill(pid, signal.SIGKILL)
        elif disturb == "cut":
            print(f"  link down for {TIMEOUT + 13} s", flush=True)
            run("ip", "-n", NAMES[1], "link", "set", LINKS[1], "down")
            time.sleep(TIMEOUT + 13)
            run("ip", "-n", NAMES[1], "link", "set", LINKS[1], "up")
        statuses = [machine.wait(timeout=max(1.0, deadline - time.monotonic())) for machine in machines]
    finally:
        for machine in machines:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(machine.pid, signal.SIGKILL)
            machine.wait()
    assert statuses == [0, 0], (
        f"{run_name}: torchrun ended with {statuses}; see {folder}/{run_name}-machine*.log"
    )
    end = records(folder, run_name, "end")[-1]
    assert (end["status"], end["step"]) == ("finished", STEPS), end
    starts = [record["first_step"] for record in records(folder, run_name, "start")]
    if disturb is None:
        assert starts == [1], starts
    else:
        assert starts[0] == 1, starts
        assert len(starts) >= 2, "nothing was disturbed"
        assert starts[-1] % INTERVAL == 1, f"went on at step {starts[-1]}, not after a checkpoint"
        assert starts[-1] > INTERVAL, "began again instead of going on"
    last = records(folder, run_name, "step")[-1]
    print(
        f"  {run_name}: started at steps {starts}, finished at {end['step']}, loss {last['loss']:.6f}, "
        f"{time.monotonic() - began:.0f} s",
        flush=True,
    )
    return last


def main() -> None:
    """Run the parts and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("kill", "cut"), help="only this part, beside the plain one")
    parser.add_argument("--keep", type=Path, help="folder for runs and logs, which are then kept")
    chosen = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("network namespaces need root")
    folder = Path(tempfile.mkdtemp(prefix="two-nodes-")) if chosen.keep is None else chosen.keep.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    parts = ["kill", "cut"] if chosen.only is None else [chosen.only]
    with network():
        print("plain", flush=True)
        expected = train(folder, "plain", None)
        for part in parts:
            print(part, flush=True)
            found = train(folder, part, part)
            for name in ("loss", "grad_norm"):
                assert abs(found[name] - expected[name]) <= 1e-6 * abs(expected[name]), (
                    name,
                    found,
                    expected,
                )
            assert found["balance"]["load"] == expected["balance"]["load"]
    if chosen.keep is None:
        shutil.rmtree(folder)
    print("two machines: all parts passed", flush=True)


if __name__ == "__main__":
    main()
