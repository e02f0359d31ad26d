"""attach() under torch.compile: one graph for all layers, gradients and counts as in eager."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.hf_models import REQUIRED, Batch, K
from tests.hf_reference import (
    OBJECTIVES,
    attached_grads,
    counts,
    num_valid,
    relative_error,
    stock_model,
    take_grads,
)
from trimtab import SequenceWise, attach

NUM_LAYERS = 12
# In backward of their linear attention, compiled without anything attached: "view size is not compatible".
STOCK_FAILS = {"qwen3_next", "qwen3_5_moe"}

# dynamo looks at .grad of every input of a compiled layer and filters its own warning, below pytest's filter.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def compilable_model(
    family: str, num_layers: int = NUM_LAYERS, **settings: Any
) -> tuple[Any, Callable[..., Batch]]:
    """A model whose layers compile: without a cache, and with experts that float32 can trace."""
    model, make_batch = stock_model(family, num_layers=num_layers, **settings)
    if family != "llama4":
        model.set_experts_implementation("batched_mm")
    getattr(model.config, "text_config", model.config).use_cache = False
    return model, make_batch


def compile_layers(model: Any) -> None:
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")


def ragged_masks(make_batch: Callable[..., Batch]) -> list[Batch]:
    """Three microbatches of one shape whose padding differs."""
    batches = [make_batch(3, 12, seed=seed, padding=True) for seed in (1, 2, 3)]
    batches[1]["attention_mask"][0, 5:] = 0
    batches[2]["attention_mask"][2, 1:] = 0
    return batches


def assert_same(
    have: tuple[dict[str, Tensor], list[Tensor]], want: tuple[dict[str, Tensor], list[Tensor]]
) -> None:
    assert relative_error(have[0], want[0]) < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(have[1], want[1], strict=True))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_twelve_layers_are_one_graph(family: str) -> None:
    """More layers than the compiler allows recompilations; later steps, metrics steps too, add no graph."""
    model, make_batch = compilable_model(family)
    batches = ragged_masks(make_batch)
    want = attached_grads(model, OBJECTIVES["all"], batches)
    compile_layers(model)
    assert_same(attached_grads(model, OBJECTIVES["all"], batches), want)
    assert num_graphs() == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same(attached_grads(model, OBJECTIVES["all"], batches, measure_every=1), want)
    assert num_graphs() == 1


def test_many_steps_do_not_recompile() -> None:
    model, make_batch = compilable_model("qwen3_moe")
    balancer = attach(model, OBJECTIVES["all"], measure_every=3)
    compile_layers(model)
    for step in range(6):
        batch = make_batch(3, 12, seed=step, padding=True)
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            model(**batch).loss.backward()
        assert counts(balancer) == [K * num_valid(batch)] * NUM_LAYERS
        balancer.step()
        balancer.metrics()
    assert num_graphs() == 1


# transformers 5.23 deprecates this name for one that 5.20 does not have yet.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_checkpointing_inside_compiled_layers(family: str, use_reentrant: bool) -> None:
    model, make_batch = compilable_model(family)
    batches = ragged_masks(make_batch)
    want = attached_grads(model, OBJECTIVES["all"], batches)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    compile_layers(model)
    assert_same(attached_grads(model, OBJECTIVES["all"], batches), want)
    assert num_graphs() == 1


class Checkpointed(nn.Module):
    """A layer that is compiled, and recomputed from outside."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._checkpoint_wrapped_module = layer

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        layer = self._checkpoint_wrapped_module
        return torch.utils.checkpoint.checkpoint(layer, hidden_states, use_reentrant=False, **kwargs)


def test_checkpointing_around_compiled_layers() -> None:
    """The recomputation of an earlier microbatch sees its own padding again."""
    model, make_batch = compilable_model("qwen3_moe", num_layers=2)
    batches = ragged_masks(make_batch)
    want = attached_grads(model, OBJECTIVES["all"], batches)
    compile_layers(model)
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = Checkpointed(layer)
    have, counted = attached_grads(model, OBJECTIVES["all"], batches)
    renamed = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in have.items()}
    assert_same((renamed, counted), want)


def test_shapes_may_change() -> None:
    """More sizes than the compiler allows recompilations."""
    model, make_batch = compilable_model("qwen3_moe", num_layers=2)
    shapes = [(3, 12), (2, 8), (4, 10), (5, 9), (6, 7), (7, 11), (3, 13), (8, 5), (9, 6), (2, 14), (4, 4)]
    batches = [make_batch(*shape, seed=1, padding=True) for shape in shapes]
    want = attached_grads(model, OBJECTIVES["all"], batches)
    for layer in model.model.layers:
        layer.mlp.compile(fullgraph=True, backend="aot_eager")
    assert_same(attached_grads(model, OBJECTIVES["all"], batches), want)
    # the first shape, and any shape
    assert num_graphs() == 2


def test_documents_in_compiled_layers() -> None:
    model, make_batch = compilable_model("qwen3_moe", num_layers=2)
    configs = [SequenceWise.Config(coef=0.3, unit="document")]
    batches = [make_batch(1, 12, seed=seed) for seed in (1, 2)]
    batches[0]["position_ids"] = torch.tensor([[*range(5), *range(7)]])
    batches[1]["position_ids"] = torch.tensor([[*range(2), *range(6), *range(4)]])
    want = attached_grads(model, configs, batches)
    compile_layers(model)
    assert_same(attached_grads(model, configs, batches), want)


def test_evaluation_of_compiled_layers_does_not_count() -> None:
    model, make_batch = compilable_model("qwen3_moe", num_layers=2)
    batch = make_batch(3, 12, padding=True)
    balancer = attach(model, OBJECTIVES["all"])
    compile_layers(model)
    stock = model(**batch).logits.detach()
    balancer.discard_step()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, stock)
    model.eval()
    model(**batch).loss.backward()
    assert counts(balancer) == [-1, -1]


@pytest.mark.parametrize("family", [family for family in REQUIRED if family not in STOCK_FAILS])
def test_whole_model(family: str) -> None:
    model, make_batch = compilable_model(family, num_layers=1)
    batch = make_batch(3, 12, seed=1, padding=True)
    balancer = attach(model, OBJECTIVES["all"])
    model(**batch).loss.backward()
    want = take_grads(model)
    balancer.step()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in range(2):
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            compiled(**batch).loss.backward()
        assert counts(balancer) == [K * num_valid(batch)]
        assert relative_error(take_grads(model), want) < 1e-6
        balancer.step()
    assert num_graphs() == 1


def test_attached_to_a_compiled_model() -> None:
    model, make_batch = compilable_model("qwen3_moe", num_layers=2)
    batch = make_batch(3, 12, seed=1, padding=True)
    want, _ = attached_grads(model, OBJECTIVES["all"], [batch])
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    balancer = attach(compiled, OBJECTIVES["all"])
    compiled(**batch).loss.backward()
    assert counts(balancer) == [K * num_valid(batch)] * 2
    assert relative_error(take_grads(model), want) < 1e-6


# Importing inductor makes TorchScript modules.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two MoE blocks of one graph, with the default backend."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, make_batch = compilable_model("deepseek_v3", num_layers=2)
    batches = ragged_masks(make_batch)[:2]
    want = attached_grads(model, OBJECTIVES["all"], batches)
    for layer in model.model.layers:
        layer.mlp.compile(fullgraph=True)
    have, counted = attached_grads(model, OBJECTIVES["all"], batches)
    assert relative_error(have, want[0]) < 4e-6
    assert all(torch.equal(a, b) for a, b in zip(counted, want[1], strict=True))
    assert num_graphs() == 1
