"""A small float64 MoE language model, and the oracle that balanced gradients are compared with."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from trimtab.experts import Experts
from trimtab.losses import Objective
from trimtab.microbatch import describe
from trimtab.moe import MoE
from trimtab.reference import RoutedTokens, reference_loss
from trimtab.router import Router
from trimtab.scores import ScoreName

VOCAB = 17


class ToyBlock(nn.Module):
    def __init__(self, moe: MoE.Config) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(moe.router.dim)
        self.moe = moe.build()

    def forward(self, x_BSD: Tensor) -> Tensor:
        return x_BSD + self.moe(self.norm(x_BSD))


class ToyModel(nn.Module):
    """Embedding, MoE blocks, head; tokens do not see each other."""

    def __init__(self, num_layers: int = 2, checkpoint: str | None = None, **router: Any) -> None:
        super().__init__()
        settings: dict[str, Any] = dict(
            dim=8, num_experts=6, top_k=2, score="softmax", normalize_top_k=True, dtype=torch.float64
        )
        settings.update(router)
        experts = Experts.Config(dim=8, hidden_dim=8, num_experts=settings["num_experts"])
        moe = MoE.Config(router=Router.Config(**settings), experts=experts)
        self.embed = nn.Embedding(VOCAB, 8)
        self.blocks = nn.ModuleList(ToyBlock(moe) for _ in range(num_layers))
        self.head = nn.Linear(8, VOCAB)
        self.checkpoint = checkpoint

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        x_BSD = self.embed(input_ids)
        for block in self.blocks:
            x_BSD = self.run(block, x_BSD)
        return self.head(x_BSD)

    def run(self, block: nn.Module, x_BSD: Tensor) -> Tensor:
        if self.checkpoint is None:
            return block(x_BSD)
        if self.checkpoint == "selective":
            context = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
            return checkpoint(block, x_BSD, use_reentrant=False, context_fn=context)
        return checkpoint(block, x_BSD, use_reentrant=self.checkpoint == "reentrant")


def toy_model(seed: int = 0, **settings: Any) -> ToyModel:
    """A float64 toy model with random routing and, where it has one, a random expert bias."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ToyModel(**settings).double()
        for block in model.blocks:
            router = block.moe.router
            nn.init.normal_(router.weight, std=1.0)
            if router.expert_bias_E is not None:
                nn.init.normal_(router.expert_bias_E, std=0.1)
            for parameter in block.moe.experts.parameters():
                nn.init.normal_(parameter, std=0.3)
    return model.train()


@dataclass
class Batch:
    """One microbatch and what its tokens are."""

    input_ids: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def call(self) -> dict[str, Tensor]:
        fields = ("input_ids", "attention_mask", "position_ids", "cu_seqlens")
        return {name: getattr(self, name) for name in fields if getattr(self, name) is not None}

    @property
    def valid_BS(self) -> Tensor:
        if self.attention_mask is None:
            return torch.ones_like(self.input_ids, dtype=torch.bool)
        return self.attention_mask.bool()

    @property
    def num_tokens(self) -> int:
        return int(self.valid_BS.sum())

    @property
    def num_sequences(self) -> int:
        return int(self.valid_BS.any(dim=1).sum())

    @property
    def document_T(self) -> Tensor:
        given = self.cu_seqlens is not None or self.position_ids is not None
        described = describe(
            "document" if given else "sequence",
            active=True,
            batch_shape=tuple(self.input_ids.shape),
            device=self.input_ids.device,
            cu_seqlens=self.cu_seqlens,
            position_ids=self.position_ids,
        )
        return described.group_ids_T if given else self.sequence_T

    @property
    def sequence_T(self) -> Tensor:
        B, S = self.input_ids.shape
        return torch.arange(B).repeat_interleave(S)

    @property
    def num_documents(self) -> int:
        return len(self.document_T[self.valid_BS.reshape(-1)].unique())


def batch(B: int, S: int, seed: int, padded: bool = False, packed: str | None = None) -> Batch:
    """Random tokens; ``padded`` cuts rows to random lengths, ``packed`` cuts them into documents."""
    generator = torch.Generator().manual_seed(seed)
    made = Batch(torch.randint(VOCAB, (B, S), generator=generator))
    if padded:
        lengths = torch.randint(1, S + 1, (B, 1), generator=generator)
        made.attention_mask = (torch.arange(S) < lengths).long()
    if packed:
        starts_BS = torch.rand(B, S, generator=generator) < 0.3
        starts_BS[:, 0] = True
        places = torch.where(starts_BS, torch.arange(S), 0).cummax(dim=1).values
        if packed == "position_ids":
            made.position_ids = torch.arange(S) - places
        else:
            offsets = starts_BS.reshape(-1).nonzero().squeeze(1)
            made.cu_seqlens = torch.cat([offsets, torch.tensor([B * S])]).int()
    return made


def task_loss(model: nn.Module, one: Batch) -> Tensor:
    """Sum over valid tokens of the cross entropy with the token itself."""
    logits = model(**one.call)
    loss_BS = F.cross_entropy(logits.flatten(0, 1), one.input_ids.flatten(), reduction="none")
    return loss_BS[one.valid_BS.flatten()].sum() / 10


def grads(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name, removed from the model."""
    out = {}
    for name, parameter in model.named_parameters():
        out[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        parameter.grad = None
    return out


@contextlib.contextmanager
def recorded(model: ToyModel) -> Any:
    """Records (logits, ids) of each router call, per layer, with autograd history."""
    calls: list[list[tuple[Tensor, Tensor]]] = [[] for _ in model.blocks]
    handles = []
    for record, block in zip(calls, model.blocks, strict=True):

        def hook(module: Any, args: Any, output: Any, record: Any = record) -> None:
            record.append((output[0], output[2]))

        handles.append(block.moe.router.register_forward_hook(hook))
    yield calls
    for handle in handles:
        handle.remove()


def reference_grads(
    model: ToyModel,
    objectives: Sequence[Objective],
    batches: Sequence[Batch],
    score: ScoreName,
    step_load: Sequence[Sequence[Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Gradients of the task loss plus the naive objectives, all microbatches in one graph."""
    plain, model.checkpoint = model.checkpoint, None
    with recorded(model) as calls:
        total = sum(task_loss(model, one) for one in batches)
    for layer, record in enumerate(calls):
        routed = [
            RoutedTokens(logits, ids, one.sequence_T, one.document_T, one.valid_BS.reshape(-1))
            for (logits, ids), one in zip(record, batches, strict=True)
        ]
        load = None if step_load is None else step_load[layer]
        for objective in objectives:
            total = total + reference_loss(objective, routed, score, load)
    total.backward()
    model.checkpoint = plain
    return grads(model)


def assert_grads_equal(have: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 1e-10) -> None:
    """Every parameter's gradient to ``rtol`` of the largest entry of that parameter's gradient."""
    assert have.keys() == want.keys()
    for name in want:
        scale = want[name].abs().max().item()
        error = (have[name] - want[name]).abs().max().item()
        assert error <= rtol * max(scale, 1e-3), f"{name}: error {error:.3e} at scale {scale:.3e}"
