"""What happens to an attached model: copies, casts, checkpoints, adapters, removal, and steps gone wrong."""

import copy
import gc
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab
from tests.hf_models import E, K, tiny_config
from tests.hf_reference import (
    OBJECTIVES,
    Gradients,
    attached_grads,
    counts,
    num_valid,
    reference_grads,
    relative_error,
    stock_model,
    take_grads,
    task_loss,
    with_lora,
)
from trimtab import Accumulation, Balancer, BatchWise, Quantile, SequenceWise, Sign, attach, balancer_of

FAMILIES = ["qwen3_moe", "deepseek_v3", "llama4", "minimax_m2"]


def one_step(model: Any, batch: dict[str, Tensor], balancer: Balancer | None = None) -> Gradients:
    model(**batch).loss.backward()
    if balancer is not None:
        balancer.step()
    return take_grads(model)


def assert_equal(have: Gradients, want: Gradients) -> None:
    assert have.keys() == want.keys()
    assert all(torch.equal(have[name], want[name]) for name in want)


def belongings(model: nn.Module) -> dict[str, Any]:
    """What each module has: attributes, hooks, parameters."""
    hooks = [name for name in vars(nn.Module()) if "hooks" in name]
    return {
        name: (sorted(vars(module)), [len(getattr(module, hook)) for hook in hooks])
        for name, module in model.named_modules()
    }


class TestRemove:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_restores_everything(self, family: str) -> None:
        model, make_batch = stock_model(family)
        batch = make_batch(3, 12, seed=1, padding=True)
        before, keys, logits = belongings(model), list(model.state_dict()), model(**batch).logits
        grads = one_step(model, batch)
        balancer = attach(model, OBJECTIVES["all"])
        assert list(model.state_dict()) == keys
        assert belongings(model) != before
        one_step(model, batch, balancer)
        balancer.remove()
        assert belongings(model) == before
        assert list(model.state_dict()) == keys
        assert torch.equal(model(**batch).logits, logits)
        assert_equal(one_step(model, batch), grads)
        balancer.remove()
        with pytest.raises(RuntimeError, match=r"step\(\) of a balancer that was removed; attach again"):
            balancer.step()

    def test_between_forward_and_backward(self) -> None:
        model, make_batch = stock_model("qwen3_moe")
        batch = make_batch()
        want, _ = attached_grads(model, OBJECTIVES["all"], [batch])
        balancer = attach(model, OBJECTIVES["all"])
        loss = model(**batch).loss
        balancer.remove()
        loss.backward()
        assert_equal(take_grads(model), want)

    def test_balancer_gone_before_backward(self) -> None:
        model, make_batch = stock_model("qwen3_moe")
        balancer = attach(model, OBJECTIVES["all"])
        loss = model(**make_batch()).loss
        balancer.remove()
        del balancer
        gc.collect()
        with pytest.raises(RuntimeError, match="balancer that this forward was counted by is gone; keep the"):
            loss.backward()


class TestCopies:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_deepcopy_has_its_own_balancer(self, family: str) -> None:
        model, make_batch = stock_model(family)
        batch, other = make_batch(3, 12, seed=1, padding=True), make_batch(2, 8, seed=2, padding=True)
        balancer = attach(model, OBJECTIVES["all"])
        # A copy between forward and backward has the counts so far.
        loss = model(**batch).loss
        twin = copy.deepcopy(model)
        its_balancer = balancer_of(twin)
        assert its_balancer is not balancer
        assert its_balancer.ledger is not balancer.ledger
        assert counts(its_balancer) == counts(balancer) == [K * num_valid(batch)] * 2
        loss.backward()
        grads = take_grads(model)
        balancer.step()
        its_balancer.discard_step()

        twin(**other)
        assert counts(balancer) == [-1, -1]
        assert counts(its_balancer) == [K * num_valid(other)] * 2
        its_balancer.discard_step()
        assert_equal(one_step(twin, batch, its_balancer), grads)
        its_balancer.remove()
        assert_equal(one_step(model, batch, balancer), grads)
        assert balancer_of(model) is balancer

    def test_pickle(self) -> None:
        model, make_batch = stock_model("deepseek_v3")
        batch = make_batch(3, 12, seed=1, padding=True)
        balancer = attach(model, OBJECTIVES["all"], bias=Sign.Config())
        balancer.freeze_bias()
        grads = one_step(model, batch, balancer)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for twin in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model))):
            its_balancer = balancer_of(twin)
            assert its_balancer.num_steps == 1
            assert its_balancer.bias_frozen
            assert_equal(one_step(twin, batch, its_balancer), grads)
            assert counts(balancer) == [-1, -1]

    def test_router_copied_by_itself_is_refused(self) -> None:
        model, _ = stock_model("qwen3_moe")
        balancer = attach(model, OBJECTIVES["all"])
        with pytest.raises(
            RuntimeError, match=r"layers\.0\.mlp\.gate: a router with a balancer was copied without its model"
        ):
            copy.deepcopy(model.model.layers[0])
        # The module whose forward tells the batch is enough.
        copy.deepcopy(model.model)
        balancer.remove()
        copy.deepcopy(model.model.layers[0])


class TestCheckpoints:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_save_and_load_while_attached(self, family: str, tmp_path: Path) -> None:
        model, make_batch = stock_model(family)
        batch = make_batch(3, 12, seed=1, padding=True)
        balancer = attach(model, OBJECTIVES["all"])
        grads = one_step(model, batch, balancer)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager").train()
        assert_equal(loaded.state_dict(), model.state_dict())
        assert_equal(one_step(loaded, batch, attach(loaded, OBJECTIVES["all"])), grads)
        model.load_state_dict(loaded.state_dict())
        assert_equal(one_step(model, batch, balancer), grads)

    @pytest.mark.parametrize("attached", ["before", "after"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_meta_model(self, family: str, attached: str) -> None:
        """Nothing that attach() makes is a tensor on the model, which ``to_empty`` would fill with garbage."""
        real, make_batch = stock_model(family)
        batch = make_batch(3, 12, seed=1, padding=True)
        want, _ = attached_grads(real, OBJECTIVES["all"], [batch])
        model_class, config = tiny_config(family)
        with torch.device("meta"):
            model = model_class(config).train()
        balancer = attach(model, OBJECTIVES["all"]) if attached == "before" else None
        model.to_empty(device="cpu")
        model.load_state_dict(real.state_dict())
        # Rotary frequencies are not in the state dict.
        for buffer, value in zip(model.buffers(), real.buffers(), strict=True):
            buffer.copy_(value)
        balancer = balancer or attach(model, OBJECTIVES["all"])
        assert_equal(one_step(model, batch, balancer), want)


class TestCasts:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_cast_after_attach(self, family: str) -> None:
        model, make_batch = stock_model(family)
        model.set_experts_implementation("eager")
        batch = make_batch(3, 12, seed=1, padding=True)
        balancer = attach(model, OBJECTIVES["all"])
        have = one_step(model.to(torch.float64), batch, balancer)
        balancer.remove()
        want = reference_grads(model, family, OBJECTIVES["all"], [batch])
        assert relative_error(have, want) < 4e-6
        balancer = attach(model, OBJECTIVES["all"])
        assert all(g.isfinite().all() for g in one_step(model.to(torch.bfloat16), batch, balancer).values())

    def test_bias_cast_after_attach(self) -> None:
        model, make_batch = stock_model("glm4_moe")
        balancer = attach(model, [], bias=Sign.Config())
        model.to(torch.bfloat16)
        model(**make_batch())
        with pytest.raises(
            ValueError, match=r"expert bias of model\.layers\.0\.mlp\.gate is torch\.bfloat16"
        ):
            balancer.step()


class TestWhatCounts:
    def test_only_training_forwards(self) -> None:
        model, make_batch = stock_model("qwen3_moe")
        batch = make_batch(3, 12, padding=True)
        balancer = attach(model, OBJECTIVES["all"])
        grads = one_step(model, batch, balancer)
        model.generate(make_batch(2, 4)["input_ids"], max_new_tokens=3, do_sample=False)
        with torch.no_grad():
            model(**batch)
        with torch.inference_mode():
            model(**batch)
        model.eval()
        model(**batch).loss.backward()
        take_grads(model)
        model.generate(make_batch(2, 4)["input_ids"], max_new_tokens=3, do_sample=False)
        assert counts(balancer) == [-1, -1]
        assert_equal(one_step(model.train(), batch, balancer), grads)

    def test_evaluation_has_plain_gradients(self) -> None:
        model, make_batch = stock_model("qwen3_moe")
        model.eval()
        batch = make_batch(3, 12, padding=True)
        grads = one_step(model, batch)
        attach(model, OBJECTIVES["all"])
        assert_equal(one_step(model, batch), grads)

    def test_frozen_model_counts_without_injection(self) -> None:
        model, make_batch = stock_model("qwen3_moe")
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)
        batch = make_batch(3, 12, padding=True)
        grads = one_step(model, batch)
        balancer = attach(model, OBJECTIVES["all"])
        model(**batch).loss.backward()
        assert counts(balancer) == [K * num_valid(batch)] * 2
        assert_equal(take_grads(model), grads)
        balancer.step()
        assert sum(balancer.metrics()["load"][0]) == pytest.approx(E)

    @pytest.mark.parametrize(
        "bias", [None, Sign.Config(), Quantile.Config()], ids=lambda b: type(b).__qualname__
    )
    def test_nan_logits(self, bias: Any) -> None:
        """A diverged model shows in its own loss, not as an error of the balancer."""
        model, make_batch = stock_model("glm4_moe")
        batch = make_batch(3, 12, padding=True)
        with torch.no_grad():
            model.model.layers[0].mlp.gate.weight[0, 0] = float("nan")
        balancer = attach(model, OBJECTIVES["all"], bias=bias, measure_every=1)
        loss = model(**batch).loss
        loss.backward()
        assert loss.isnan()
        assert counts(balancer) == [K * num_valid(batch)] * 2
        balancer.step()
        assert balancer.metrics()["maxvio"][0] >= 0


class TestStepsGoneWrong:
    def test_forgotten_step(self) -> None:
        model, make_batch = stock_model("mixtral")
        balancer = attach(model, OBJECTIVES["sequence"])
        model(**make_batch()).loss.backward()
        with pytest.raises(
            RuntimeError,
            match=r"model\.layers\.0\.mlp\.gate: training forward 2 of a step of num_microbatches=1; call "
            r"balancer\.step\(\) after each optimiser step.*accumulation=M.*start_step\(num_microbatches=M\)",
        ):
            model(**make_batch())
        # The forward that was refused has left nothing.
        balancer.step()
        model(**make_batch()).loss.backward()

    def test_more_microbatches_than_declared(self) -> None:
        model, make_batch = stock_model("mixtral")
        balancer = attach(model, OBJECTIVES["sequence"], accumulation=2)
        balancer.start_step(num_microbatches=3)
        for _ in range(3):
            model(**make_batch()).loss.backward()
        with pytest.raises(RuntimeError, match="training forward 4 of a step of num_microbatches=3"):
            model(**make_batch())
        balancer.step()
        model(**make_batch())
        model(**make_batch())
        with pytest.raises(RuntimeError, match="training forward 3 of a step of num_microbatches=2"):
            model(**make_batch())

    def test_counting_pass_too_long(self) -> None:
        model, make_batch = stock_model("mixtral")
        accumulation = Accumulation(num_microbatches=2, order="counting_pass")
        balancer = attach(model, OBJECTIVES["global"], accumulation=accumulation)
        with balancer.counting_pass():
            model(**make_batch())
            model(**make_batch())
            with pytest.raises(RuntimeError, match="counting forward 3 of a step of num_microbatches=2"):
                model(**make_batch())
        for _ in range(2):
            model(**make_batch()).loss.backward()
        with pytest.raises(RuntimeError, match="training forward 3 of a step of num_microbatches=2"):
            model(**make_batch())

    def test_fewer_microbatches_than_declared(self) -> None:
        model, make_batch = stock_model("mixtral")
        balancer = attach(model, OBJECTIVES["sequence"], accumulation=2)
        model(**make_batch()).loss.backward()
        with pytest.warns(
            UserWarning, match=r"ended after 1 of num_microbatches=2 .*start_step\(num_microbatches=1\)"
        ) as caught:
            balancer.step()
        assert caught[0].filename == __file__
        balancer.start_step(num_microbatches=1)
        model(**make_batch()).loss.backward()
        balancer.step()

    def test_step_without_forward(self) -> None:
        model, _ = stock_model("mixtral")
        balancer = attach(model, OBJECTIVES["sequence"])
        with pytest.warns(
            UserWarning, match="no training forward was counted; is the model in eval mode"
        ) as caught:
            balancer.step()
        assert caught[0].filename == __file__

    @pytest.mark.parametrize("name", ["global", "all"])
    def test_step_between_forward_and_backward(self, name: str) -> None:
        model, make_batch = stock_model("mixtral")
        balancer = attach(model, OBJECTIVES[name])
        loss = model(**make_batch()).loss
        balancer.step()
        with pytest.raises(
            RuntimeError, match=r"no forward of this step was counted; call balancer\.step\(\) after"
        ):
            loss.backward()

    def test_abandoned_step(self) -> None:
        model, make_batch = stock_model("mixtral")
        batch = make_batch(3, 12, padding=True)
        want, _ = attached_grads(model, OBJECTIVES["all"], [batch])
        balancer = attach(model, OBJECTIVES["all"])

        def fail(*args: Any) -> None:
            raise MemoryError

        handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            model(**make_batch())
        handle.remove()
        assert counts(balancer)[0] > 0
        balancer.discard_step()
        assert_equal(one_step(model, batch, balancer), want)

    def test_forwards_of_several_losses_are_microbatches(self) -> None:
        """Two forwards and one backward, as in preference training, are a step of two microbatches."""
        model, make_batch = stock_model("qwen3_moe")
        batches = [make_batch(2, 8, seed=1), make_batch(2, 8, seed=2)]
        configs = [SequenceWise.Config(coef=0.3), BatchWise.Config(coef=0.2, average_microbatches=True)]
        want = reference_grads(model, "qwen3_moe", configs, batches)
        attach(model, configs, accumulation=2)
        sum(task_loss(model, batch, 2) for batch in batches).backward()  # type: ignore[union-attr]
        assert relative_error(take_grads(model), want) < 4e-6


QUERY = {"qwen3_moe": "q_proj", "deepseek_v3": "q_b_proj"}
LORA: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["query"]},
    "router": {"target_parameters": ["gate.weight"]},
    "everything": {"target_modules": ["query"], "target_parameters": ["gate.weight", "experts.down_proj"]},
    "whole router": {"target_modules": ["query"], "modules_to_save": ["gate"]},
}


def lora_settings(family: str, where: str) -> dict[str, Any]:
    settings = dict(LORA[where])
    if "target_modules" in settings:
        settings["target_modules"] = [QUERY[family]]
    return settings


class TestAdapters:
    @pytest.mark.parametrize("attached", ["after", "before"])
    @pytest.mark.parametrize("where", LORA)
    @pytest.mark.parametrize("family", QUERY)
    def test_gradients_equal_added_losses(self, family: str, where: str, attached: str) -> None:
        model, make_batch = stock_model(family)
        batch = make_batch(3, 12, seed=1, padding=True)
        settings = lora_settings(family, where)
        stock = with_lora(copy.deepcopy(model), **settings)
        want = reference_grads(stock, family, OBJECTIVES["all"], [batch])
        if attached == "before":
            balancer = attach(model, OBJECTIVES["all"])
            if where == "whole router":
                with pytest.raises(RuntimeError, match=r"copied without its model.*attach after wrapping"):
                    with_lora(model, **settings)
                return
            wrapped = with_lora(model, **settings)
        else:
            wrapped = with_lora(model, **settings)
            balancer = attach(wrapped, OBJECTIVES["all"])
        assert balancer_of(wrapped) is balancer
        wrapped(**batch).loss.backward()
        assert counts(balancer) == [K * num_valid(batch)] * 2
        assert relative_error(take_grads(wrapped), want) < 4e-6
        trained = [name for name, gradient in want.items() if gradient.abs().max() > 0]
        assert all("lora_" in name or "modules_to_save" in name for name in trained)
        balancer.remove()
        for _, module in wrapped.named_modules():
            assert not any(name.startswith("_trimtab") for name in vars(module))
            assert not module._forward_hooks

    def test_adapters_can_be_merged(self) -> None:
        model, make_batch = stock_model("qwen3_moe")
        batch = make_batch(3, 12, seed=1, padding=True)
        wrapped = with_lora(model, target_modules=["q_proj"])
        balancer = attach(wrapped, OBJECTIVES["all"])
        merged = wrapped.merge_and_unload().requires_grad_(True)
        merged(**batch).loss.backward()
        assert counts(balancer) == [K * num_valid(batch)] * 2
        have = take_grads(merged)
        balancer.remove()
        want = reference_grads(merged, "qwen3_moe", OBJECTIVES["all"], [batch])
        assert relative_error(have, want) < 4e-6


def test_balancer_of_finds_it_in_wrappers() -> None:
    model, _ = stock_model("mixtral")
    balancer = attach(model, [])
    assert balancer_of(model) is balancer
    assert balancer_of(nn.ModuleDict({"wrapped": model})) is balancer
    assert trimtab.balancer_of(torch.compile(model, backend="eager")) is balancer  # type: ignore[arg-type]
