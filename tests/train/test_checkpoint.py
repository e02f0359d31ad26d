import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from tests.train.tiny import build, tiny
from trimtab import GlobalBatch, Momentum, Quantile, SequenceWise
from trimtab.train.checkpoint import CheckpointConfig, Checkpointer, CheckpointError, locate
from trimtab.train.model import Balancing

# Counts of the last step, momenta and histograms all have to come back.
PRIOR = Balancing(
    objectives=(GlobalBatch.Config(coef=1e-2, counts="prior"),), bias=Momentum.Config(speed=1e-2)
)
QUANTILE = Balancing(objectives=(SequenceWise.Config(coef=1e-2, unit="document"),), bias=Quantile.Config())


def resumable(tmp_path, name, *, balancing=PRIOR, **sections):
    return tiny(
        tmp_path,
        balancing=balancing,
        run_name=name,
        data={"microbatch_size": 2, "domain_pure": True},
        training={"steps": 8, "global_batch_size": 6},
        checkpoint={"interval": 4, "keep": 0},
        **sections,
    )


def rows(run_dir):
    """Everything logged but the clock, last attempt of each step."""
    found = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["event"] in ("step", "validation"):
            clock = ("seconds", "tokens_per_second")
            values = {name: value for name, value in record.items() if name not in clock}
            found[record["event"], record["step"]] = values
    return found


def state_of(trainer):
    """Every number a run holds: parameters, buffers, optimiser, ledger, position, schedule."""
    found = dict(trainer.model.state_dict())
    for i, state in enumerate(trainer.optimizer.state_dict()["state"].values()):
        found |= {f"optimizer.{i}.{name}": value for name, value in state.items()}
    for name, layer in trainer.balancer.state_dict()["layers"].items():
        found |= {f"balancer.{name}.{key}": value for key, value in layer.items()}
    found["lr"] = [group["lr"] for group in trainer.optimizer.param_groups]
    found["data"] = trainer.loader.state_dict()
    found["random"] = torch.get_rng_state()
    found["count"] = (trainer.balancer.num_steps, trainer.step, trainer.num_tokens)
    return found


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name


@pytest.mark.parametrize("balancing", [PRIOR, QUANTILE], ids=["prior_momentum", "document_quantile"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, balancing):
    on = {"enable": True, "interval": 3}
    whole = build(resumable(tmp_path, "whole", balancing=balancing, validation=on))
    whole.train()
    half = build(resumable(tmp_path, "half", balancing=balancing, validation=on))
    step = half._train_step

    def stopped():
        if half.step == 4:
            signal.raise_signal(signal.SIGINT)
        return step()

    half._train_step = stopped
    assert half.train().status == "interrupted"
    torch.rand(7)  # whatever the process did in between
    resumed = build(resumable(tmp_path, "half", balancing=balancing, validation=on))
    assert resumed.step == 5
    momentum = resumed.balancer.state_dict()["layers"]["model.layers.1.mlp.gate"]["momentum_E"]
    assert (momentum is not None) == (balancing is PRIOR)
    resumed.train()
    assert_same(state_of(whole), state_of(resumed))
    assert rows(whole.run_dir) == rows(resumed.run_dir)


def test_a_run_killed_between_checkpoints_repeats_the_lost_steps(tmp_path):
    whole = build(resumable(tmp_path, "whole"))
    whole.train()
    lost = build(resumable(tmp_path, "lost"))
    step = lost._train_step

    def dies():
        if lost.step == 6:
            raise MemoryError
        return step()

    lost._train_step = dies
    with pytest.raises(MemoryError):
        lost.train()
    with (lost.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"event":"st')  # the line it was writing
    resumed = build(resumable(tmp_path, "lost"))
    assert resumed.step == 4
    resumed.train()
    assert_same(state_of(whole), state_of(resumed))
    lines = (resumed.run_dir / "metrics.jsonl").read_text().splitlines()
    assert lines.count('{"event":"st') == 1


def test_resume_by_path_takes_the_run_or_one_checkpoint(tmp_path):
    config = resumable(tmp_path, "first")
    first = build(config)
    first.train()
    anonymous = replace(config, run_name=None)
    for path, step in ((first.run_dir, 8), (first.run_dir / "checkpoints" / "step-000004", 4)):
        again = build(replace(anonymous, checkpoint=replace(config.checkpoint, resume=str(path))))
        assert (again.step, again.run_dir) == (step, first.run_dir)
    again.train()
    assert_same(state_of(first), state_of(again))


def test_another_configuration_is_refused_by_name(tmp_path):
    config = resumable(tmp_path, "run")
    build(config).train()
    changed = replace(
        config,
        optimizer=replace(config.optimizer, lr=1.0),
        model=replace(config.model, balancing=QUANTILE),
        metrics=replace(config.metrics, log_interval=1),
    )
    with pytest.raises(CheckpointError) as caught:
        build(changed)
    message = str(caught.value)
    assert "optimizer.lr (saved 0.01, now 1.0)" in message
    assert "model.balancing.bias.kind (saved 'Momentum', now 'Quantile')" in message
    assert "log_interval" not in message
    assert "--checkpoint.allow-changes" in message
    allowed = replace(
        config,
        optimizer=replace(config.optimizer, lr=1.0),
        checkpoint=replace(config.checkpoint, allow_changes=True),
    )
    assert build(allowed).step == 8


def test_never_does_not_mix_two_runs(tmp_path):
    config = resumable(tmp_path, "run")
    build(config).train()
    with pytest.raises(CheckpointError, match=r"holds checkpoints.*choose another run_name"):
        build(replace(config, checkpoint=replace(config.checkpoint, resume="never")))


def test_only_the_newest_are_kept(tmp_path):
    config = tiny(tmp_path, training={"steps": 7}, checkpoint={"interval": 2, "keep": 2})
    folder = build(config).train().run_dir / "checkpoints"
    assert sorted(os.listdir(folder)) == ["latest", "step-000006", "step-000007"]


def damage_cut(path):
    shard = next(path.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])


def damage_flip(path):
    shard = next(path.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


def damage_missing(path):
    (path / ".metadata").unlink()


def damage_manifest(path):
    (path / "manifest.json").write_text('{"files": ')


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_cut, r"is corrupted: __0_0\.distcp has \d+ bytes"),
        (damage_flip, "content of __0_0.distcp is not what was saved"),
        (damage_missing, r"lacks its file \.metadata"),
        (damage_manifest, "no readable manifest.json"),
    ],
)
def test_a_broken_checkpoint_is_named_with_the_way_out(tmp_path, damage, said):
    config = resumable(tmp_path, "run")
    folder = build(config).train().run_dir / "checkpoints"
    damage(folder / "step-000008")
    with pytest.raises(CheckpointError, match=said) as caught:
        build(config)
    assert str(folder / "step-000008") in str(caught.value)
    assert f"--checkpoint.resume {folder / 'step-000004'}" in str(caught.value)
    damage(folder / "step-000004")
    with pytest.raises(CheckpointError, match="no other checkpoint of this run is intact"):
        build(config)


def test_a_save_that_is_cut_short_leaves_the_last_good_one(tmp_path, monkeypatch):
    trainer = build(tiny(tmp_path, checkpoint={"enable": False}))
    trainer._train_step()
    trainer.step = 1
    trainer._save()
    good = trainer.checkpointer.latest()

    def full(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("trimtab.train.checkpoint.torch.save", full)
        trainer.step = 2
        with pytest.raises(OSError, match="No space left"):
            trainer._save()
    assert trainer.checkpointer.latest() == good
    trainer.checkpointer.read_trainer(good)
    trainer._save()
    names = os.listdir(trainer.checkpointer.folder)
    assert sorted(names) == ["latest", "step-000001", "step-000002"]


def test_the_pointer_may_be_lost(tmp_path):
    trainer = build(resumable(tmp_path, "run"))
    trainer.train()
    (trainer.checkpointer.folder / "latest").unlink()
    assert trainer.checkpointer.latest().name == "step-000008"
    shutil.rmtree(trainer.checkpointer.folder)
    assert trainer.checkpointer.latest() is None


def test_saving_a_step_again_replaces_it(tmp_path):
    trainer = build(tiny(tmp_path))
    for _ in range(2):
        trainer._save()
    assert sorted(os.listdir(trainer.checkpointer.folder)) == ["latest", "step-000000"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    trainer = build(tiny(tmp_path))
    trainer._save()
    wide = tiny(tmp_path)
    other = build(replace(wide, model=replace(wide.model, dim=64)))
    with pytest.raises(CheckpointError, match="does not fit DeepseekV3ForCausalLM"):
        Checkpointer(trainer.run_dir).load(trainer.checkpointer.latest(), other.model, other.optimizer)


def test_what_cannot_be_resumed_from_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        locate(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        locate(tmp_path)
    with pytest.raises(ValueError, match="interval=0 must be at least 1"):
        CheckpointConfig(interval=0)
    with pytest.raises(ValueError, match="keep=-1"):
        CheckpointConfig(keep=-1)


SAVE_FOREVER = """
import sys
from pathlib import Path
from tests.train.tiny import build, tiny
trainer = build(tiny(Path(sys.argv[1])))
while True:
    trainer.step += 1
    trainer._save()
    print(trainer.step, flush=True)
"""


def test_a_kill_in_the_middle_of_saving_never_loses_the_last_good_one(tmp_path):
    """The process does nothing but save, so wherever the kill hits, it hits a save."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline()
        time.sleep(0.013)
    finally:
        process.kill()
        rest = process.communicate()[0].split()
    done = int(rest[-1]) if rest else 3
    (run_dir,) = (tmp_path / "runs").iterdir()
    checkpointer = Checkpointer(run_dir, keep=2)
    latest = checkpointer.latest()
    # Every announced save counts; one that was finished but not announced may too.
    assert int(latest.name.removeprefix("step-")) in (done, done + 1)
    config = tiny(tmp_path, checkpoint={"resume": str(run_dir)})
    resumed = build(config)
    assert resumed.step >= done
    resumed._save()
    leftovers = [name for name in os.listdir(run_dir / "checkpoints") if name.startswith(".")]
    assert leftovers == []
