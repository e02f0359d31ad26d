"""Balancing never waits for the device in a training step; and the guard that says so sees every kind of wait.

On "meta" the guard of `tests.no_sync` looks at each operator; on "cuda", where there is one, PyTorch's own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab
from tests.hf_models import tiny_model
from tests.no_sync import HostWaitError, SyncGuard, place, simulated, unsynchronised
from tests.toy import Batch, batch, toy_model
from trimtab import (
    Accumulation,
    Balancer,
    BatchWise,
    CommunicationLevel,
    DeviceLevel,
    GlobalBatch,
    GradReduction,
    ImportanceCV,
    SequenceWise,
    ZLoss,
    ops,
)
from trimtab.ledger import Ledger
from trimtab.scores import ScoreName

DEVICES = [
    "meta",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ),
]
OBJECTIVES = {
    "sequence": SequenceWise.Config(coef=0.1),
    "sequence by token": SequenceWise.Config(coef=0.1, weighting="token", assignments="unbiased"),
    "document": SequenceWise.Config(coef=0.1, unit="document"),
    "batch": BatchWise.Config(coef=0.1, average_microbatches=True),
    "batch, local": BatchWise.Config(coef=0.1, average_microbatches=True, local=True),
    "prior": GlobalBatch.Config(coef=0.1, counts="prior"),
    "running": GlobalBatch.Config(coef=0.1, counts="running"),
    "previous": GlobalBatch.Config(coef=0.1, counts="previous", assignments="unbiased"),
    "importance": ImportanceCV.Config(coef=0.1),
    "device": DeviceLevel.Config(coef=0.1, num_devices=2),
    "communication": CommunicationLevel.Config(coef=0.1, num_devices=2, max_devices_per_token=1),
    "z": ZLoss.Config(coef=0.1),
}
ALL = [
    *(OBJECTIVES[n] for n in ("sequence", "document", "batch", "prior", "importance", "communication", "z")),
]
RULES = {
    "sign": trimtab.Sign.Config(),
    "centred": trimtab.CentredSign.Config(),
    "proportional": trimtab.Proportional.Config(),
    "momentum": trimtab.Momentum.Config(),
    "quantile": trimtab.Quantile.Config(num_bins=16),
}
BATCHES = {
    "whole": batch(2, 6, seed=0),
    "padded": batch(2, 6, seed=1, padded=True),
    "packed": batch(2, 6, seed=2, packed="cu_seqlens"),
    "padded and packed": batch(2, 6, seed=3, padded=True, packed="cu_seqlens"),
}
PADDED = BATCHES["padded and packed"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def model_on(device: str, num_layers: int = 2, **settings: Any) -> nn.Module:
    """A toy model in bfloat16, in which experts have native kernels, with float32 routers."""
    settings = {"dtype": torch.float32, **settings}
    return toy_model(num_layers=num_layers, **settings).to(torch.bfloat16).to(device)


def loss_of(model: nn.Module, call: dict[str, Tensor]) -> Tensor:
    logits = model(**call)
    return F.cross_entropy(logits.flatten(0, 1), call["input_ids"].flatten())


def run_steps(
    model: nn.Module, balancer: Balancer, batches: Sequence[Batch], device: str, *, eager: bool = True
) -> None:
    """Two steps, the second of which knows the first; nothing may wait."""
    calls = [place(one.call, device) for one in batches]
    order = balancer.accumulation.order
    with unsynchronised(device, eager=eager):
        for _ in range(2):
            if order == "counting_pass":
                with balancer.counting_pass():
                    for call in calls:
                        model(**call)
            if order == "forward_first":
                torch.stack([loss_of(model, call) for call in calls]).sum().backward()
            else:
                for call in calls:
                    loss_of(model, call).backward()
            balancer.step()


# -------------------------------------------------------------------- balancing does not wait


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "hooks"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(name: str, fused: bool, device: str) -> None:
    model = model_on(device, num_layers=1)
    balancer = trimtab.attach(model, [OBJECTIVES[name]], accumulation=2, fused=fused, measure_every=0)
    run_steps(model, balancer, [PADDED] * 2, device)


@pytest.mark.parametrize("keep", ["input", "logits", "host"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "hooks"])
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "operators"])
def test_all_together(eager: bool, fused: bool, keep: Any, device: str) -> None:
    """A step that is not measured, and one that is."""
    model = model_on(device, score="sigmoid", expert_bias=True)
    balancer = trimtab.attach(
        model, ALL, bias=RULES["sign"], accumulation=2, fused=fused, keep=keep, measure_every=2
    )
    run_steps(model, balancer, [PADDED] * 2, device, eager=eager)


@pytest.mark.parametrize("name", RULES)
def test_bias_rules(name: str, device: str) -> None:
    model = model_on(device, num_layers=1, score="sigmoid", expert_bias=True)
    run_steps(model, trimtab.attach(model, [], bias=RULES[name]), [PADDED], device)


@pytest.mark.parametrize("name", BATCHES)
def test_what_the_tokens_are(name: str, device: str) -> None:
    model = model_on(device)
    run_steps(model, trimtab.attach(model, ALL), [BATCHES[name]], device)


@pytest.mark.parametrize("order", ["alternating", "forward_first", "counting_pass"])
def test_orders_of_a_step(order: Any, device: str) -> None:
    model = model_on(device, score="sigmoid", expert_bias=True)
    plan = Accumulation(num_microbatches=3, order=order)
    balancer = trimtab.attach(model, ALL, bias=RULES["quantile"], accumulation=plan, measure_every=1)
    run_steps(model, balancer, [PADDED] * 3, device)


@pytest.mark.parametrize("mode", ["non-reentrant", "reentrant", "selective"])
def test_checkpointing(mode: str, device: str) -> None:
    model = model_on(device, checkpoint=mode)
    run_steps(model, trimtab.attach(model, ALL, accumulation=2, measure_every=1), [PADDED] * 2, device)


def test_totals_and_loss_scale(device: str) -> None:
    model = model_on(device)
    balancer = trimtab.attach(
        model, ALL, accumulation=2, reduction=GradReduction(microbatches="mean"), measure_every=1
    )
    call = place(PADDED.call, device)
    with unsynchronised(device):
        balancer.start_step(num_tokens=10, num_sequences=4, num_documents=6)
        for _ in range(2):
            (balancer.follow(loss_of(model, call)) / 2).backward()
        balancer.step()


def test_returned_losses(device: str) -> None:
    model = model_on(device)
    plan = Accumulation(num_microbatches=2, order="forward_first")
    balancer = trimtab.attach(model, ALL, accumulation=plan, losses="returned")
    call = place(PADDED.call, device)
    with unsynchronised(device):
        for _ in range(2):
            loss = torch.stack([loss_of(model, call) for _ in range(2)]).sum()
            losses = balancer.finalize()
            (loss + losses.balance_loss + losses.z_loss).backward()
            balancer.step()


@pytest.mark.parametrize("documents", ["cu_seqlens", "position_ids"])
def test_described_microbatches(documents: str, device: str) -> None:
    """As one forward, by turns, and with this rank's tokens alone."""
    model = model_on(device)
    balancer = trimtab.attach(
        model, ALL, accumulation=Accumulation(num_microbatches=2, order="forward_first"), measure_every=1
    )
    one = place(batch(2, 6, seed=0, padded=True, packed=documents).call, device)
    input_ids, mask = one.pop("input_ids"), one.pop("attention_mask")
    if documents == "position_ids":
        one["num_documents"] = 12
    with unsynchronised(device):
        pair = [balancer.microbatch(valid_mask=mask, **one) for _ in range(2)]
        with balancer.concatenated(pair):
            loss = model(torch.cat([input_ids] * 2)).sum()
        loss.backward()
        balancer.step()
        with balancer.interleaved(pair) as runs:
            x_M = [run(model.embed, input_ids) for run in runs]
            for block in model.blocks:
                x_M = [run(block, x) for run, x in zip(runs, x_M, strict=True)]
        torch.stack(x_M).sum().backward()
        balancer.step()
        tokens_T = torch.arange(6, device=device)
        losses = []
        for _ in range(2):
            with balancer.microbatch(valid_mask=mask, tokens=tokens_T, **one):
                losses.append(model(input_ids[:1]).sum())
        torch.stack(losses).sum().backward()
        balancer.step()


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_routers(score: ScoreName, device: str) -> None:
    """Every way to choose and weigh."""
    settings = dict(score=score, expert_bias=True, linear_bias=True, num_groups=3, top_k_groups=2)
    for extra in ({}, {"input_jitter": 0.1}, {"forced_balance": True}):
        model = model_on(device, num_layers=1, **settings, **extra)
        run_steps(model, trimtab.attach(model, ALL), [PADDED], device)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_stock_models(family: str, device: str) -> None:
    model, make_batch = tiny_model(family, dtype=torch.bfloat16)
    for module in model.modules():
        bias_E = getattr(module, "e_score_correction_bias", None)
        if bias_E is not None:
            module.e_score_correction_bias = bias_E.float()
    model = model.to(device)
    rule = RULES["sign"] if family == "deepseek_v3" else None
    balancer = trimtab.attach(model, ALL, bias=rule, accumulation=2, measure_every=1)
    given = place(make_batch(padding=True), device)
    with unsynchronised(device):
        for _ in range(2):
            for _ in range(2):
                model(**given, use_cache=False).loss.backward()
            balancer.step()


def test_restored_state(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step after resuming copies what was saved once, when it is loaded."""
    # The device that stands for one here is otherwise a place where nothing can be kept.
    monkeypatch.setattr(trimtab.layer, "_device_of", lambda layer: torch.device(device))
    model = model_on(device, score="sigmoid", expert_bias=True)
    settings = dict(bias=RULES["momentum"], accumulation=2, measure_every=1)
    balancer = trimtab.attach(model, ALL, **settings)
    run_steps(model, balancer, [PADDED] * 2, device)
    # What is saved waits; only its place matters here, which is the host.
    with simulated(), SyncGuard(raises=False):
        state = balancer.state_dict()
    balancer.load_state_dict(state)
    run_steps(model, balancer, [PADDED] * 2, device)


def test_documents_by_position_are_counted_on_the_device() -> None:
    """The one wait that is documented, and the way around it."""
    model = model_on("meta")
    trimtab.attach(model, [OBJECTIVES["document"]])
    call = place(batch(2, 6, seed=0, packed="position_ids").call, "meta")
    with simulated(), SyncGuard(raises=False) as guard:
        loss_of(model, call).backward()
    assert list(guard.waits) == ["trimtab/microbatch.py _most_documents: _local_scalar_dense"]
    assert guard.waits.total() == 1


def test_numbers_are_read_when_they_are_asked_for() -> None:
    """For the log and for checkpoints, not in a step."""
    model = model_on("meta", score="sigmoid", expert_bias=True)
    balancer = trimtab.attach(model, ALL, bias=RULES["sign"], measure_every=1)
    run_steps(model, balancer, [PADDED], "meta")
    for read, file in ((balancer.metrics, "trimtab/metrics.py"), (balancer.state_dict, "trimtab/layer.py")):
        with simulated(), SyncGuard(raises=False) as guard:
            read()
        assert {wait.partition(" ")[0] for wait in guard.waits} == {file}


# -------------------------------------------------------------------- the guard

ROWS = torch.ones(4, 3, device="meta")
IDS = torch.ones(4, dtype=torch.int64, device="meta")
MASK = torch.ones(4, dtype=torch.bool, device="meta")
HOST = torch.tensor([0, 1, 2, 3])


def assign(target: Tensor, place: Any, value: Any) -> None:
    target[place] = value


WAITS: dict[str, Callable[[], Any]] = {
    "item": lambda: ROWS.sum().item(),
    "int": lambda: int(IDS[0]),
    "float": lambda: float(ROWS.sum()),
    "if": lambda: 1 if MASK.any() else 0,
    "range": lambda: range(IDS[0]),
    "max of a tensor": lambda: max(IDS),
    "tolist": lambda: IDS.tolist(),
    "cpu": lambda: IDS.cpu(),
    "to the host": lambda: ROWS.to("cpu", torch.float64),
    "copied to the host": lambda: torch.ones(4, 3).copy_(ROWS),
    "numpy": lambda: ROWS.numpy(),
    "shown": lambda: f"{ROWS.sum()}",
    "repr": lambda: repr(ROWS),
    "nonzero": lambda: MASK.nonzero(),
    "where": lambda: torch.where(MASK),
    "mask": lambda: ROWS[MASK],
    "mask assigned": lambda: assign(ROWS, MASK, ROWS[0]),
    "masked_select": lambda: ROWS.masked_select(MASK[:, None]),
    "unique": lambda: IDS.unique(),
    "unique rows": lambda: ROWS.unique(dim=0),
    "unique_consecutive": lambda: IDS.unique_consecutive(),
    "equal": lambda: torch.equal(IDS, IDS),
    "allclose": lambda: torch.allclose(ROWS, ROWS),
    "repeat_interleave": lambda: ROWS.repeat_interleave(IDS, dim=0),
    "bincount": lambda: IDS.bincount(),
    "histc": lambda: ROWS.histc(4),
    "one_hot": lambda: F.one_hot(IDS),
    "split by a tensor": lambda: ROWS.split(IDS.tolist()),
    "arange": lambda: torch.arange(IDS[0]),
    "inverse": lambda: torch.linalg.inv(ROWS[:3]),
    "tensor": lambda: torch.tensor([1, 2], device="meta"),
    "as_tensor": lambda: torch.as_tensor([1, 2], device="meta"),
    "new_tensor": lambda: ROWS.new_tensor([1.0]),
    "from the host": lambda: HOST.to("meta"),
    "copied from the host": lambda: IDS.copy_(HOST),
    "indices of the host": lambda: ROWS[HOST],
    "list of indices": lambda: ROWS[[0, 1]],
    "list of places assigned": lambda: assign(ROWS, [0, 1], ROWS[:2]),
    "number assigned": lambda: assign(ROWS, IDS, 1.0),
    "where with a number of the host": lambda: torch.where(MASK, IDS, torch.tensor(1)),
}
NO_WAITS: dict[str, Callable[[], Any]] = {
    "number of the host": lambda: int(HOST[0]),
    "list of the host": lambda: HOST.tolist(),
    "mask of the host": lambda: HOST[HOST > 1],
    "tensor of the host": lambda: torch.tensor([1, 2]),
    "indices": lambda: ROWS[IDS],
    "rows assigned": lambda: assign(ROWS, IDS, ROWS),
    "slice assigned": lambda: assign(ROWS, (slice(None), slice(0, 1)), 1.0),
    "index_fill": lambda: ROWS.index_fill_(0, IDS, 1.0),
    "where with a number": lambda: torch.where(ROWS > 0, ROWS, 1.0),
    "full": lambda: ROWS.new_full((), 3),
    "cast": lambda: ROWS.to("meta", torch.float64),
    "repeat_interleave": lambda: ROWS.repeat_interleave(2, dim=0),
    "repeat_interleave of known size": lambda: ROWS.repeat_interleave(IDS, dim=0, output_size=4),
    "copy that is not waited for": lambda: HOST.to("meta", non_blocking=True),
    "number of the host in arithmetic": lambda: ROWS * torch.tensor(2.0),
    "length": lambda: len(ROWS),
}


@pytest.mark.parametrize("kind", WAITS)
def test_guard_sees(kind: str) -> None:
    with simulated(), SyncGuard(), pytest.raises(HostWaitError, match=r"tests/test_no_sync\.py:\d+: "):
        WAITS[kind]()


@pytest.mark.parametrize("kind", NO_WAITS)
def test_guard_lets_pass(kind: str) -> None:
    with simulated(), SyncGuard():
        NO_WAITS[kind]()


@pytest.mark.parametrize(
    "what",
    [
        lambda x: int(x.sum()),
        lambda x: x.cpu(),
        lambda x: torch.ones(()).to(x),
        lambda x: x[x > 0],
        lambda x: torch.tensor([1], device=x.device),
    ],
    ids=["int", "cpu", "from the host", "mask", "tensor"],
)
@pytest.mark.parametrize("inside", ["count", "read"])
def test_guard_sees_inside_operators(
    inside: str, what: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled layers reach the ledger through operators, which run with the guard as well."""
    model = model_on("meta", num_layers=1)
    balancer = trimtab.attach(model, ALL)
    state = model.blocks[0].moe.router._trimtab_router
    ticket = torch.ones((), dtype=torch.int64)
    num_tokens_G = torch.full((1,), 4, device="meta")
    logits_TE, ids_TK = torch.ones(4, 6, device="meta"), torch.ones(4, 2, dtype=torch.int64, device="meta")

    def run() -> None:
        counts_AGE, _ = ops.observe(
            state.handle,
            ticket,
            logits_TE,
            ids_TK,
            None,
            None,
            None,
            num_tokens_G,
            None,
            0,
            state.num_maps,
        )
        sums_GE = torch.ones(1, 6, device="meta")
        ops.bind(sums_GE, state.handle, ticket, counts_AGE, num_tokens_G, None, 0, sums_GE, torch.float32)

    with simulated(), SyncGuard():
        run()
    balancer.discard_step()
    name = {"count": "observe", "read": "bind"}[inside]
    plain = getattr(Ledger, name)

    def reads(*args: Any, **kwargs: Any) -> Any:
        result = plain(*args, **kwargs)
        what(result if inside == "count" else result[0])
        return result

    monkeypatch.setattr(Ledger, name, reads)
    with simulated(), SyncGuard(), pytest.raises(HostWaitError, match=r"tests/test_no_sync\.py"):
        run()
