import importlib.metadata
import json
import math
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.train.tiny import build, tiny
from trimtab import GlobalBatch, GradReduction, SequenceWise, Sign, ZLoss
from trimtab.train.evaluation import next_token_targets, token_loss
from trimtab.train.model import Balancing
from trimtab.train.trainer import Trainer, TrainingError

GLOBAL = Balancing(objectives=(GlobalBatch.Config(coef=1e-2), ZLoss.Config(coef=1e-3)))


def records(run_dir, event):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def gradients(trainer):
    """Gradients and loss of the first step, before clipping changes them."""
    seen = {}

    def keep(*_):
        seen.update({name: p.grad.clone() for name, p in trainer.model.named_parameters()})

    trainer.optimizer.register_step_pre_hook(keep)
    return trainer._train_step(), seen


def test_a_run_learns_and_leaves_what_it_promises(tmp_path):
    config = tiny(
        tmp_path,
        training={"steps": 20},
        metrics={"tensorboard": True, "report": True, "log_interval": 5},
        validation={"enable": True, "interval": 10},
    )
    result = build(config).train()
    steps = records(result.run_dir, "step")
    assert [record["step"] for record in steps] == [1, 5, 10, 15, 20]
    assert steps[0]["loss"] == pytest.approx(math.log(259), abs=0.1)
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    assert (result.status, result.step, result.signal) == ("finished", 20, None)
    assert result.report is not None
    assert "sequence_wise" in result.report.read_text()
    assert list(result.run_dir.glob("events.out.tfevents.*"))
    assert (
        json.loads((result.run_dir / "config.json").read_text())["model"]["balancing"]["bias"]["kind"]
        == "Sign"
    )
    environment = (result.run_dir / "environment.json").read_text()
    assert json.loads(environment)["packages"]["torch"] == importlib.metadata.version("torch")
    assert str(Path.home()) not in environment
    assert (result.run_dir / "checkpoints" / "latest").read_text() == "step-000020\n"
    (start,) = records(result.run_dir, "start")
    assert start["bias_rule"] == "Sign"
    assert start["objectives"] == [{"name": "sequence_wise", "coef": 1e-3, "scope": "sequence"}]
    assert start["domains"] == ["cpp", "prose", "python", "yaml"]
    (end,) = records(result.run_dir, "end")
    assert (end["status"], end["step"]) == ("finished", 20)


def test_balance_is_logged_each_logged_step(tmp_path):
    trainer = build(tiny(tmp_path))
    result = trainer.train()
    *_, last = records(result.run_dir, "step")
    balance = last["balance"]
    assert balance["num_tokens"] == [4 * 32] * 2
    assert len(balance["load"]) == 2
    for load_E in balance["load"]:
        assert sum(load_E) == pytest.approx(8)
    for value in balance["losses"]["sequence_wise"]["value"]:
        assert 0.9 < value < 2
    # Six updates of 0.01 in one direction are the most a bias can move.
    assert 0 < max(balance["bias_max"]) <= 0.06 + 1e-6


@pytest.mark.parametrize("balancing", [None, GLOBAL], ids=["sequence", "global_and_z"])
def test_accumulation_does_not_change_the_first_step(tmp_path, balancing):
    seen = []
    for size in (4, 2, 1):
        config = tiny(
            tmp_path,
            balancing=replace(balancing, order="counting_pass") if balancing else None,
            data={"microbatch_size": size},
            training={"global_batch_size": 4},
        )
        trainer = build(config)
        assert trainer.engine.run.num_microbatches == 4 // size
        seen.append(gradients(trainer))
    (first, whole), *others = seen
    for record, split in others:
        assert record["loss"] == pytest.approx(first["loss"], abs=1e-5)
        for name, gradient in whole.items():
            torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("order", ["forward_first", "counting_pass"])
def test_the_orders_of_a_step_agree(tmp_path, order):
    exact = Balancing(objectives=(GlobalBatch.Config(coef=1.0, counts="exact"),), order=order)
    one = Balancing(objectives=(GlobalBatch.Config(coef=1.0),))
    step = {"training": {"global_batch_size": 4}}
    _, accumulated = gradients(build(tiny(tmp_path, balancing=exact, data={"microbatch_size": 1}, **step)))
    _, whole = gradients(build(tiny(tmp_path, balancing=one, **step)))
    for name, gradient in whole.items():
        torch.testing.assert_close(accumulated[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_injected_gradient_reaches_the_router_at_full_strength(tmp_path):
    def router_gradient(coef):
        loss = Balancing(objectives=(SequenceWise.Config(coef=coef),))
        trainer = build(tiny(tmp_path, balancing=loss, training={"max_norm": None}))
        assert trainer.balancer.reduction == GradReduction()
        return gradients(trainer)[1]["model.layers.2.mlp.gate.weight"]

    none, one, two = (router_gradient(coef) for coef in (0.0, 1.0, 2.0))
    assert (one - none).norm() > 1e-4
    torch.testing.assert_close(two - none, 2 * (one - none), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointed_activations_change_nothing(tmp_path, mode):
    plain, plain_gradients = gradients(build(tiny(tmp_path)))
    trainer = build(tiny(tmp_path, activation_checkpoint={"mode": mode}))
    calls = []
    router = trainer.engine.parts[0].routers[-1].module
    router.register_forward_hook(lambda *_: calls.append(1))
    record, saved = gradients(trainer)
    assert len(calls) == 2  # forward, and again in backward
    assert record["loss"] == plain["loss"]
    assert trainer.balancer.metrics()["num_tokens"] == [4 * 32] * 2
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(saved[name], gradient, rtol=1e-6, atol=1e-8, msg=name)


# dynamo asks intermediate tensors for their gradient, and hides the warning where warnings are shown.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_layers_train_the_same(tmp_path):
    plain, expected = gradients(build(tiny(tmp_path)))
    config = tiny(
        tmp_path, compile={"enable": True, "backend": "aot_eager"}, validation={"enable": True, "interval": 1}
    )
    trainer = build(config)
    record, compiled = gradients(trainer)
    assert record["loss"] == pytest.approx(plain["loss"], abs=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    with torch.no_grad():
        assert len(trainer.evaluate()["mutual_information"]) == 2


def test_bfloat16_keeps_the_routers_in_float32(tmp_path):
    trainer = build(tiny(tmp_path, training={"mixed_precision": "bfloat16"}))
    logits, hidden = [], []
    trainer.engine.parts[0].routers[0].module.register_forward_hook(
        lambda m, a, output: logits.append(output[0].dtype)
    )
    attention = trainer.model.model.layers[0].self_attn.o_proj
    attention.register_forward_hook(lambda m, a, output: hidden.append(output.dtype))
    record = trainer._train_step()
    assert (logits, hidden) == ([torch.float32], [torch.bfloat16])
    assert record["loss"] == pytest.approx(math.log(259), abs=0.1)


def test_packed_documents_do_not_see_each_other(tmp_path):
    trainer = build(tiny(tmp_path))
    batch = next(trainer.loader)
    while batch.num_sequences == 4:
        batch = next(trainer.loader)
    row = int((batch.position_ids_BS == 0).sum(dim=1).argmax())
    start = int((batch.position_ids_BS[row] == 0).nonzero()[-1])
    ids, positions = batch.input_ids_BS[row], batch.position_ids_BS[row]
    trainer.model.eval()
    with torch.no_grad():
        packed = trainer.model(input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS).logits[row]
        alone = trainer.model(input_ids=ids[None, start:], position_ids=positions[None, start:]).logits[0]
    torch.testing.assert_close(packed[start:], alone, rtol=1e-4, atol=1e-5)


def test_padding_changes_neither_loss_nor_counts(tmp_path):
    trainer = build(tiny(tmp_path, data={"packing": False, "microbatch_size": 8, "seq_len": 200}))
    with pytest.MonkeyPatch.context() as patch:
        batches = [next(trainer.loader) for _ in range(3)]
        batch = min(batches, key=lambda batch: batch.num_tokens)
        assert batch.num_tokens < 8 * 200
        patch.setattr(type(trainer.loader), "__next__", lambda self: batch)
        record = trainer._train_step()
    balance = trainer.balancer.metrics()
    assert record["num_tokens"] == batch.num_tokens
    assert balance["num_tokens"] == [batch.num_tokens] * 2


def test_token_loss_ignores_what_has_no_label():
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 2] = math.log(3.0)
    labels = torch.tensor([[1, 2, -100]])
    # Only position 0 predicts a label, the 2 with probability 3 / 6.
    assert next_token_targets(labels).tolist() == [[2, -100, -100]]
    assert token_loss(logits, next_token_targets(labels)).item() == pytest.approx(math.log(2))


def test_validation_counts_each_held_out_token_once(tmp_path):
    trainer = build(tiny(tmp_path, validation={"enable": True, "interval": 6}))
    result = trainer.train()
    (record,) = records(result.run_dir, "validation")
    held_out = trainer.loader.num_validation_tokens_per_domain
    assert set(record["domain_load"]) == set(held_out)
    for domain, load_LE in record["domain_load"].items():
        assert [sum(load_E) for load_E in load_LE] == [held_out[domain] * 2] * 2
    assert all(0 <= value <= 2 for value in record["mutual_information"])
    assert min(record["domain_loss"].values()) < record["loss"] < max(record["domain_loss"].values())


def test_validation_leaves_the_run_as_it_was(tmp_path):
    with_validation = build(tiny(tmp_path, validation={"enable": True, "interval": 2}))
    without = build(tiny(tmp_path))
    with_validation.train()
    without.train()
    for (name, one), other in zip(
        with_validation.model.state_dict().items(), without.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    trainer = build(tiny(tmp_path, checkpoint={"interval": 2}))
    weight = trainer.model.lm_head.weight
    steps = trainer._train_step

    def poisoned():
        if trainer.step == 4:
            with torch.no_grad():
                weight[0, 0] = math.nan
        return steps()

    trainer._train_step = poisoned
    with pytest.raises(
        TrainingError, match=r"step 5: loss=nan.*not applied.*step-000004.*Lower optimizer.lr"
    ):
        trainer.train()
    (end,) = records(trainer.run_dir, "end")
    assert (end["status"], end["step"]) == ("failed", 4)
    state = trainer.model.state_dict()
    assert all(value.isfinite().all() for name, value in state.items() if name != "lm_head.weight")


def test_a_signal_stops_after_the_step_with_a_checkpoint(tmp_path):
    trainer = build(tiny(tmp_path, training={"steps": 50}, checkpoint={"interval": 50}))
    steps = trainer._train_step

    def interrupted():
        if trainer.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return steps()

    trainer._train_step = interrupted
    before = signal.getsignal(signal.SIGTERM)
    result = trainer.train()
    assert (result.status, result.step, result.signal) == ("interrupted", 3, signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    assert (trainer.run_dir / "checkpoints" / "latest").read_text() == "step-000003\n"
    (end,) = records(trainer.run_dir, "end")
    assert end["status"] == "interrupted"


def test_a_users_files_train(tmp_path):
    lines = [{"text": f"line {i}: " + "abc " * 20, "domain": ["x", "y"][i % 2]} for i in range(60)]
    source = tmp_path / "mine.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    config = tiny(tmp_path, data={"source": str(source)}, validation={"enable": True, "interval": 6})
    result = build(config).train()
    (start,) = records(result.run_dir, "start")
    assert start["domains"] == ["x", "y"]
    assert records(result.run_dir, "step")[-1]["loss"] < 5


def test_bad_data_leave_no_run_directory(tmp_path):
    source = tmp_path / "mine.jsonl"
    source.write_text('{"text": "good"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"mine\.jsonl"):
        build(tiny(tmp_path, data={"source": str(source)}))
    assert not (tmp_path / "runs").exists()


def test_two_runs_of_one_second_have_two_directories(tmp_path, monkeypatch):
    class Clock:
        @staticmethod
        def now(*_):
            from datetime import datetime

            return datetime(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr("trimtab.train.trainer.datetime", Clock)
    first = build(tiny(tmp_path))
    first.run_dir.mkdir(parents=True)
    second = build(tiny(tmp_path))
    assert first.run_dir.name == "deepseek_v3-deepseek_v3_tiny-20260102-030405"
    assert second.run_dir.name == first.run_dir.name + "-2"


def test_a_gpu_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"training\.device='cuda'.*finds no GPU"):
        build(tiny(tmp_path, training={"device": "cuda"}))


def test_the_speed_of_the_bias_decays_over_the_runs_own_length(tmp_path):
    balancing = Balancing(bias=Sign.Config(speed=0.1), bias_decay=0.5)
    trainer: Trainer = build(tiny(tmp_path, balancing=balancing, training={"steps": 8}))
    rule = trainer.balancer.bias_rule
    assert [rule.speed(step) for step in (0, 4, 6, 8)] == pytest.approx([0.1, 0.1, 0.05, 0.0])
