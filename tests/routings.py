"""What records and replays of the toy model are compared with: its experts called one token at a time.

Shapes: T tokens, E experts, K top-k, L layers, M microbatches.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import trimtab
from tests.toy import Batch, ToyModel, batch, grads, recorded
from tests.turns import loss_of
from trimtab import Accumulation, Balancer, GlobalBatch, SequenceWise, ZLoss
from trimtab.records import WHATS, RoutingRecords
from trimtab.reference import RoutedTokens, reference_loss
from trimtab.scores import scores

E, K = 6, 2  # of the toy model
NAMES = ("blocks.0.moe.router", "blocks.1.moe.router")
SEQUENCE: list[trimtab.Objective.Config] = [SequenceWise.Config(coef=0.3), ZLoss.Config(coef=0.1)]
OBJECTIVES: list[trimtab.Objective.Config] = [*SEQUENCE, GlobalBatch.Config(coef=0.4, counts="exact")]
BATCHES = [batch(3, 6, seed=5, padded=True), batch(3, 6, seed=6, padded=True)]
TWO = Accumulation(num_microbatches=2, order="forward_first")


def random_ids(num_tokens: int, num_experts: int = E, top_k: int = K, seed: int = 0) -> Tensor:
    """(T, K) distinct experts, which no router has chosen."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices


def ids_of(batches: Sequence[Batch], num_layers: int = 2, seed: int = 0) -> list[Tensor]:
    """(L, T, K) of each microbatch."""
    return [
        torch.stack(
            [
                random_ids(one.input_ids.numel(), seed=100 * seed + 10 * m + layer)
                for layer in range(num_layers)
            ]
        )
        for m, one in enumerate(batches)
    ]


def naive_weights(router: Any, logits_TE: Tensor, ids_TK: Tensor) -> Tensor:
    c = router.config
    s_TE = {
        "softmax": logits_TE.softmax(-1),
        "sigmoid": logits_TE.sigmoid(),
        "sqrt_softplus": F.softplus(logits_TE).sqrt(),
    }[c.score]
    weights_TK = s_TE.gather(1, ids_TK)
    if c.normalize_top_k:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return weights_TK * c.scale


def naive_forward(model: ToyModel, input_ids: Tensor, ids_LTK: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output, and logits of each layer, of a model whose experts are called one token at a time."""
    x_BSD, logits = model.embed(input_ids), []
    for block, ids_TK in zip(model.blocks, ids_LTK, strict=True):
        moe, x_TD = block.moe, block.norm(x_BSD).flatten(0, 1)
        logits_TE = x_TD @ moe.router.weight.T
        weights_TK = naive_weights(moe.router, logits_TE, ids_TK)
        rows = []
        for x_D, ids_K, weights_K in zip(x_TD, ids_TK, weights_TK, strict=True):
            row: Any = 0
            for expert, weight in zip(ids_K.tolist(), weights_K, strict=True):
                gate_F, up_F = (x_D @ moe.experts.gate_up_proj[expert].T).chunk(2)
                row = row + weight * (F.silu(gate_F) * up_F) @ moe.experts.down_proj[expert].T
            rows.append(row)
        x_BSD = x_BSD + torch.stack(rows).view_as(x_BSD)
        logits.append(logits_TE)
    return model.head(x_BSD), logits


def naive_grads(
    model: ToyModel, batches: Sequence[Batch], ids_M: Sequence[Tensor], objectives: Any
) -> dict[str, Tensor]:
    """Of task losses and plainly added objectives that count the replayed experts."""
    total: Any = 0
    routed: list[list[RoutedTokens]] = [[] for _ in model.blocks]
    for one, ids_LTK in zip(batches, ids_M, strict=True):
        out, logits = naive_forward(model, one.input_ids, ids_LTK)
        total = total + loss_of(out, one)
        for layer, logits_TE in enumerate(logits):
            valid_T = one.valid_BS.reshape(-1)
            tokens = RoutedTokens(logits_TE, ids_LTK[layer], one.sequence_T, one.document_T, valid_T)
            routed[layer].append(tokens)
    for layer_tokens in routed:
        for config in objectives:
            total = total + reference_loss(config.build(), layer_tokens, model.blocks[0].moe.router.score)
    total.backward()
    return grads(model)


def counted(balancer: Balancer) -> list[list[int]]:
    """Executed assignments of the step by layer."""
    return [row.counts_AE[0].tolist() for row in balancer.ledger.settle()]


def histograms(batches: Sequence[Batch], ids_M: Sequence[Tensor]) -> list[list[int]]:
    """The same, of ids at valid tokens."""
    valid = torch.cat([one.valid_BS.reshape(-1) for one in batches])
    whole = torch.cat(list(ids_M), dim=1)
    return [ids_TK[valid].flatten().bincount(minlength=E).tolist() for ids_TK in whole]


def balancer_names(balancer: Balancer) -> list[str]:
    return [row.name for row in balancer.ledger.rows]


def routing_of(model: ToyModel, batches: Sequence[Batch]) -> list[list[dict[str, Tensor]]]:
    """By layer and forward what plain hooks on a model without a balancer see."""
    found = []
    with recorded(model) as calls:
        for one in batches:
            model(**one.call)
    for block, calls_of_layer in zip(model.blocks, calls, strict=True):
        routing = block.moe.router.routing
        layer = []
        for logits_TE, ids_TK in calls_of_layer:
            s_TE = scores(logits_TE, routing.score)
            weights_TK = s_TE.gather(1, ids_TK)
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True) * routing.scale
            layer.append({"logits": logits_TE, "scores": s_TE, "ids": ids_TK, "weights": weights_TK})
        found.append(layer)
    return found


def assert_records(records: RoutingRecords, want: Sequence[Sequence[dict[str, Tensor]]]) -> None:
    assert records.num_forwards == len(want[0])
    for name, layer in zip(records, want, strict=True):
        for record, values in zip(records[name], layer, strict=True):
            for what in WHATS:
                assert record[what].dtype == values[what].dtype
                torch.testing.assert_close(record[what], values[what].detach(), rtol=1e-12, atol=1e-14)
