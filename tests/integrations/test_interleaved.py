"""Stock decoders by turns: a loop over the layers of several microbatches is the models' own forwards, bitwise."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import create_causal_mask

import trimtab
from tests.hf_models import Batch, tiny_model
from trimtab import Accumulation, BatchWise, DeviceLevel, GlobalBatch, SequenceWise, ZLoss

OBJECTIVES = [
    SequenceWise.Config(coef=0.1),
    BatchWise.Config(coef=0.1, average_microbatches=True),
    GlobalBatch.Config(coef=0.1, counts="exact"),
    DeviceLevel.Config(coef=0.1, num_devices=2),
    ZLoss.Config(coef=0.01),
]


def by_turns(model: Any, balancer: trimtab.Balancer, batches: list[Batch]) -> list[Tensor]:
    """Logits of each microbatch; what the model's own forward does, with its layers in another order."""
    decoder = model.model
    inputs = []
    for batch in batches:
        x = decoder.embed_tokens(batch["input_ids"])
        positions = torch.arange(x.shape[1])[None]
        mask = create_causal_mask(
            config=model.config,
            inputs_embeds=x,
            attention_mask=batch["attention_mask"],
            past_key_values=None,
            position_ids=positions,
        )
        inputs.append((x, {"attention_mask": mask, "position_embeddings": decoder.rotary_emb(x, positions)}))
    x_M = [x for x, _ in inputs]
    described = [balancer.microbatch(valid_mask=batch["attention_mask"]) for batch in batches]
    with balancer.interleaved(described) as runs:
        for layer in decoder.layers:
            x_M = [run(layer, x, **kwargs) for run, x, (_, kwargs) in zip(runs, x_M, inputs, strict=True)]
    return [model.lm_head(decoder.norm(x)) for x in x_M]


def in_turn(model: Any, balancer: trimtab.Balancer, batches: list[Batch]) -> list[Tensor]:
    return [model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits for b in batches]


def step(way: Any, family: str, checkpointing: bool | None, compiled: bool) -> Any:
    model: Any
    model, make_batch = tiny_model(family)
    batches = [make_batch(3, 10, seed=1, padding=True), make_batch(2, 12, seed=2, padding=True)]
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    if compiled:
        for layer in model.model.layers:
            layer.compile(backend="aot_eager")
    bias = trimtab.Sign.Config() if family == "deepseek_v3" else None
    order = Accumulation(num_microbatches=2, order="forward_first")
    balancer = trimtab.attach(model, OBJECTIVES, bias=bias, accumulation=order, measure_every=1)
    logits_M = way(model, balancer, batches)
    losses = [
        F.cross_entropy(logits.flatten(0, 1), batch["input_ids"].flatten())
        for logits, batch in zip(logits_M, batches, strict=True)
    ]
    torch.stack(losses).sum().backward()
    balancer.step()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return logits_M, gradients, balancer.metrics()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_stock_decoders(family: str, checkpointing: bool | None) -> None:
    want = step(in_turn, family, checkpointing, False)
    have = step(by_turns, family, checkpointing, False)
    assert all(torch.equal(*pair) for pair in zip(have[0], want[0], strict=True))
    for name, grad in want[1].items():
        assert (grad is None) == (have[1][name] is None), name
        assert grad is None or torch.equal(have[1][name], grad), name
    assert have[2] == want[2]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_compiled_and_checkpointed_layers_of_a_stock_decoder() -> None:
    torch._dynamo.reset()
    want = step(in_turn, "qwen3_moe", None, False)
    have = step(by_turns, "qwen3_moe", False, True)
    for name, grad in want[1].items():
        torch.testing.assert_close(have[1][name], grad, rtol=1e-4, atol=1e-6)
    assert have[2]["load"] == want[2]["load"]
    torch._dynamo.reset()
