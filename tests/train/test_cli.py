import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trimtab.train.cli import main, parse_launch, parse_train
from trimtab.train.launch import LaunchConfig

ROOT = Path(__file__).parents[2]
QUICK = ["--config", "deepseek_v3_tiny", "--training.steps", "4", "--metrics.no-tensorboard"]


def output(capsys, *argv):
    """Exit status, stdout and stderr of one command; tyro leaves by SystemExit."""
    try:
        status = main(list(argv))
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    return status, captured.out, re.sub(r"[\s│]+", " ", captured.err)


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_the_commands(capsys, argv):
    status, out, _ = output(capsys, *argv)
    assert status == 0
    for word in ("train", "configs", "report", "trimtab train --module deepseek_v3"):
        assert word in out


def test_help_of_train_shows_options_defaults_and_no_balancing(capsys):
    status, out, _ = output(capsys, "train", "--help")
    assert status == 0
    for word in (
        "--module",
        "--nproc",
        "LOG_RANK",
        "--parallelism.tensor-parallel-degree",
        "--training.steps",
        "--data.seq-len",
        "(default: 256)",
        "--checkpoint.resume",
    ):
        assert word in out
    assert "model.balancing" not in out
    assert "part of the model's config" in out
    # Every field of every section says what it is.
    assert not re.findall(r"│ (--\S+) \S+ +│\n│ +\(default", out)


def test_help_of_the_others(capsys):
    for command in ("report", "configs", "export"):
        status, out, _ = output(capsys, command, "--help")
        assert (status, f"trimtab {command}" in out) == (0, True)


def test_configs_lists_functions_with_their_summaries(capsys):
    status, out, _ = output(capsys, "configs")
    assert status == 0
    assert "deepseek_v3: DeepSeek-V3" in out
    assert re.search(r"  deepseek_v3_tiny\n      A model of seconds", out)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian"], "unknown command 'trian'; did you mean train"),
        (["train", "--optimzer.lr", "3"], "unknown option --optimzer.lr; did you mean --optimizer.lr?"),
        (["train", "--optimizer.max_norm", "3"], "did you mean --training.max_norm?"),
        (["train", "--steps=3"], "unknown option --steps=3; did you mean --training.steps?"),
        (["train", "--model.balancing.coef", "3"], "in Python and has no flag"),
        (["train", "--mdoule", "x"], "did you mean --module?"),
        (["train", "3"], "unexpected argument '3'"),
        (
            ["train", "--module", "deepseek"],
            "unknown module 'deepseek': did you mean deepseek_v3 or deepseek_v2?",
        ),
        (["train", "--config", "tiny"], "unknown config 'tiny': did you mean deepseek_v3_tiny"),
        (["train", "--model.top-k", "40"], "top_k=40 must be in [1, num_experts=16]; lower model.top_k"),
        (["train", "--training.steps", "many"], "Error parsing --training.steps"),
        (["train", "--data.source", "/no/such.txt"], "'/no/such.txt' does not exist"),
        (["train", "--checkpoint.resume", "/no/run"], "--checkpoint.resume /no/run does not exist"),
        (["report", "/no/run"], "/no/run has no metrics.jsonl"),
    ],
)
def test_bad_input_exits_with_2_and_says_what_to_do(capsys, tmp_path, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    status, _, err = output(capsys, *argv)
    assert status == 2
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_options_are_checked_before_anything_heavy():
    """Neither transformers nor the text is touched for a mistyped option."""
    script = (
        "import sys; from trimtab.train.cli import main; status = main(['train', '--optimzer.lr', '3']);"
        "print(status, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]


@pytest.mark.parametrize("separator", ["-", "_"])
def test_hyphens_and_underscores_mean_the_same(separator):
    flag = f"--model.num{separator}experts"
    config, name = parse_train(
        ["--config", "deepseek_v3_tiny", flag, "16", "--optimizer.betas", "0.8", "0.9"]
    )
    assert (config.model.num_experts, name) == (16, "deepseek_v3/deepseek_v3_tiny")
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.model.balancing.bias is not None


def test_several_sources_and_switches():
    config, _ = parse_train(
        ["--data.source", "a.txt", "code=b", "--validation.no-enable", "--compile.enable"]
    )
    assert config.data.source == ("a.txt", "code=b")
    assert (config.validation.enable, config.compile.enable) == (False, True)


BATCH_WISE = ["--config", "deepseek_v3_debugmodel_batch_wise"]
PIPELINE = [
    "--parallelism.pipeline_parallel_degree=4",
    "--parallelism.pipeline_parallel_schedule=1F1B",
    "--parallelism.pipeline_parallel_microbatch_size=1",
]


@pytest.fixture
def launched(monkeypatch):
    """Calls of the launcher, which starts nothing."""
    calls = []

    def launch(command, processes, *, log_ranks):
        calls.append((command, processes, log_ranks))
        return 7

    monkeypatch.setattr("trimtab.train.launch.launch", launch)
    for name in ("WORLD_SIZE", "LOG_RANK"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_several_processes_are_started_with_the_same_command(capsys, monkeypatch, launched):
    monkeypatch.setenv("LOG_RANK", "3,1")
    given = [*QUICK, "--parallelism.tensor-parallel-degree=2", "--dump-folder", "a folder"]
    assert output(capsys, "train", "--nproc", "4", *given)[0] == 7
    ((command, processes, log_ranks),) = launched
    assert command == [sys.executable, "-m", "trimtab.train.cli", "train", *given]
    assert (processes.world_size, log_ranks) == (4, (1, 3))


@pytest.mark.parametrize("style", ["--node-rank=1 --master-addr=host", "--node_rank 1 --master_addr host"])
def test_several_machines(capsys, launched, style):
    options = [*style.split(), "--nnodes", "2", "--nproc=2", "--master-port", "1234"]
    assert output(capsys, "train", *QUICK, *options)[0] == 7
    ((_, processes, _),) = launched
    assert processes == LaunchConfig(nproc=2, nnodes=2, node_rank=1, master_addr="host", master_port=1234)


def test_batch_wise_balancing_in_a_pipeline_is_refused_before_anything_starts(capsys, launched):
    status, out, err = output(capsys, "train", *BATCH_WISE, "--nproc", "4", *PIPELINE)
    assert (status, out, launched) == (2, "", [])
    assert "use the global-batch loss (GlobalBatch" in err
    assert "or the sequence-wise loss (SequenceWise" in err
    assert "SequenceWise" in err
    assert output(capsys, "train", *BATCH_WISE, "--nproc", "4")[0] == 7


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--nproc", "0"], "--nproc 0 must be at least 1"),
        (["--nproc", "many"], "argument --nproc: invalid int value: 'many'"),
        (["--nnodes", "2"], "--nnodes 2 needs --master-addr"),
        (["--nporc", "2"], "unknown option --nporc; did you mean --nproc?"),
        (
            ["--nproc", "4", "--parallelism.pipeline-paralel-degree", "4"],
            "--parallelism.pipeline_parallel_degree",
        ),
        (["--nproc", "4", *PIPELINE[:1]], "num_layers=3"),
        (["--parallelism.pipeline_parallel_degree", "2"], "must divide the number of processes, 1"),
        (["--nproc", "4", "--parallelism.tensor_parallel_degree=4"], "must divide model.num_heads=2"),
        (["--nproc", "2", "--optimizer.lr", "-1"], "lr=-1.0 must be a positive number"),
    ],
)
def test_what_processes_cannot_do_is_told_before_they_start(capsys, launched, options, said):
    status, _, err = output(capsys, "train", *QUICK, *options)
    assert (status, launched) == (2, [])
    assert said in err


@pytest.mark.filterwarnings("always:LOG_RANK:UserWarning")
def test_a_rank_that_prints_must_exist(capsys, monkeypatch, launched):
    monkeypatch.setenv("LOG_RANK", "0,2")
    status, _, err = output(capsys, "train", *QUICK, "--nproc", "2")
    assert (status, err) == (
        7,
        "warning: LOG_RANK=0,2 names rank 2, but the last rank of this run is 1 ",
    )
    assert output(capsys, "train", *QUICK, "--nproc", "3") == (7, "", "")


def test_every_gpu_serves_one_process(capsys, monkeypatch, launched):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    status, _, err = output(capsys, "train", *QUICK, "--nproc", "2")
    assert (status, launched) == (2, [])
    assert "2 processes on this machine need a GPU each, and it has 1;" in err
    assert output(capsys, "train", *QUICK, "--nproc", "2", "--training.device", "cpu")[0] == 7


def test_processes_are_started_once(capsys, monkeypatch, launched):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = output(capsys, "train", *QUICK, "--nproc", "2")
    assert (status, launched) == (2, [])
    assert "torchrun already started WORLD_SIZE=2" in err
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert "WORLD_SIZE='two' must be a positive number" in output(capsys, "train", *QUICK)[2]


def test_ranks_of_torchrun_check_alike_and_one_tells(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, tells in (("0", True), ("3", False)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        status, _, err = output(capsys, "train", *BATCH_WISE, *PIPELINE)
        assert (status, "global-batch" in err, err == "") == (2, tells, not tells)


def test_a_started_rank_leaves_its_error_to_the_launcher(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TRIMTAB_LAUNCHED", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0.json"))
    monkeypatch.setattr("trimtab.train.launch.prepare_rank", lambda: None)

    def recorded():
        return json.loads((tmp_path / "0.json").read_text())["message"]

    assert output(capsys, "train", *QUICK, "--data.source", "/no/such.txt") == (2, "", "")
    assert "'/no/such.txt' does not exist" in recorded()["message"]
    assert recorded()["extraInfo"]["status"] == 2

    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("trimtab.train.trainer.Trainer.__init__", broken)
    assert output(capsys, "train", *QUICK) == (1, "", "")
    assert "in broken\n" in recorded()["extraInfo"]["py_callstack"]
    monkeypatch.delenv("TRIMTAB_LAUNCHED")
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train", *QUICK])


def test_a_run_prints_its_steps_and_where_it_is(capsys, tmp_path):
    status, out, _ = output(capsys, "train", *QUICK, "--dump-folder", str(tmp_path), "--run-name", "mine")
    assert status == 0
    assert re.search(
        r"^step: 1  loss: 5\.\d{4}  grad_norm: \d\.\d\d  tps: [\d,]+  maxvio: ", out, re.MULTILINE
    )
    assert f"run directory: {tmp_path}/mine" in out
    assert f"report:        {tmp_path}/mine/report.html" in out
    assert (tmp_path / "mine" / "report.html").is_file()
    (tmp_path / "mine" / "report.html").unlink()
    assert output(capsys, "report", str(tmp_path / "mine"))[:2] == (0, f"{tmp_path}/mine/report.html\n")
    status, out, _ = output(capsys, "train", *QUICK, "--dump-folder", str(tmp_path), "--run-name", "mine")
    assert (status, "finished at step 4" in out) == (0, True)


@pytest.mark.filterwarnings("ignore:LOG_RANK:UserWarning")
def test_a_quiet_rank_prints_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LOG_RANK", "1")
    status, out, _ = output(capsys, "train", *QUICK, "--dump-folder", str(tmp_path), "--metrics.no-report")
    assert (status, out) == (0, "")


def test_a_failed_run_exits_with_1(capsys, tmp_path):
    explode = ["--optimizer.lr", "1e30", "--lr-scheduler.warmup-steps", "0"]
    status, _, err = output(capsys, "train", *QUICK, *explode, "--dump-folder", str(tmp_path))
    assert status == 1
    assert "are not finite" in err
    assert "Lower optimizer.lr" in err


def test_ctrl_c_saves_and_says_how_to_continue(tmp_path):
    arguments = ["train", *QUICK, "--training.steps", "100000", "--run-name", "long", "--metrics.no-report"]
    process = subprocess.Popen(
        [sys.executable, "-m", "trimtab.train.cli", *arguments, "--dump-folder", str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("step: 1 "):
                break
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGINT
    step = int(re.search(r"interrupted at step (\d+)", out)[1])
    assert f"continue with: --checkpoint.resume {tmp_path}/long" in out
    assert (tmp_path / "long" / "checkpoints" / f"step-{step:06d}").is_dir()
    last = json.loads((tmp_path / "long" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["status"], last["step"]) == ("end", "interrupted", step)


@pytest.mark.parametrize("variable", ["NGPU", "NNODES"])
@pytest.mark.parametrize("value", ["two", "0", "-1"])
def test_the_script_refuses_process_counts_before_it_installs(tmp_path, variable, value):
    script = ROOT / "run_train.sh"
    done = subprocess.run(
        ["bash", str(script)],
        env=os.environ | {variable: value},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert f"{variable}='{value}' must be a positive number; set {variable}=1" in done.stderr


@pytest.fixture
def script(tmp_path):
    """`run_train.sh` in a repository whose Python only tells how it was called."""
    for name in ("run_train.sh", "pyproject.toml", "constraints.txt", "scripts/environment.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\n[ "$2" = pip ] || printf "%s\\n" "LOG_RANK=$LOG_RANK" "$@"\n')
    python.chmod(0o755)

    def run(*arguments, **variables):
        kept = {name: value for name, value in os.environ.items() if name not in ("LOG_RANK", "NGPU")}
        done = subprocess.run(
            ["bash", str(tmp_path / "run_train.sh"), *arguments],
            env=kept | variables,
            capture_output=True,
            text=True,
            check=True,
        )
        lines = done.stdout.splitlines()
        return lines[next(i for i, line in enumerate(lines) if line.startswith("LOG_RANK")) :]

    return run


def test_the_script_hands_on_what_it_is_given(script, tmp_path):
    log_rank, *arguments = script("--data.source", "a b", MODULE="m", CONFIG="c", NGPU="4", LOG_RANK="3")
    assert log_rank == "LOG_RANK=3"
    assert arguments == [
        *("-m", "trimtab.train.cli", "train", "--module", "m", "--config", "c", "--nproc", "4"),
        *("--dump-folder", f"{tmp_path}/runs", "--data.source", "a b"),
    ]
    assert script()[-1] == f"{tmp_path}/runs"


def test_the_script_starts_on_several_machines(script):
    given = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host", "NGPU": "8"}
    arguments = script("--training.steps=3", **given)
    processes, rest = parse_launch(arguments[arguments.index("train") + 1 :])
    assert processes == LaunchConfig(nproc=8, nnodes=2, node_rank=1, master_addr="host")
    assert rest[-1] == "--training.steps=3"
