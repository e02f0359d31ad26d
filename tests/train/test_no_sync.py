"""Where the host waits for the device in a step of the trainer: the whole list.

It is found on a device without values (`tests.no_sync`). Waits of several ranks are not in it: those for the row
counts of experts on other ranks are in `trimtab.parallel.dispatch`.
"""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from tests.no_sync import DEVICE, HostWaitError, SyncGuard, simulated
from tests.train.tiny import build, tiny
from trimtab import GlobalBatch, Quantile, SequenceWise, ZLoss
from trimtab.models.deepseek_v3 import deepseek_v3_tiny
from trimtab.models.gpt_oss import gpt_oss_debugmodel
from trimtab.models.qwen3_5 import qwen3_5_debugmodel_text
from trimtab.models.qwen3_vl import qwen3_vl_debugmodel
from trimtab.train import trainer as trainer_module
from trimtab.train.compute import ActivationCheckpointConfig
from trimtab.train.model import Balancing
from trimtab.train.mtp import MtpConfig
from trimtab.train.packing import TokenBatch

BALANCING = Balancing(
    objectives=(
        SequenceWise.Config(coef=1e-3, unit="document"),
        GlobalBatch.Config(coef=1e-2),
        ZLoss.Config(coef=1e-3),
    ),
    bias=Quantile.Config(num_bins=16),
)
TWO = {"training": {"steps": 6, "global_batch_size": 8}}
MODEL = deepseek_v3_tiny().model
CASES: dict[str, dict[str, Any]] = {
    "one microbatch": {},
    "two microbatches": TWO,
    "counting pass": {**TWO, "balancing": replace(BALANCING, order="counting_pass")},
    "forward first": {**TWO, "balancing": replace(BALANCING, order="forward_first")},
    "checkpointing": {"activation_checkpoint": ActivationCheckpointConfig(mode="full")},
    "selective checkpointing": {"activation_checkpoint": ActivationCheckpointConfig(mode="selective")},
    "multi-token prediction": {"model": replace(MODEL, mtp=MtpConfig())},
    "padded rows": {"data": {"packing": False}},
}

# One in each step: an update with a bad gradient could not be taken back.
AGREEMENT = "trimtab/train/trainer.py _agree: _to_copy"
# transformers asks in each forward whether rows hold several documents. It would do so without balancing.
STOCK = "masking_utils.py find_packed_sequence_indices: _local_scalar_dense"
# Once in a run, the masks of the model are tried out on the host.
TRIAL = "modeling_deepseek_v3.py forward: _to_copy"
# Forwards of a step; further layers of multi-token prediction make masks of their own.
NUM_MASKS = {"two microbatches": 2, "forward first": 2, "counting pass": 4, "multi-token prediction": 2}


@pytest.fixture
def on_device(monkeypatch):
    """A function from configurations to trainers on the device that has no values."""
    monkeypatch.setattr(trainer_module, "find_device", lambda _: torch.device(DEVICE))
    return build


@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_once(name, tmp_path, on_device):
    trainer = on_device(tiny(tmp_path, **{"balancing": BALANCING, **CASES[name]}))
    expected = {STOCK: NUM_MASKS.get(name, 1), AGREEMENT: 1}
    for trial in ({TRIAL: 1}, {}):
        with simulated(), SyncGuard(raises=False) as guard:
            trainer._train_step()
        trainer.step += 1
        assert guard.waits == trial | expected


def test_masks_of_two_kinds_of_layers(tmp_path, on_device):
    """Of gpt-oss, which the trainer gives its masks."""
    trainer = on_device(replace(gpt_oss_debugmodel(), dump_folder=str(tmp_path)))
    with simulated():
        with SyncGuard(raises=False):
            trainer._train_step()
        with SyncGuard(raises=False) as guard:
            trainer._train_step()
    assert guard.waits == {STOCK: 2 * trainer.engine.run.num_microbatches, AGREEMENT: 1}


@pytest.mark.parametrize(
    ("config", "place"),
    [
        (qwen3_5_debugmodel_text, "integrations/linear_attention.py"),
        (qwen3_vl_debugmodel, "transformers/vision_utils.py"),
    ],
    ids=["linear attention", "vision tower"],
)
def test_models_that_wait_elsewhere(config, place, tmp_path, on_device):
    """Where documents are told apart for linear attention, and in transformers' vision towers."""
    trainer = on_device(replace(config(), dump_folder=str(tmp_path)))
    with simulated(), SyncGuard(raises=False) as guard, pytest.raises(HostWaitError, match=place):
        trainer._train_step()
    own = [wait for wait in guard.waits if wait.startswith("trimtab/")]
    assert all(place in wait for wait in own)


def test_an_evaluation_waits_at_its_end(tmp_path, on_device):
    trainer = on_device(tiny(tmp_path, balancing=BALANCING, validation={"enable": True}))
    with simulated(), SyncGuard(raises=False) as guard:
        trainer.evaluate()
    own = [wait for wait in guard.waits if wait.startswith("trimtab/")]
    assert {wait.partition(" ")[0] for wait in own} == {"trimtab/train/evaluation.py"}
    assert not any("__call__" in wait for wait in own)  # of what counts each forward


def test_batches_for_a_gpu_are_pinned(tmp_path, monkeypatch):
    """Every tensor: one from other memory would make the copy of the batch wait."""
    batch = next(build(tiny(tmp_path)).loader)
    pinned, sent = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    monkeypatch.setattr(TokenBatch, "to", lambda *args, **kwargs: sent.append((args, kwargs)))
    device = torch.device("cuda")
    batch.send(device)
    tensors = [
        value for field in fields(batch) if isinstance(value := getattr(batch, field.name), torch.Tensor)
    ]
    assert [id(tensor) for tensor in pinned] == [id(tensor) for tensor in tensors]
    (((copied, where), options),) = sent
    assert copied is not batch
    assert (where, options) == (device, {"non_blocking": True})
