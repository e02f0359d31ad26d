import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trimtab.train.cli import main, parse_train

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
    for word in ("--module", "--training.steps", "--data.seq-len", "(default: 256)", "--checkpoint.resume"):
        assert word in out
    assert "model.balancing" not in out
    assert "part of the model's config" in out
    # Every field of every section says what it is.
    assert not re.findall(r"│ (--\S+) \S+ +│\n│ +\(default", out)


def test_help_of_the_others(capsys):
    for command in ("report", "configs"):
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
        (["train", "--module", "deepseek"], "unknown module 'deepseek': did you mean deepseek_v3?"),
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


def test_more_than_one_process_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    status, _, err = output(capsys, "train", *QUICK)
    assert (status, "WORLD_SIZE=4, but this version trains in one process" in err) == (2, True)


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


@pytest.mark.parametrize(
    ("value", "said"), [("4", "trains in one process"), ("two", "must be a positive number")]
)
def test_the_script_refuses_process_counts_before_it_installs(tmp_path, value, said):
    script = ROOT / "run_train.sh"
    done = subprocess.run(
        ["bash", str(script)], env=os.environ | {"NGPU": value}, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert said in done.stderr
