"""Llama 4's sparse block against the stock one, which runs every expert on every token.

Shapes: T tokens, D model, E experts.
"""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.hf_models import D, E, K, tiny_model
from tests.hf_reference import attached_grads, relative_error, take_grads
from tests.parallel.double import double_precision
from trimtab import GlobalBatch, SequenceWise, ZLoss
from trimtab.integrations.experts import use_trimtab_experts


def block_of(model: Any) -> Any:
    return model.model.layers[0].feed_forward


def pair(dtype: torch.dtype) -> tuple[Any, Any]:
    """A stock block and a sparse one with equal, random parameters."""
    stock, _ = tiny_model("llama4", num_layers=1, dtype=dtype)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if "experts" in name:
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    sparse = copy.deepcopy(stock)
    use_trimtab_experts(sparse)
    return block_of(stock), block_of(sparse)


def run(block: Any, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x = x.clone().requires_grad_()
    y, logits = block(x)
    (y.sin().sum() + logits.square().sum()).backward()
    assert x.grad is not None
    return y.detach(), logits.detach(), {"x": x.grad, **take_grads(block)}


def largest(have: Tensor, want: Tensor) -> float:
    return float((have - want).abs().max() / want.abs().max())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_output_and_gradients_are_those_of_the_stock_block(dtype: torch.dtype, bound: float) -> None:
    stock, sparse = pair(dtype)
    x = torch.randn(3, 5, D, dtype=dtype, generator=torch.Generator().manual_seed(0))
    y, logits, grads = run(stock, x)
    y_sparse, logits_sparse, grads_sparse = run(sparse, x)
    assert y_sparse.shape == (15, D)
    assert logits_sparse.shape == (15, E)
    assert largest(y_sparse, y) < bound
    assert largest(logits_sparse, logits) < bound
    assert relative_error(grads_sparse, grads) < bound


def test_each_token_runs_through_k_experts_only() -> None:
    _, sparse = pair(torch.float64)
    rows = []
    handle = sparse.experts.act_fn.register_forward_hook(lambda m, args, out: rows.append(out.shape[0]))
    sparse(torch.randn(1, 5, D, dtype=torch.float64))
    handle.remove()
    assert rows == [5 * K]


def test_balancing_reaches_the_same_router() -> None:
    objectives = [
        SequenceWise.Config(coef=0.3),
        GlobalBatch.Config(coef=0.4, counts="exact"),
        ZLoss.Config(coef=0.1),
    ]
    stock, batch = tiny_model("llama4", dtype=torch.float64)
    sparse = copy.deepcopy(stock)
    use_trimtab_experts(sparse)
    batches = [batch(seed=3), batch(seed=4, padding=True)]
    with double_precision():
        want, counted_by_stock = attached_grads(stock, objectives, batches)
        have, counted = attached_grads(sparse, objectives, batches)
        unbalanced, _ = attached_grads(sparse, [], batches)
    assert all(torch.equal(a, b) for a, b in zip(counted, counted_by_stock, strict=True))
    assert relative_error(have, want) < 1e-10
    assert relative_error(unbalanced, want) > 1e-2


def test_only_the_forward_changes() -> None:
    stock, sparse = pair(torch.float32)
    assert isinstance(sparse, type(stock))
    assert [(n, p.shape) for n, p in sparse.named_parameters()] == [
        (n, p.shape) for n, p in stock.named_parameters()
    ]
    model, _ = tiny_model("llama4")
    other, _ = tiny_model("llama4")
    use_trimtab_experts(model)
    use_trimtab_experts(model)
    assert type(block_of(model)).__name__ == "SparseLlama4TextMoe"
    assert type(block_of(other)).__name__ == "Llama4TextMoe"


def test_it_copies_and_pickles() -> None:
    model, batch = tiny_model("llama4")
    use_trimtab_experts(model)
    tokens = batch()
    want = model(**tokens).logits
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    for one in copies:
        assert type(block_of(one)) is type(block_of(model))
        with torch.no_grad():
            block_of(one).router.weight.neg_()
        assert not torch.equal(one(**tokens).logits, want)
    assert torch.equal(model(**tokens).logits, want)


def test_it_compiles_as_one_graph() -> None:
    _, sparse = pair(torch.float64)
    torch._dynamo.reset()
    counters.clear()
    eager = copy.deepcopy(sparse)
    sparse.compile(fullgraph=True, backend="aot_eager")
    for seed in range(3):
        x = torch.randn(2, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        y, _, grads = run(eager, x)
        y_compiled, _, grads_compiled = run(sparse, x)
        assert largest(y_compiled, y) < 1e-12
        assert relative_error(grads_compiled, grads) < 1e-12
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_zero_tokens() -> None:
    _, sparse = pair(torch.float64)
    y, logits = sparse(torch.empty(0, D, dtype=torch.float64))
    assert y.shape == (0, D)
    assert logits.shape == (0, E)
