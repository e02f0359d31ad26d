"""Gradients of stock transformers models with plainly added losses, to compare attached ones with.

Shapes: T tokens, B sequences, S length, E experts, K top-k.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

import trimtab
from tests.hf_models import MODELS, Batch, K, tiny_model
from trimtab import (
    Accumulation,
    Balancer,
    BatchWise,
    CommunicationLevel,
    DeviceLevel,
    GlobalBatch,
    ImportanceCV,
    Objective,
    SequenceWise,
    ZLoss,
)
from trimtab.microbatch import describe
from trimtab.reference import RoutedTokens, reference_loss
from trimtab.scores import ScoreName

Gradients = dict[str, Tensor]
Configs = Sequence[Objective.Config]

OBJECTIVES: dict[str, list[Objective.Config]] = {
    "sequence": [SequenceWise.Config(coef=0.3)],
    "z": [ZLoss.Config(coef=0.05)],
    "global": [GlobalBatch.Config(coef=0.4, counts="exact")],
    "all": [
        SequenceWise.Config(coef=0.3, weighting="token", assignments="unbiased"),
        BatchWise.Config(coef=0.2, average_microbatches=True),
        GlobalBatch.Config(coef=0.4, counts="exact"),
        DeviceLevel.Config(coef=0.3, num_devices=4),
        CommunicationLevel.Config(coef=0.3, num_devices=2, max_devices_per_token=1),
        ImportanceCV.Config(coef=0.1),
        ZLoss.Config(coef=0.05),
    ],
}

# Families that compute the router in float32 whatever the model's dtype.
FLOAT32_ROUTERS = {"deepseek_v2", "deepseek_v3", "glm4_moe", "ernie4_5_moe", "granitemoe"}


def stock_model(family: str, **settings: Any) -> tuple[Any, Callable[..., Batch]]:
    """`tiny_model`, typed for the methods that transformers models have beyond `nn.Module`."""
    return tiny_model(family, **settings)


def router_modules(model: nn.Module) -> list[nn.Module]:
    """Routers that run, by class name; of those that PEFT copied, the copy."""
    names = {row[1] for row in MODELS.values()}
    return [
        module
        for path, module in model.named_modules()
        if type(module).__name__ in names and "original_module" not in path
    ]


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[list[list[tuple[Tensor, Tensor]]]]:
    """Per router and call (logits, ids) with autograd history, by plain forward hooks."""
    calls: list[list[tuple[Tensor, Tensor]]] = []
    handles = []
    for router in router_modules(model):
        record: list[tuple[Tensor, Tensor]] = []
        calls.append(record)

        def hook(module: nn.Module, args: Any, output: Any, record: Any = record) -> None:
            if type(module).__name__ == "Llama4Router":
                record.append((output[1], output[0].topk(K, dim=1).indices))
            else:
                record.append((output[0], output[2]))

        handles.append(router.register_forward_hook(hook))
    yield calls
    for handle in handles:
        handle.remove()


def num_valid(batch: Batch) -> int:
    """Tokens that count."""
    return int(batch["attention_mask"].sum())


def totals(batches: Sequence[Batch]) -> dict[str, int]:
    """What `Balancer.start_step` wants to know of ragged microbatches."""
    return {
        "num_tokens": sum(num_valid(batch) for batch in batches),
        "num_sequences": sum(int(batch["attention_mask"].any(dim=1).sum()) for batch in batches),
    }


def task_loss(model: Any, batch: Batch, num_microbatches: int = 1) -> Tensor:
    """This microbatch's share of the step's loss."""
    return model(**batch).loss / num_microbatches


def take_grads(model: nn.Module) -> Gradients:
    """Gradients by parameter name, zero where there is none, removed from the model."""
    out = {}
    for name, parameter in model.named_parameters():
        out[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        parameter.grad = None
    return out


def routed_tokens(record: Sequence[tuple[Tensor, Tensor]], batches: Sequence[Batch]) -> list[RoutedTokens]:
    """The step of one layer, as the reference losses take it."""
    routed = []
    for (logits, ids), batch in zip(record, batches, strict=True):
        B, S = batch["input_ids"].shape
        logits_TE = logits.reshape(-1, logits.shape[-1])
        if logits_TE.dtype in (torch.bfloat16, torch.float16):
            logits_TE = logits_TE.float()
        sequence_T = torch.arange(B).repeat_interleave(S)
        document_T = sequence_T
        if "position_ids" in batch:
            documents = describe(
                "document",
                active=True,
                batch_shape=(B, S),
                device=logits.device,
                position_ids=batch["position_ids"],
            )
            assert documents.group_ids_T is not None
            document_T = documents.group_ids_T
        valid_T = batch["attention_mask"].reshape(-1) > 0
        routed.append(RoutedTokens(logits_TE, ids.reshape(-1, K), sequence_T, document_T, valid_T))
    return routed


def reference_grads(model: nn.Module, family: str, configs: Configs, batches: Sequence[Batch]) -> Gradients:
    """The stock model's loss plus the naive objectives, all microbatches in one graph."""
    objectives = [config.build() for config in configs]
    score = cast(ScoreName, MODELS[family][2])
    with recorded(model) as calls:
        total = sum(task_loss(model, batch, len(batches)) for batch in batches)
    for record in calls:
        routed = routed_tokens(record, batches)
        for objective in objectives:
            total = total + reference_loss(objective, routed, score)
    total.backward()  # type: ignore[union-attr]
    return take_grads(model)


def counts(balancer: Balancer) -> list[int]:
    """Assignments counted so far, per layer; -1 where none was."""
    return [-1 if row.counts_AE is None else int(row.counts_AE[0].sum()) for row in balancer.ledger.settle()]


def attached_grads(
    model: nn.Module, configs: Configs, batches: Sequence[Batch], **settings: Any
) -> tuple[Gradients, list[Tensor]]:
    """Gradients of one step, all forwards first, and each layer's counts; nothing is left on the model."""
    accumulation = Accumulation(num_microbatches=len(batches), order="forward_first")
    balancer = trimtab.attach(model, configs, accumulation=accumulation, **settings)
    for loss in [task_loss(model, batch, len(batches)) for batch in batches]:
        loss.backward()
    counted = [row.counts_AE[0] for row in balancer.ledger.settle() if row.counts_AE is not None]
    balancer.step()
    balancer.remove()
    return take_grads(model), counted


def relative_error(have: Gradients, want: Gradients) -> float:
    """Largest error of any parameter's gradient, relative to that parameter's largest gradient entry."""
    assert have.keys() == want.keys()
    worst = 0.0
    for name in want:
        scale = want[name].abs().max().item()
        error = (have[name].double() - want[name].double()).abs().max().item()
        worst = max(worst, error / scale if scale else error)
    return worst


def with_lora(model: nn.Module, **settings: Any) -> Any:
    """The model with random LoRA adapters of rank 2; everything else is frozen."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        # peft 0.21 reads a property that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, **settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return wrapped
