"""What one process writes and reads; divided models are in tests/parallel/test_checkpoint.py."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_state_dict

from trimtab.train.checkpoint import Checkpointer, CheckpointError
from trimtab.train.checkpoint_state import LocalState, Saved, parts_of, write_state


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def stepped(model, num_steps=2):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(num_steps):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_halves_have_their_places_in_the_whole():
    halves = torch.arange(24.0).reshape(2, 2, 3, 2)  # (E, 2, F, D)
    parts = parts_of(halves, split_dim=1)
    assert parts.shape == (2, 6, 2)
    assert list(parts.boxes) == [(0, 0, 0), (0, 3, 0)]
    whole = halves.flatten(1, 2)
    assert torch.equal(parts.boxes[0, 3, 0], whole[:, 3:])
    # Views: what is read into them is in the parameter.
    parts.boxes[0, 0, 0].zero_()
    assert not halves[:, 0].any()


def test_a_tensor_without_elements_has_no_boxes():
    assert parts_of(torch.empty(0, 3)).boxes == {}


def test_what_cannot_be_saved_is_said(tmp_path):
    model = mlp()
    optimizer = stepped(model)
    with pytest.raises(ValueError, match=r"'0\.weight' is in two parts of the model"):
        LocalState([model, model], optimizer)
    with pytest.raises(ValueError, match=r"parameter of shape \(4, 3\) that no part of the model has"):
        LocalState([mlp()], optimizer)
    with pytest.raises(ValueError, match="meta device"):
        LocalState([mlp().to("meta")], torch.optim.AdamW([nn.Parameter(torch.ones(1))]))

    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    extra = Extra(2, 2)
    with pytest.raises(ValueError, match="state '_extra_state' is no tensor but dict"):
        LocalState([extra], torch.optim.AdamW(extra.parameters()))
    momentum = torch.optim.SGD(model.parameters(), lr=0.1)
    momentum.state[model[0].weight]["momentum_buffer"] = None
    with pytest.raises(ValueError, match=r"'momentum_buffer' of 0\.weight is no tensor but NoneType"):
        LocalState([model], momentum).saved()


def test_wrappers_are_no_part_of_names(tmp_path):
    model = mlp()
    optimizer = stepped(model)
    Checkpointer(tmp_path).save(1, model, optimizer, {})
    wrapped = mlp(seed=1)
    wrapped[0] = checkpoint_wrapper(wrapped[0])
    wrapped[2] = torch.compile(wrapped[2], backend="eager")
    fresh = torch.optim.AdamW(wrapped.parameters())
    Checkpointer(tmp_path).load(Checkpointer(tmp_path).latest(), wrapped, fresh)
    for one, other in zip(model.parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(one, other)
        for key, value in optimizer.state[one].items():
            assert torch.equal(value, fresh.state[other][key])


def test_parameters_that_are_one_stay_one(tmp_path):
    def tied(seed):
        torch.manual_seed(seed)
        model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
        model["head"].weight = model["embed"].weight
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = tied(0)
    model["head"](model["embed"](torch.arange(4))).sum().backward()
    optimizer.step()
    Checkpointer(tmp_path).save(1, model, optimizer, {})
    other, fresh = tied(1)
    Checkpointer(tmp_path).load(Checkpointer(tmp_path).latest(), other, fresh)
    assert other["head"].weight is other["embed"].weight
    assert torch.equal(other["head"].weight, model["head"].weight)
    assert torch.equal(
        fresh.state[other["head"].weight]["exp_avg"], optimizer.state[model["head"].weight]["exp_avg"]
    )


def test_settings_are_the_optimizers_own(tmp_path):
    model = mlp()
    Checkpointer(tmp_path).save(1, model, stepped(model), {})
    other = mlp(seed=1)
    # Other groups, other rates.
    optimizer = torch.optim.AdamW(
        [{"params": [p], "lr": 0.5} for p in reversed(list(other.parameters()))], lr=0.3
    )
    Checkpointer(tmp_path).load(Checkpointer(tmp_path).latest(), other, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5] * 6
    assert optimizer.state[other[0].weight]["step"].item() == 2


def test_a_model_in_another_dtype_does_not_fit(tmp_path):
    model = mlp()
    Checkpointer(tmp_path).save(1, model, stepped(model), {})
    double = mlp().double()
    optimizer = torch.optim.AdamW(double.parameters())
    said = r"model\.0\.bias is torch.float32 in it and torch.float64 in the model"
    with pytest.raises(CheckpointError, match=said):
        Checkpointer(tmp_path).load(Checkpointer(tmp_path).latest(), double, optimizer)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_torch_saves_can_be_loaded(tmp_path):
    """Names are torch's own, so checkpoints of trimtab 0.1, which it named, are read."""
    model = mlp()
    optimizer = stepped(model)
    names, state = get_state_dict(model, optimizer)
    dcp.save({"model": names, "optimizer": state}, checkpoint_id=tmp_path)
    other = mlp(seed=1)
    fresh = torch.optim.AdamW(other.parameters())
    Checkpointer(tmp_path).load(tmp_path, other, fresh)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(fresh.state[two]["exp_avg_sq"], optimizer.state[one]["exp_avg_sq"])
    assert torch.equal(model[1].running_mean, other[1].running_mean)


def test_a_tensor_with_a_gap_is_not_read(tmp_path):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    state = LocalState([model], optimizer).saved()
    state["model.0.weight"].boxes[0, 0] = state["model.0.weight"].boxes[0, 0][:3]
    write_state(state, tmp_path)
    with pytest.raises(ValueError, match=r"model\.0\.weight is not complete in the checkpoint"):
        Saved.read(tmp_path).fill(LocalState([model], optimizer).model)
