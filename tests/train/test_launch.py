import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from trimtab.train.launch import LAUNCHED, LaunchConfig, _first_failure, launch, record_failure

ROOT = Path(__file__).parents[2]
# torch's handler of a process leaves the files open that the process's output goes to (torch 2.13).
pytestmark = pytest.mark.filterwarnings(
    r"ignore:unclosed file .*trimtab-ranks:ResourceWarning",
    r"ignore:Exception ignored in. <_io.FileIO name='[^']*trimtab-ranks:pytest.PytestUnraisableExceptionWarning",
)
# What every rank runs. None imports torch, so that a test takes a second.
PRELUDE = """
import json, os, signal, sys, time
from pathlib import Path
rank = int(os.environ["RANK"])
folder = Path(sys.argv[1])
def wait(name, count):
    while len(list(folder.glob(name))) < count:
        time.sleep(0.02)
"""


def start(tmp_path, script, *arguments, nproc=3, log_ranks=(0,)):
    file = tmp_path / "script.py"
    file.write_text(PRELUDE + script)
    command = [sys.executable, str(file), str(tmp_path), *arguments]
    return launch(command, LaunchConfig(nproc=nproc), log_ranks=log_ranks)


@pytest.mark.parametrize(("log_ranks", "shown"), [((0,), "0"), ((2,), "2"), ((0, 1), "01"), ((5,), "")])
def test_only_chosen_ranks_are_shown(tmp_path, capfd, log_ranks, shown):
    script = 'print(f"out{rank}", flush=True)\nprint(f"err{rank}", file=sys.stderr, flush=True)\n'
    assert start(tmp_path, script, log_ranks=log_ranks) == 0
    captured = capfd.readouterr()
    assert "".join(sorted(re.findall(r"out(\d)", captured.out))) == shown
    assert "".join(sorted(re.findall(r"err(\d)", captured.err))) == shown


def test_ranks_find_their_place_and_their_arguments(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(os.environ)
    script = (
        'names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS",\n'
        '         "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TRIMTAB_LAUNCHED")\n'
        "told = {name: os.environ[name] for name in names} | {'argv': sys.argv[2:]}\n"
        'told["port"] = int(os.environ["MASTER_PORT"])\n'
        '(folder / f"{rank}.told").write_text(json.dumps(told))\n'
    )
    given = ["--a=$$b", "${local_rank}", "two words", ""]
    assert start(tmp_path, script, *given, nproc=2) == 0
    first, second = (json.loads((tmp_path / f"{rank}.told").read_text()) for rank in range(2))
    assert (first["RANK"], first["LOCAL_RANK"], first["WORLD_SIZE"], first["LOCAL_WORLD_SIZE"]) == (
        *"00",
        *"22",
    )
    assert (second["RANK"], second["MASTER_ADDR"]) == ("1", "localhost")
    assert first["port"] == second["port"] > 0
    assert first["argv"] == given
    assert int(first["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
    assert (first["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"], first[LAUNCHED]) == ("1", "1")
    assert dict(os.environ) == before


def test_the_number_of_threads_can_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    script = '(folder / f"{rank}.told").write_text(os.environ["OMP_NUM_THREADS"])\n'
    assert start(tmp_path, script, nproc=1) == 0
    assert (tmp_path / "0.told").read_text() == "7"


# ---------------------------------------------------------------- failures


def test_a_failed_rank_ends_the_run_and_is_told_once(tmp_path, capfd):
    script = 'if rank == 1:\n    raise RuntimeError("boom")\ntime.sleep(60)\n'
    started = time.monotonic()
    assert start(tmp_path, script) == 1
    assert time.monotonic() - started < 30
    err = capfd.readouterr().err
    assert err.startswith("trimtab: rank 1 ended with exit status 1\nthe last that rank 1 printed:\n")
    assert err.count("RuntimeError: boom") == err.count("Traceback") == 1


def test_exit_statuses_are_kept(tmp_path, capfd):
    assert start(tmp_path, "sys.exit(3 if rank == 2 else time.sleep(60))\n") == 3
    assert "rank 2 ended with exit status 3" in capfd.readouterr().err


def test_a_killed_rank_is_named_although_its_peers_complain(tmp_path, capfd):
    script = (
        "if rank == 1:\n"
        '    wait("ready*", 2)\n'
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        'details = {"py_callstack": "", "timestamp": str(int(time.time()))}\n'
        'record = {"message": "lost a peer", "extraInfo": details}\n'
        'Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": record}))\n'
        '(folder / f"ready{rank}").touch()\n'
        "time.sleep(60)\n"
    )
    assert start(tmp_path, script) == 128 + signal.SIGKILL
    err = capfd.readouterr().err
    assert err == "trimtab: rank 1 was ended by SIGKILL; did the machine run out of memory?\n"


def test_the_first_recorded_error_is_told_alone(tmp_path, capfd):
    """Rank 1 fails, and rank 0, which prints, fails because of it and is the first to be gone."""
    script = (
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from trimtab.train.launch import leave, record_failure\n"
        "if rank == 1:\n"
        '    record_failure("the run stopped at step 3: loss=nan", status=2)\n'
        '    (folder / "failed").touch()\n'
        "    time.sleep(2)\n"
        "    leave(2)\n"
        'wait("failed", 1)\n'
        "try:\n"
        '    raise RuntimeError("connection closed by peer")\n'
        "except RuntimeError as error:\n"
        '    record_failure("RuntimeError", status=1, error=error)\n'
        "leave(1)\n"
    )
    assert start(tmp_path, script, nproc=2) == 2
    assert capfd.readouterr().err == "trimtab: the run stopped at step 3: loss=nan\n"


def test_a_recorded_exception_is_told_with_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "3.json"))
    try:
        raise KeyError("lost")
    except KeyError as error:
        record_failure("KeyError: 'lost'", status=1, error=error)
    told = _first_failure({3: failure(1)}, tmp_path)
    assert (told.rank, told.status) == (3, 1)
    assert told.text.startswith("rank 3 failed\nTraceback (most recent call last):\n")
    assert told.text.endswith("KeyError: 'lost'")
    # torchrun reads the same file.
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    read = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(tmp_path / "3.json"))
    assert read.message["message"] == "KeyError: 'lost'"


def failure(exitcode, timestamp=100):
    return SimpleNamespace(exitcode=exitcode, timestamp=timestamp)


@pytest.mark.parametrize(
    ("failures", "told"),
    [
        ({0: failure(-signal.SIGTERM), 1: failure(4)}, (1, 4, "rank 1 ended with exit status 4")),
        ({0: failure(1, 101), 1: failure(-signal.SIGSEGV, 101)}, (1, 139, "rank 1 was ended by SIGSEGV")),
        # The agent kills what outlives the first failure by half a minute.
        ({0: failure(-signal.SIGKILL, 130), 1: failure(5)}, (1, 5, "rank 1 ended with exit status 5")),
        ({0: failure(-signal.SIGTERM), 2: failure(-signal.SIGABRT)}, (2, 134, "rank 2 was ended by SIGABRT")),
        ({0: failure(-signal.SIGTERM)}, (0, 143, "rank 0 was ended by SIGTERM")),
        ({0: failure(-62)}, (0, 190, "rank 0 was ended by signal 62")),
    ],
)
def test_the_failure_that_others_follow_from(tmp_path, failures, told):
    found = _first_failure(failures, tmp_path)
    assert (found.rank, found.status, found.text) == told


def test_an_abort_follows_from_a_recorded_error(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0.json"))
    record_failure("no data", status=2)
    found = _first_failure({1: failure(-signal.SIGABRT), 0: failure(2)}, tmp_path)
    assert (found.rank, found.status, found.text) == (0, 2, "no data")


# ---------------------------------------------------------------- signals

STOPS = """
def stop(number, frame):
    with (folder / f"signals{rank}").open("a") as file:
        file.write(f"{number}\\n")
    global stopping
    stopping = True
stopping = False
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
(folder / f"ready{rank}").touch()
while not stopping:
    time.sleep(0.02)
time.sleep(0.5)  # the rest of the step
(folder / f"done{rank}").touch()
sys.exit(128 + 15)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_rank_once_and_lets_it_finish(tmp_path, capfd, number):
    def interrupt():
        while len(list(tmp_path.glob("ready*"))) < 3:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=interrupt)
    thread.start()
    status = start(tmp_path, STOPS)
    thread.join()
    assert status == 128 + number
    for rank in range(3):
        assert (tmp_path / f"signals{rank}").read_text() == f"{number}\n"
        assert (tmp_path / f"done{rank}").exists()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(
    sys.platform != "linux", reason="other systems cannot tell a process that its parent died"
)
def test_ranks_end_with_a_launcher_that_is_killed(tmp_path):
    rank = (
        "import time; from trimtab.train.launch import prepare_rank; prepare_rank();"
        "print('ready', flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}], check=True)",
        ],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert parent.stdout is not None
    with parent.stdout as stdout:
        assert stdout.readline() == b"ready\n"
        parent.kill()
        parent.wait()
        started = time.monotonic()
        assert stdout.read() == b""  # the pipe closes when the last process that holds it has ended
    assert time.monotonic() - started < 30


# ---------------------------------------------------------------- machines


def test_two_machines_make_one_world(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "script.py"
    told = "' '.join(os.environ[n] for n in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_PORT'))"
    script.write_text(f"import os, sys; open(sys.argv[1] + os.environ['RANK'], 'w').write({told})")
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import sys; from trimtab.train.launch import LaunchConfig, launch;"
                f"sys.exit(launch([sys.executable, {str(script)!r}, {str(tmp_path / 'rank')!r}], LaunchConfig("
                f"nproc=2, nnodes=2, node_rank={node}, master_addr='127.0.0.1', master_port={port})))",
            ],
            cwd=ROOT,
        )
        for node in (1, 0)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    lines = [(tmp_path / f"rank{rank}").read_text().split() for rank in range(4)]
    assert [line[:2] for line in lines] == [[str(rank), "4"] for rank in range(4)]
    assert [line[2] for line in lines] == ["0", "1", "0", "1"]
    assert len({line[3] for line in lines}) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"nproc": 0}, "--nproc 0 must be at least 1"),
        ({"nnodes": -1}, "--nnodes -1 must be at least 1"),
        ({"nnodes": 2, "node_rank": 2, "master_addr": "a"}, r"--node-rank 2 must be in \[0, 2\)"),
        ({"nnodes": 2}, "--nnodes 2 needs --master-addr"),
        ({"nnodes": 2, "master_addr": ""}, "--nnodes 2 needs --master-addr"),
        ({"master_port": 0}, r"--master-port 0 must be in \[1, 65535\]"),
    ],
)
def test_processes_that_cannot_be_started_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        LaunchConfig(**given)
