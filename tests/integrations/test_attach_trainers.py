"""attach() under other people's training: loss scaling, data-parallel means, and the Hugging Face Trainer.

The effective coefficient is the measured gradient of the injected losses over their reference gradient, as
the optimiser sees it.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import trimtab
from tests.hf_models import Batch, K
from tests.hf_models import make_batch as hf_batch
from tests.hf_reference import (
    Configs,
    Gradients,
    counts,
    num_valid,
    recorded,
    reference_grads,
    relative_error,
    routed_tokens,
    stock_model,
    take_grads,
    totals,
)
from trimtab import (
    Accumulation,
    Balancer,
    BatchWise,
    GlobalBatch,
    GradReduction,
    SequenceWise,
    Sign,
    ZLoss,
    attach,
    balancer_of,
)
from trimtab.integrations.trainer_callback import BalancerCallback
from trimtab.reference import reference_loss

RAGGED = {"equal": [(2, 8), (2, 8)], "ragged": [(3, 12), (2, 8)]}


def microbatches(sizes: str) -> list[Batch]:
    return [
        hf_batch(*shape, seed=seed, padding=sizes == "ragged")
        for seed, shape in enumerate(RAGGED[sizes], start=1)
    ]


def objectives(*names: str) -> Configs:
    made = {
        "sequence": SequenceWise.Config(coef=0.3),
        "token": SequenceWise.Config(coef=0.3, weighting="token"),
        "batch": BatchWise.Config(coef=0.2, average_microbatches=True),
        "global": GlobalBatch.Config(coef=0.4),
        "z": ZLoss.Config(coef=0.05),
    }
    return [made[name] for name in names]


class TestLossScaling:
    @pytest.mark.parametrize("microbatch_loss", ["mean", "sum"])
    @pytest.mark.parametrize("sizes", RAGGED)
    @pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
    def test_grad_scaler(self, family: str, sizes: str, microbatch_loss: Any) -> None:
        """Scaled by 1024 and divided by M, or scaled as a share of the step's loss: the same after unscaling."""
        model, _ = stock_model(family)
        batches, configs = microbatches(sizes), objectives("sequence", "batch", "z")
        want = reference_grads(model, family, configs, batches)
        reduction = GradReduction(microbatches=microbatch_loss)
        balancer = attach(model, configs, accumulation=2, reduction=reduction)
        balancer.start_step(**totals(batches))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for batch in batches:
            loss = model(**batch).loss
            loss = balancer.follow(loss) / 2 if microbatch_loss == "mean" else balancer.follow(loss / 2)
            scaler.scale(loss).backward()
        scaled = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
        assert scaled > 100
        scaler.unscale_(optimizer)
        assert relative_error(take_grads(model), want) < 4e-6

    def test_scale_may_change_between_steps(self) -> None:
        model, _ = stock_model("qwen3_moe")
        batch, configs = hf_batch(), objectives("sequence", "z")
        want = reference_grads(model, "qwen3_moe", configs, [batch])
        balancer = attach(model, configs)
        for scale in (1024.0, 0.5):
            (balancer.follow(model(**batch).loss) * scale).backward()
            balancer.step()
            have = {name: grad / scale for name, grad in take_grads(model).items()}
            assert relative_error(have, want) < 4e-6
        # A loss that is not followed is not scaled.
        model(**batch).loss.backward()
        assert relative_error(take_grads(model), want) < 4e-6

    def test_float16_model(self) -> None:
        model, _ = stock_model("qwen3_moe")
        batch, configs = hf_batch(3, 12, padding=True), objectives("sequence", "batch", "z")
        want = reference_grads(model, "qwen3_moe", configs, [batch])
        balancer = attach(model.half(), configs)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(balancer.follow(model(**batch).loss)).backward()
        have = {name: grad.float() / 1024 for name, grad in take_grads(model).items()}
        assert relative_error(have, want) < 2e-2

    def test_follow_must_know_what_the_loss_is(self) -> None:
        model, _ = stock_model("qwen3_moe")
        balancer = attach(model, objectives("sequence"), accumulation=2)
        with pytest.raises(ValueError, match=r"GradReduction\(microbatches='mean'\).*or 'sum'"):
            balancer.follow(model(**hf_batch()).loss)

    @pytest.mark.parametrize("names", [("sequence", "z"), ("token",)])
    def test_ragged_accumulation(self, names: tuple[str, ...]) -> None:
        model, _ = stock_model("qwen3_moe")
        batches, configs = microbatches("ragged"), objectives(*names)
        want = reference_grads(model, "qwen3_moe", configs, batches)
        balancer = attach(model, configs, accumulation=2)
        balancer.start_step(**totals(batches))
        for batch in batches:
            (model(**batch).loss / 2).backward()
        balancer.step()
        balancer.metrics()
        assert relative_error(take_grads(model), want) < 4e-6

        for batch in batches:
            (model(**batch).loss / 2).backward()
        balancer.step()
        with pytest.warns(
            UserWarning, match=r"each was weighted as 1/M of the step; call balancer.start_step"
        ):
            balancer.metrics()
        assert relative_error(take_grads(model), want) > 1e-3


class TestDataParallel:
    @pytest.mark.parametrize("names", [("sequence", "z"), ("token",)])
    def test_mean_over_ranks(self, names: tuple[str, ...]) -> None:
        """Two copies on the two halves of a ragged step, whose gradients are averaged as DDP does."""
        model, _ = stock_model("deepseek_v3")
        batches, configs = microbatches("ragged"), objectives(*names)
        want = reference_grads(model, "deepseek_v3", configs, batches)
        attach(model, configs, reduction=GradReduction(ranks="mean", num_ranks=2))
        ranks = [model, copy.deepcopy(model)]
        grads = []
        for rank, batch in zip(ranks, batches, strict=True):
            balancer = balancer_of(rank)
            balancer.start_step(**totals(batches))
            rank(**batch).loss.backward()
            assert counts(balancer) == [K * num_valid(batch)] * 2
            grads.append(take_grads(rank))
        mean = {name: (grads[0][name] + grads[1][name]) / 2 for name in want}
        assert relative_error(mean, want) < 4e-6


# ---------------------------------------------------------------- the Hugging Face Trainer


def dataset(num_rows: int, padding: bool = False) -> list[dict[str, Tensor]]:
    rows = hf_batch(num_rows, 12, seed=5, padding=padding)
    return [{name: values[row] for name, values in rows.items()} for row in range(num_rows)]


class Recorder(TrainerCallback):
    """Gradients and counts at each optimizer step."""

    def __init__(self, balancer: Balancer | None) -> None:
        self.balancer = balancer
        self.grads: list[Gradients] = []
        self.counts: list[list[int]] = []

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.grads.append(
            {
                name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for name, p in model.named_parameters()
            }
        )
        if self.balancer is not None:
            self.counts.append(counts(self.balancer))


class RecordingTrainer(Trainer):
    """Keeps the microbatches of each step."""

    declare = False

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self.steps = [*getattr(self, "steps", []), [dict(batch) for batch in batches]]
        if self.declare:
            balancer_of(cast(nn.Module, self.model)).start_step(
                num_microbatches=len(batches), **totals(batches)
            )
        return batches, num_items


def arguments(path: Path, **settings: Any) -> TrainingArguments:
    defaults: dict[str, Any] = dict(
        output_dir=str(path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.0,
        max_grad_norm=0.0,
        num_train_epochs=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return TrainingArguments(**(defaults | settings))


def train(
    path: Path, family: str, configs: Configs, num_rows: int = 12, padding: Any = False, **settings: Any
) -> tuple[RecordingTrainer, Recorder]:
    """A short run with attached losses; at learning rate 0 every step has the same parameters."""
    model, _ = stock_model(family)
    declare, bias = settings.pop("declare", False), settings.pop("bias", None)
    args = arguments(path, **settings)
    callbacks: list[TrainerCallback] = []
    balancer = None
    if configs or bias:
        balancer = attach(
            model, configs, bias=bias, accumulation=args.gradient_accumulation_steps, measure_every=1
        )
        callbacks.append(BalancerCallback(balancer))
    recorder = Recorder(balancer)
    trainer = RecordingTrainer(
        model=model, args=args, train_dataset=dataset(num_rows, padding), callbacks=[recorder, *callbacks]
    )
    trainer.declare = declare
    trainer.train()
    return trainer, recorder


def auxiliary_grads(model: Any, score: Any, configs: Configs, batches: Sequence[Batch]) -> Gradients:
    """Gradients of the naive objectives alone."""
    with recorded(model) as calls:
        for batch in batches:
            model(**batch)
    total = sum(
        reference_loss(config.build(), routed_tokens(record, batches), score)
        for record in calls
        for config in configs
    )
    total.backward()  # type: ignore[union-attr]
    return take_grads(model)


def effective_coefficient(have: Gradients, without: Gradients, want: Gradients) -> tuple[float, float]:
    """(coefficient, relative size of what is not explained by it)."""
    injected = torch.cat([(have[name].double() - without[name].double()).flatten() for name in want])
    reference = torch.cat([want[name].double().flatten() for name in want])
    coefficient = injected @ reference / (reference @ reference)
    return coefficient.item(), ((injected - coefficient * reference).norm() / reference.norm()).item()


class TestTrainer:
    @pytest.mark.parametrize("accumulation", [1, 2, 3])
    def test_effective_coefficient(self, tmp_path: Path, accumulation: int) -> None:
        """The Trainer divides the loss by the step's label tokens; injected gradients do not pass through it."""
        configs = objectives("sequence", "batch", "z")
        settings: dict[str, Any] = {"num_rows": 6 * accumulation, "gradient_accumulation_steps": accumulation}
        trainer, attached = train(tmp_path, "deepseek_v3", configs, **settings)
        _, plain = train(tmp_path, "deepseek_v3", [], **settings)
        model, _ = stock_model("deepseek_v3")
        assert len(attached.grads) == len(plain.grads) == len(trainer.steps) == 3
        for step, batches in enumerate(trainer.steps):
            assert len(batches) == accumulation
            want = auxiliary_grads(model, "sigmoid", configs, batches)
            coefficient, rest = effective_coefficient(attached.grads[step], plain.grads[step], want)
            assert coefficient == pytest.approx(1, abs=1e-6)
            assert rest < 1e-6
            assert attached.counts[step] == [K * sum(map(num_valid, batches))] * 2

    def test_last_step_of_an_epoch_is_shorter(self, tmp_path: Path) -> None:
        configs = objectives("sequence", "batch", "z")
        # 5 batches: steps of 2, 2 and 1 microbatches, in each of two epochs
        trainer, attached = train(tmp_path, "qwen3_moe", configs, num_rows=10, num_train_epochs=2)
        _, plain = train(tmp_path, "qwen3_moe", [], num_rows=10, num_train_epochs=2)
        model, _ = stock_model("qwen3_moe")
        assert [len(batches) for batches in trainer.steps] == [2, 2, 1, 2, 2, 1]
        for step, batches in enumerate(trainer.steps):
            want = auxiliary_grads(model, "softmax", configs, batches)
            coefficient, _ = effective_coefficient(attached.grads[step], plain.grads[step], want)
            assert coefficient == pytest.approx(1, abs=1e-6)

    def test_ragged_batches_with_declared_totals(self, tmp_path: Path) -> None:
        configs = objectives("token", "z")
        settings: dict[str, Any] = {"num_rows": 11, "padding": True, "declare": True}
        trainer, attached = train(tmp_path, "qwen3_moe", configs, **settings)
        _, plain = train(tmp_path, "qwen3_moe", [], num_rows=11, padding=True)
        model, _ = stock_model("qwen3_moe")
        sizes = [[num_valid(batch) for batch in batches] for batches in trainer.steps]
        assert len(set(sizes[0])) == 2
        for step, batches in enumerate(trainer.steps):
            want = auxiliary_grads(model, "softmax", configs, batches)
            coefficient, _ = effective_coefficient(attached.grads[step], plain.grads[step], want)
            assert coefficient == pytest.approx(1, abs=1e-6)

    # transformers 5.23 deprecates these names for ones that 5.20 does not have yet.
    @pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_enable)?` is deprecated")
    def test_checkpointing_and_bfloat16_autocast(self, tmp_path: Path) -> None:
        configs = objectives("sequence", "z")
        settings: dict[str, Any] = {"bf16": True, "gradient_checkpointing": True}
        trainer, attached = train(tmp_path, "qwen3_moe", configs, **settings)
        _, plain = train(tmp_path, "qwen3_moe", [], **settings)
        model, _ = stock_model("qwen3_moe")
        for step, batches in enumerate(trainer.steps):
            # In bfloat16 a token may choose another expert, so the reference must as well.
            with torch.autocast("cpu", torch.bfloat16):
                want = auxiliary_grads(model, "softmax", configs, batches)
            coefficient, rest = effective_coefficient(attached.grads[step], plain.grads[step], want)
            assert coefficient == pytest.approx(1, abs=0.01)
            assert rest < 0.1
            assert attached.counts[step] == [K * sum(map(num_valid, batches))] * 2

    def test_metrics_are_logged(self, tmp_path: Path) -> None:
        trainer, _ = train(tmp_path, "deepseek_v3", objectives("sequence", "z"), learning_rate=1e-3)
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert [entry["step"] for entry in logged] == [1, 2, 3]
        for entry in logged:
            assert entry["balance/maxvio_max"] >= entry["balance/maxvio_mean"] > 0
            assert 0 < entry["balance/load_entropy"] <= 1
            assert entry["balance/dead_experts"] >= 0
            assert entry["balance/sequence_wise_loss"] > 0.9
            assert entry["balance/z_loss"] > 0
        # The summary of the run is not a step.
        assert "balance/maxvio_mean" not in trainer.state.log_history[-1]

    def test_bias_moves_once_per_step(self, tmp_path: Path) -> None:
        stock, _ = stock_model("deepseek_v3")
        trainer, _ = train(tmp_path, "deepseek_v3", [], bias=Sign.Config(speed=0.01))
        model: Any = trainer.model
        have = model.model.layers[0].mlp.gate.e_score_correction_bias
        moved = (have - stock.model.layers[0].mlp.gate.e_score_correction_bias) / 0.01
        # three steps of -1, 0 or 1
        assert torch.allclose(moved, moved.round(), atol=1e-4)
        assert 0 < moved.abs().max() < 3.5

    def test_evaluation_does_not_count(self, tmp_path: Path) -> None:
        model, _ = stock_model("qwen3_moe")
        balancer = attach(model, objectives("sequence"))
        args = arguments(tmp_path, gradient_accumulation_steps=1, eval_strategy="steps", eval_steps=1)
        data = dataset(6)
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=data,
            eval_dataset=data,
            callbacks=[BalancerCallback(balancer)],
        )
        trainer.train()
        assert balancer.num_steps == 3
        assert counts(balancer) == [-1, -1]

    def test_the_balancer_resumes_from_the_trainers_checkpoint(self, tmp_path: Path) -> None:
        """Momentum, prior counts and schedule step; the Trainer (5.23) itself resumes fused experts wrongly."""

        class Begin(TrainerCallback):
            def __init__(self, balancer: Balancer) -> None:
                self.balancer = balancer

            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                self.state = copy.deepcopy(self.balancer.state_dict())

        def run(max_steps: int, resume: bool) -> tuple[Balancer, Any]:
            model, _ = stock_model("deepseek_v3")
            rule = trimtab.Momentum.Config(speed=0.1, schedule=((0, 1.0), (4, 0.0)))
            balancer = attach(model, objectives("global"), bias=rule, accumulation=2, measure_every=0)
            begin = Begin(balancer)
            trainer = Trainer(
                model=model,
                args=arguments(tmp_path, max_steps=max_steps, save_strategy="steps", save_steps=2),
                train_dataset=dataset(16),
                callbacks=[BalancerCallback(balancer), begin],
            )
            trainer.train(resume_from_checkpoint=resume)
            return balancer, begin.state

        saved = run(2, resume=False)[0].state_dict()
        balancer, state = run(3, resume=True)
        assert state["num_steps"] == saved["num_steps"] == 2
        assert balancer.num_steps == 3
        for name, layer in saved["layers"].items():
            assert layer["momentum_E"].abs().max() > 0
            for key, value in layer.items():
                have = state["layers"][name][key]
                assert torch.equal(have, value) if isinstance(value, Tensor) else have == value
        for path in tmp_path.glob("checkpoint-*/trimtab_balancer.pt"):
            path.unlink()
        with pytest.warns(UserWarning, match=r"resumes at step \d, but .* holds no trimtab_balancer\.pt"):
            run(4, resume=True)

    def test_other_accumulation_is_refused(self, tmp_path: Path) -> None:
        model, _ = stock_model("qwen3_moe")
        balancer = attach(model, objectives("sequence"))
        trainer = Trainer(
            model=model,
            args=arguments(tmp_path),
            train_dataset=dataset(4),
            callbacks=[BalancerCallback(balancer)],
        )
        with pytest.raises(
            ValueError,
            match=r"gradient_accumulation_steps=2, but .* num_microbatches=1; attach with accumulation=2",
        ):
            trainer.train()

    def test_order_that_the_trainer_does_not_run_is_refused(self) -> None:
        model, _ = stock_model("qwen3_moe")
        accumulation = Accumulation(num_microbatches=2, order="counting_pass")
        callback = BalancerCallback(attach(model, objectives("sequence"), accumulation=accumulation))
        args = SimpleNamespace(gradient_accumulation_steps=2)
        with pytest.raises(
            ValueError, match="order='counting_pass', but the Trainer runs backward after each"
        ):
            callback.on_train_begin(args, None, None, model=model)

    def test_stock_loss_switched_on_later_is_refused(self) -> None:
        model, _ = stock_model("mixtral", router_aux_loss_coef=0.02)
        callback = BalancerCallback(attach(model, objectives("sequence")))
        model.config.output_router_logits = True
        args = SimpleNamespace(gradient_accumulation_steps=1)
        with pytest.raises(ValueError, match="also adds its own load-balancing loss"):
            callback.on_train_begin(args, None, None, model=model)

    def test_half_a_step_is_forgotten(self) -> None:
        """As when the Trainer starts over with a smaller batch after running out of memory."""
        model, _ = stock_model("qwen3_moe")
        balancer = attach(model, objectives("sequence"))
        model(**hf_batch())
        BalancerCallback(balancer).on_train_begin(SimpleNamespace(gradient_accumulation_steps=1), None, None)
        assert counts(balancer) == [-1, -1]

    def test_fp16_needs_follow(self) -> None:
        model, _ = stock_model("qwen3_moe")
        balancer = attach(model, objectives("sequence"))
        callback = BalancerCallback(balancer)
        args = SimpleNamespace(fp16=True)
        loss = model(**hf_batch()).loss
        loss.backward()
        with pytest.raises(RuntimeError, match=r"fp16=True scales the loss.*return balancer\.follow\("):
            callback.on_pre_optimizer_step(args, None, None)
        balancer.step()
        balancer.follow(model(**hf_batch()).loss).backward()
        callback.on_pre_optimizer_step(args, None, None)
