"""Records and replay do not make the host wait for the device; see `tests.no_sync`."""

from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab
from tests.no_sync import unsynchronised
from tests.routings import ids_of, random_ids
from tests.test_no_sync import DEVICES, PADDED, loss_of, model_on, place
from trimtab import SequenceWise, ZLoss
from trimtab.host_copies import HostCopies
from trimtab.host_tensor import is_ready
from trimtab.records import WHATS

OBJECTIVES = [SequenceWise.Config(coef=0.3), ZLoss.Config(coef=0.1)]


class NeverThere:
    """A copy engine whose copies do not arrive."""

    device_type = "meta"

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def discard(self, num_bytes: int) -> None: ...

    def side_waits(self, device: torch.device) -> None: ...

    def copy(self, destination: Tensor, source: Tensor) -> None: ...

    def keep(self, tensor: Tensor) -> None: ...

    def record(self, device: torch.device) -> str:
        return "event"

    def is_reached(self, event: Any) -> bool:
        return False

    def wait(self, event: Any) -> None:
        raise AssertionError("somebody waits")

    def compute_waits(self, event: Any, device: torch.device) -> None: ...


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "hooks"])
@pytest.mark.parametrize("training", [True, False])
def test_recording(training: bool, fused: bool, device: str) -> None:
    model = model_on(device, score="sigmoid").train(training)
    balancer = trimtab.attach(model, OBJECTIVES, fused=fused, measure_every=0)
    call = place(PADDED.call, device)
    copies = HostCopies(NeverThere()) if device == "meta" else None
    with unsynchronised(device):
        with trimtab.record_routing(balancer, what=WHATS, copies=copies) as records:
            loss_of(model, call).backward()
        joined = records.joined("weights")
        stacked = [records.stacked(what) for what in WHATS]
    if device == "meta":
        assert not any(map(is_ready, [*stacked, *joined.values()]))


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "hooks"])
def test_replaying(fused: bool, gaps: bool, device: str) -> None:
    """Ids on the host are checked there, and copied without waiting; those on the device are not read."""
    model = model_on(device, score="sigmoid", expert_bias=True, checkpoint="nonreentrant")
    balancer = trimtab.attach(model, OBJECTIVES, fused=fused, measure_every=0)
    call = place(PADDED.call, device)
    (ids_LTK,) = ids_of([PADDED])
    if gaps:
        ids_LTK[:, 3:5] = -1
    on_device = random_ids(12).expand(2, 12, 2).to(device)
    with unsynchronised(device):
        for ids in (ids_LTK, on_device):
            with trimtab.replay_routing(balancer, ids):
                loss = loss_of(model, call)
            loss.backward()
            balancer.step()
