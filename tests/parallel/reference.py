"""One optimiser step on one process, as plainly as it can be written: what every plan must equal.

Shapes: B rows, S length, T tokens, E experts, K top-k, M microbatches.

A stock model in float64, all microbatches in one graph, every loss from `trimtab.reference` added to the
task loss. Nothing here knows of ranks, hooks or injection.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.hf_models import MODELS, VOCAB, K
from tests.hf_reference import Gradients, recorded, router_modules, stock_model, take_grads
from tests.parallel.cases import NO_SCHEDULE, Case, bias_rule, model_settings, objectives
from tests.parallel.double import double_precision
from trimtab import GlobalBatch
from trimtab.reference import RoutedTokens, naive_counts, reference_loss
from trimtab.scores import ScoreName

B, S = 4, 24


@dataclass(frozen=True, slots=True)
class Rows:
    """One microbatch of all ranks.

    Args:
        input_ids: (B, S) int64.
        labels: (B, S) int64 next token of the same document, -100 where there is none that counts.
        valid_mask: (B, S) bool.
        position_ids: (B, S) int64, from 0 in each document.
        document_ids: (B, S) int64, increasing over all rows.
    """

    input_ids: Tensor
    labels: Tensor
    valid_mask: Tensor
    position_ids: Tensor
    document_ids: Tensor

    @property
    def cu_seqlens(self) -> Tensor:
        """(documents + 1,) offsets of documents in the flattened rows."""
        starts = (self.position_ids.reshape(-1) == 0).nonzero()[:, 0]
        return torch.cat([starts, torch.tensor([self.position_ids.numel()])])

    def part(self, rank: int, num_ranks: int) -> "Rows":
        """The rows of one data rank."""
        parts = [getattr(self, name).chunk(num_ranks)[rank] for name in self.__slots__]
        return Rows(*parts)


@dataclass(frozen=True, slots=True)
class Step:
    """The microbatches of one step, and what they hold together."""

    microbatches: tuple[Rows, ...]

    @property
    def num_labels(self) -> int:
        """Tokens that the task loss is averaged over."""
        return sum(int((rows.labels >= 0).sum()) for rows in self.microbatches)

    @property
    def totals(self) -> dict[str, int]:
        """Valid tokens, and the sequences and documents that have one."""
        each = [(rows.valid_mask, rows.document_ids) for rows in self.microbatches]
        return {
            "num_tokens": sum(int(valid.sum()) for valid, _ in each),
            "num_sequences": sum(int(valid.any(dim=1).sum()) for valid, _ in each),
            "num_documents": sum(len(documents[valid].unique()) for valid, documents in each),
        }


@dataclass(frozen=True, slots=True)
class Expected:
    """What one process gets; layers by the name of their router.

    Args:
        loss: the task's.
        grads: gradient of every parameter.
        losses: unscaled loss by objective and layer.
        count_error: largest difference of a load fraction that a backward saw from that of the step, by layer.
        counts: (E,) assignments of the step by layer.
        bias: (E,) expert bias after the step by layer, where there is one.
        num_tokens: valid tokens of the step.
    """

    loss: float
    grads: Gradients
    losses: dict[str, dict[str, float]]
    count_error: dict[str, float]
    counts: dict[str, Tensor]
    bias: dict[str, Tensor]
    num_tokens: int


def make_step(case: Case) -> Step:
    """The step's tokens, the same for every plan."""
    generator = torch.Generator().manual_seed(7)
    microbatches = []
    for m in range(case.num_microbatches):
        ids = torch.randint(3, VOCAB, (B, S), generator=generator)
        if case.data == "full":
            lengths = [S] * B
        elif case.data == "padded":
            lengths = [S - row for row in range(B)]
        else:
            lengths = torch.randint(1, S + 1, (B,), generator=generator).tolist()
            lengths[m % B] = 0
        valid = torch.arange(S) < torch.tensor(lengths)[:, None]
        starts = torch.zeros(B, S, dtype=torch.bool)
        if case.packed:
            # Some documents are one token long, and cuts fall everywhere between ranks.
            starts = torch.randint(5, (B, S), generator=generator) == 0
        starts[:, 0] = True
        columns = torch.arange(S).expand(B, S)
        positions = columns - torch.where(starts, columns, 0).cummax(dim=1).values
        documents = starts.reshape(-1).cumsum(0).view(B, S) - 1
        labels = torch.full((B, S), -100)
        follows = valid[:, 1:] & ~starts[:, 1:]
        labels[:, :-1] = ids[:, 1:].masked_fill(~follows, -100)
        microbatches.append(Rows(ids, labels, valid, positions, documents))
    return Step(tuple(microbatches))


def build_model(family: str, num_layers: int) -> Any:
    """The model before the step; the same weights in every process."""
    default = torch.get_default_dtype()
    # Random numbers drawn as float64 would be others.
    torch.set_default_dtype(torch.float32)
    try:
        return stock_model(family, dtype=torch.float64, **model_settings(family, num_layers))[0]
    finally:
        torch.set_default_dtype(default)


def stock_arguments(model: Any, position_ids: Tensor) -> dict[str, Any]:
    """Arguments beside the tokens with which a stock model keeps documents apart.

    transformers' gpt_oss and afmoe (5.23) do not tell their masks where documents begin, so they are given masks.
    """
    if model.config.model_type not in ("gpt_oss", "afmoe"):
        return {"position_ids": position_ids}
    places = torch.arange(position_ids.shape[1])
    documents = (position_ids == 0).cumsum(1)
    causal = (documents[:, :, None] == documents[:, None]) & (places[:, None] >= places)
    near = places[:, None] - places < model.config.sliding_window
    masks = {
        kind: torch.zeros(allowed.shape, dtype=model.dtype).masked_fill(
            ~allowed, torch.finfo(model.dtype).min
        )[:, None]
        for kind, allowed in (("full_attention", causal), ("sliding_attention", causal & near))
    }
    return {"position_ids": position_ids, "attention_mask": masks}


def forward(model: Any, rows: Rows) -> Tensor:
    """(B, S, vocabulary) logits. Without a cache, which would keep transformers from telling documents apart."""
    arguments = stock_arguments(model, rows.position_ids)
    logits: Tensor = model(input_ids=rows.input_ids, use_cache=False, **arguments).logits
    return logits


def task_loss(logits: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    """These tokens' share of the step's cross entropy."""
    return F.cross_entropy(logits.flatten(0, 1), labels.reshape(-1), reduction="sum") / num_labels


def expected(case: Case, seen: Mapping[str, Sequence[int]]) -> Expected:
    """The step of a case on one process.

    Args:
        case: its plan, schedule and checkpointing have no influence.
        seen: by layer, for each microbatch how many forwards of the step had run before its backward. Read
            only for the global-batch loss, where a schedule does not let it see all.
    """
    if case.exact_counts or case.losses not in ("global", "all"):
        seen = {}
    # One case for all that must agree. Stages decide the number of layers, the schedule whether counts are exact.
    plan = "pp" if case.degrees.pp > 1 else "fsdp"
    schedule = case.schedule if case.schedule in (NO_SCHEDULE, "GPipe") else "1F1B"
    plain = replace(case, plan=plan, schedule=schedule, checkpointing=False)
    with double_precision():
        return _expected(plain, tuple(sorted((name, tuple(each)) for name, each in seen.items())))


@cache
def _expected(case: Case, seen_of_layers: tuple[tuple[str, tuple[int, ...]], ...]) -> Expected:
    seen = dict(seen_of_layers)
    step, model = make_step(case), build_model(case.family, case.num_layers)
    paths = {id(module): name for name, module in model.named_modules()}
    names = [paths[id(router)] for router in router_modules(model)]
    score = cast(ScoreName, MODELS[case.family][2])
    total = torch.zeros(())
    with recorded(model) as calls:
        for rows in step.microbatches:
            logits = forward(model, rows)
            total = total + task_loss(logits, rows.labels, step.num_labels)
    loss = total.item()
    losses: dict[str, dict[str, float]] = {}
    counts, count_error = {}, {}
    for name, record in zip(names, calls, strict=True):
        routed = [
            RoutedTokens(
                logits_TE.reshape(-1, logits_TE.shape[-1]),
                ids.reshape(-1, K),
                torch.arange(B).repeat_interleave(S),
                rows.document_ids.reshape(-1),
                rows.valid_mask.reshape(-1),
            )
            for (logits_TE, ids), rows in zip(record, step.microbatches, strict=True)
        ]
        each = [naive_counts(r.ids_TK[r.valid_T], r.logits_TE.shape[1]) for r in routed]
        counts[name] = torch.stack(each).sum(dim=0)
        final_E = _load(each, routed)
        load = [_load(each[:n], routed[:n]) for n in seen.get(name, [len(each)] * len(each))]
        count_error[name] = max((load_E - final_E).abs().max().item() for load_E in load)
        for config in objectives(case):
            objective = config.build()
            final = reference_loss(objective, routed, score)
            losses.setdefault(objective.name, {})[name] = final.item() / objective.coef
            if isinstance(objective, GlobalBatch):
                final = reference_loss(objective, routed, score, load)
            total = total + final
    total.backward()  # type: ignore[no-untyped-call]
    bias = _next_bias(case, model, counts)
    return Expected(loss, take_grads(model), losses, count_error, counts, bias, step.totals["num_tokens"])


def _load(counts: list[Tensor], routed: list[RoutedTokens]) -> Tensor:
    """(E,) load fraction of some microbatches together."""
    counts_E = torch.stack(counts).sum(dim=0)
    num_tokens = sum(int(r.valid_T.sum()) for r in routed)
    return counts_E.to(torch.float64) * len(counts_E) / (K * num_tokens)


def _next_bias(case: Case, model: Any, counts: dict[str, Tensor]) -> dict[str, Tensor]:
    """b + speed * sign(mean count - count)."""
    rule = bias_rule(case)
    if rule is None:
        return {}
    out = {}
    for name, counts_E in counts.items():
        excess_E = counts_E.to(torch.float64) - counts_E.to(torch.float64).mean()
        out[name] = model.get_submodule(name).e_score_correction_bias - rule.speed * excess_E.sign()
    return out
