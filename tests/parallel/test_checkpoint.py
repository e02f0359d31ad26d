"""Checkpoints of divided models: what one plan saves, any other one loads, and ranks fail as one."""

import contextlib
import os
import re
import resource
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import DTensor

from tests.parallel.checkpointing import divide, saved, stock
from tests.parallel.pool import RankError, mesh_of
from trimtab.parallel.fsdp import shard_parameters
from trimtab.parallel.mesh import Degrees
from trimtab.train.checkpoint import Checkpointer, CheckpointError, CheckpointSaveError

PLANS = {
    "one": None,
    "fsdp": Degrees(dp_shard=2),
    "tp": Degrees(tp=2, etp=2),
    "stages": Degrees(pp=2),
    # Two meshes for FSDP beside that of the experts, and strided shards of both experts and heads.
    "strided": Degrees(dp_shard=2, tp=2, ep=2),
    "slices": Degrees(dp_shard=2, tp=2, etp=2),
    "copies": Degrees(dp_replicate=2, cp=2, ep=2),
    "everything": Degrees(pp=2, dp_shard=2, tp=2, ep=2, etp=2),
}
TWO = PLANS["fsdp"]


def save(run_dir, kind, plan, stepped=True, step=1):
    degrees = PLANS[plan]
    divided = saved(kind, degrees) if stepped else divide(kind, degrees, seed=0)
    Checkpointer(run_dir).save(step, divided.modules, divided.optimizer, {"version": 1})


def load(run_dir, kind, plan, stepped=True, replacing=False):
    """Load into other weights; names, by what is right and what is wrong."""
    degrees = PLANS[plan]
    divided = divide(kind, degrees, seed=3)
    if replacing:
        divided.give_state(divided, divided)
    expected = (saved(kind, degrees) if stepped else divide(kind, degrees, seed=0)).local()
    checkpointer = Checkpointer(run_dir)
    path = checkpointer.latest()
    assert checkpointer.read_trainer(path)["version"] == 1
    checkpointer.load(path, divided.modules, divided.optimizer)
    found = divided.local()
    assert found.keys() == expected.keys()
    right = {name for name, value in found.items() if torch.equal(value, expected[name])}
    return right, found.keys() - right


def on(ranks, plan, function, *args):
    """Call it on the ranks of a plan; one process has no process group."""
    degrees = PLANS[plan]
    return [function(*args)] if degrees is None else ranks.run(function, degrees.world_size, *args)


def all_names(kind):
    model = stock(kind, 0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    keys = ("step", "exp_avg", "exp_avg_sq")
    return {*model.state_dict(), *(f"{name} {key}" for name in trained for key in keys)}


@pytest.mark.parametrize(
    ("kind", "saving", "loading"),
    [
        ("toy", "one", "slices"),
        ("toy", "slices", "strided"),
        ("toy", "strided", "one"),
        ("toy", "copies", "stages"),
        ("toy", "stages", "tp"),
        ("toy", "everything", "copies"),
        ("deepseek", "everything", "one"),
        ("deepseek", "fsdp", "everything"),
        ("deepseek", "slices", "fsdp"),
    ],
)
def test_any_plan_loads_what_any_other_saved(ranks, tmp_path, kind, saving, loading):
    on(ranks, saving, save, tmp_path, kind, saving)
    # Every other time into an optimiser that has state already.
    results = on(ranks, loading, load, tmp_path, kind, loading, True, len(saving) % 2 == 0)
    assert set().union(*(wrong for _, wrong in results)) == set()
    assert set().union(*(right for right, _ in results)) == all_names(kind)


def test_an_optimizer_that_never_stepped_is_one_after_loading(ranks, tmp_path):
    on(ranks, "slices", save, tmp_path, "toy", "slices", False)
    for right, wrong in on(ranks, "stages", load, tmp_path, "toy", "stages", False, True):
        assert wrong == set()
        assert not any("exp_avg" in name for name in right)


def continue_after(run_dir, plan):
    degrees = PLANS[plan]
    first, second = saved("toy", degrees), divide("toy", degrees, seed=3)
    checkpointer = Checkpointer(run_dir)
    path = checkpointer.save(1, first.modules, first.optimizer, {})
    checkpointer.load(path, second.modules, second.optimizer)
    for divided in (first, second):
        for parameter in divided.named_parameters().values():
            parameter.grad = parameter.detach().clone() if parameter.requires_grad else None
        divided.optimizer.step()
    assert first.local().keys() == second.local().keys()
    return [name for name, value in first.local().items() if not torch.equal(value, second.local()[name])]


def test_training_goes_on_as_if_never_interrupted(ranks, tmp_path):
    assert ranks.run(continue_after, 2, tmp_path, "tp") == [[], []]


def save_gathered(run_dir):
    """As after validation: the root of FSDP has its parameters whole."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    shard_parameters(model, mesh_of(TWO), layers=[model[0]])
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.no_grad():
        model(torch.ones(1, 4))
    assert not isinstance(model[1].weight, DTensor)
    Checkpointer(run_dir).save(1, model, optimizer, {})
    with torch.no_grad():
        model[0].weight.zero_()
        model(torch.ones(1, 4))
    Checkpointer(run_dir).load(Checkpointer(run_dir).latest(), model, optimizer)
    with torch.no_grad():
        return model(torch.ones(1, 4))


def test_parameters_may_be_gathered_when_they_are_saved_or_loaded(ranks, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    for result in ranks.run(save_gathered, 2, tmp_path):
        torch.testing.assert_close(result, model(torch.ones(1, 4)).detach())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", ["toy", "deepseek"])
def test_a_checkpoint_has_the_stock_models_names_and_shapes(ranks, tmp_path, kind):
    """Read by torch alone, which knows nothing of halves that etp takes apart."""
    on(ranks, "slices", save, tmp_path, kind, "slices")
    state = stock(kind, 3).state_dict()
    dcp.load({"model": state}, checkpoint_id=Checkpointer(tmp_path).latest())
    for name, value in stock(kind, 0).state_dict().items():
        assert torch.equal(state[name], value), name


# ------------------------------------------------------------------ ranks fail as one


@contextlib.contextmanager
def failing(where, divided):
    """One rank cannot do what it should; yields arguments for a save."""
    rank = dist.get_rank()
    arguments = {"step": 2, "trainer": {"version": 1}}
    limits, replace = resource.getrlimit(resource.RLIMIT_FSIZE), os.replace
    parameter = divided.optimizer.param_groups[0]["params"][0]
    if where == "trainer":
        arguments["trainer"] = {"function": lambda: None}
    elif where == "pointer" and rank == 0:
        os.replace = full_disk
    elif rank == 1:
        if where == "shard":
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        elif where == "state":
            divided.optimizer.state[parameter]["step"] = 3
        elif where == "per_rank":
            arguments["per_rank"] = {"function": lambda: None}
        elif where == "step":
            arguments["step"] = 3
    try:
        yield arguments
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        os.replace = replace
        divided.optimizer.state.clear()


def full_disk(*_):
    raise OSError("No space left on device")


def save_three_times(run_dir, where):
    divided = saved("toy", TWO)
    checkpointer = Checkpointer(run_dir)
    checkpointer.save(1, divided.modules, divided.optimizer, {})
    with failing(where, divided) as arguments, pytest.raises(CheckpointSaveError) as caught:
        checkpointer.save(model=divided.modules, optimizer=divided.optimizer, **arguments)
    latest = checkpointer.latest().name
    checkpointer.read_trainer(checkpointer.latest())
    checkpointer.save(4, divided.modules, divided.optimizer, {})
    return str(caught.value), latest, checkpointer.latest().name


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("shard", r"step-000002 cannot be saved: rank 1 of 2: \w+: .*(File too large|file write failed)"),
        ("state", r"rank 1 of 2: ValueError: optimiser state 'step' of \S+ is no tensor but int"),
        ("per_rank", "rank 1 of 2: .*ickle"),
        ("trainer", "rank 0 of 2: .*ickle"),
        ("step", "ranks save different steps: step-000002, step-000003"),
        ("pointer", "rank 0 of 2: OSError: No space left on device"),
    ],
)
def test_a_rank_that_cannot_save_fails_all_and_the_pointer_stays(ranks, tmp_path, where, said):
    (message, latest, newest), other = ranks.run(save_three_times, 2, tmp_path, where)
    # Each rank names the step it was to save.
    assert message == other[0] or where == "step"
    assert re.search(said, message, re.DOTALL)
    assert f"the last good one, {tmp_path / 'checkpoints' / 'step-000001'}, is as it was" in message
    assert (latest, newest) == other[1:] == ("step-000001", "step-000004")
    assert not [name for name in os.listdir(tmp_path / "checkpoints") if name.startswith(".")]


def save_and_die(run_dir, where):
    divided = saved("toy", TWO)
    if where == "shard" and dist.get_rank() == 1:
        # In the middle of its file.
        write, written = torch.save, []

        def dying(*args, **kwargs):
            write(*args, **kwargs)
            written.append(args)
            if len(written) == 5:
                die()

        torch.save = dying
    if where == "pointer" and dist.get_rank() == 0:
        os.replace = die
    Checkpointer(run_dir).save(2, divided.modules, divided.optimizer, {"version": 1})


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("where", "rank"), [("shard", 1), ("pointer", 0)])
def test_a_rank_killed_while_saving_leaves_the_last_checkpoint(ranks, tmp_path, where, rank):
    ranks.run(save, 2, tmp_path, "toy", "fsdp")
    with pytest.raises(RankError) as caught:
        ranks.run(save_and_die, 2, tmp_path, where, timeout=30)
    assert f"rank {rank} of 2 died with exit code -9" in str(caught.value)
    assert re.search(
        rf"CheckpointSaveError: .*cannot be saved: rank {1 - rank} of 2: another rank is lost",
        str(caught.value),
    )
    assert Checkpointer(tmp_path).latest().name == "step-000001"
    right, wrong = load(tmp_path, "toy", "one")
    assert (right, wrong) == (all_names("toy"), set())
    ranks.run(save, 2, tmp_path, "toy", "fsdp")
    assert not [name for name in os.listdir(tmp_path / "checkpoints") if name.startswith(".")]


def error_of(function, *args):
    with pytest.raises(CheckpointError) as caught:
        function(*args)
    return str(caught.value)


def test_a_corrupted_file_is_named_on_every_rank(ranks, tmp_path):
    for step in range(2):
        ranks.run(save, 2, tmp_path, "toy", "fsdp", step=step)
    path = tmp_path / "checkpoints" / "step-000001"
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp", "trainer.pt"):
        good = (path / name).read_bytes()
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 1
        (path / name).write_bytes(bad)
        one, other = ranks.run(error_of, 2, read_trainer, tmp_path)
        (path / name).write_bytes(good)
        assert one == other
        assert f"the content of {name} is not what was saved" in one
        assert f"resume from it with --checkpoint.resume {path.with_name('step-000000')}" in one
    ranks.run(read_trainer, 2, tmp_path)


def read_trainer(run_dir):
    checkpointer = Checkpointer(run_dir)
    return checkpointer.read_trainer(checkpointer.latest())


def load_another(run_dir, kind):
    divided = divide(kind, PLANS["stages"], seed=0)
    checkpointer = Checkpointer(run_dir)
    checkpointer.load(checkpointer.latest(), divided.modules, divided.optimizer)


def test_tensors_that_do_not_fit_are_named_on_every_rank(ranks, tmp_path):
    ranks.run(save, 2, tmp_path, "toy", "stages")
    one, other = ranks.run(error_of, 2, load_another, tmp_path, "other")
    # Only the last stage has a head or a tail; the first rank says so too.
    assert one == other
    assert (
        "does not fit Toy: it lacks model.tail.weight; it has model.head.bias, which the model has not" in one
    )
    assert "it has optimizer.state.head.bias.exp_avg, which" in one
    one, other = ranks.run(error_of, 2, load_another, tmp_path, "wide")
    assert one == other
    assert "model.embed.weight has shape (13, 6) in it and (13, 12) in the model" in one
    assert re.search(r"and \d+ more; resume with the configuration", one)


def save_per_rank(run_dir):
    divided = divide("toy", TWO, seed=0)
    own = {"random": torch.tensor([dist.get_rank()])}
    Checkpointer(run_dir).save(1, divided.modules, divided.optimizer, {"version": 1}, per_rank=own)


def test_each_rank_gets_back_what_was_its_own(ranks, tmp_path):
    ranks.run(save_per_rank, 2, tmp_path)
    for rank, state in enumerate(ranks.run(read_trainer, 2, tmp_path)):
        assert state == {"version": 1, "per_rank": {"random": torch.tensor([rank])}}
    assert read_trainer(tmp_path) == {"version": 1, "per_rank": None}


def read_apart(run_dir):
    return Checkpointer(run_dir).read_trainer(run_dir / f"step-00000{dist.get_rank()}")


def test_ranks_that_mean_different_checkpoints_are_told(ranks, tmp_path):
    one, other = ranks.run(error_of, 2, read_apart, tmp_path)
    assert "ranks read different checkpoints" in one
    assert "ranks read different checkpoints" in other


def write_beside(run_dir):
    """Each rank has a run directory of its own, as without a shared file system."""
    divided = divide("toy", TWO, seed=0)
    with contextlib.chdir(run_dir / str(dist.get_rank())):
        Checkpointer(Path("run")).save(1, divided.modules, divided.optimizer, {})


def test_nodes_must_share_the_run_directory(ranks, tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    one, other = ranks.run(error_of, 2, write_beside, tmp_path)
    assert one == other
    assert "the first rank does not see __1_0.distcp as rank 1 wrote it; put the run directory on" in one
