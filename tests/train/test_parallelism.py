from dataclasses import replace

import pytest
import torch
from torch.distributed import pipelining

from trimtab import BatchWise, GlobalBatch
from trimtab.models.deepseek_v3 import deepseek_v3_debugmodel, deepseek_v3_debugmodel_batch_wise
from trimtab.models.qwen3 import qwen3_debugmodel
from trimtab.parallel.mesh import Degrees
from trimtab.parallel.schedules import SCHEDULES
from trimtab.scale import Accumulation
from trimtab.train.model import Balancing
from trimtab.train.parallelism import ParallelismConfig

# The command line's names, shortened for these tests.
NAMES = {
    "dp_replicate": "data_parallel_replicate_degree",
    "dp_shard": "data_parallel_shard_degree",
    "tp": "tensor_parallel_degree",
    "cp": "context_parallel_degree",
    "ep": "expert_parallel_degree",
    "etp": "expert_tensor_parallel_degree",
    "pp": "pipeline_parallel_degree",
    "schedule": "pipeline_parallel_schedule",
    "rows": "pipeline_parallel_microbatch_size",
}


def parallel(**short):
    return ParallelismConfig(**{NAMES[name]: value for name, value in short.items()})


def run(world_size, config=None, *, balancing=None, global_batch_size=16, microbatch_size=4, **short):
    """The debug model on so many processes: 16 rows a step, 4 in a forward, 16 experts, 4 heads, 6 layers."""
    config = config or deepseek_v3_debugmodel()
    model = config.model if balancing is None else replace(config.model, balancing=balancing)
    return replace(
        config,
        model=model,
        data=replace(config.data, microbatch_size=microbatch_size),
        training=replace(config.training, global_batch_size=global_batch_size),
        parallelism=parallel(**short),
    ).for_world(world_size)


def test_the_fields_are_those_of_the_command_line():
    assert list(ParallelismConfig.__dataclass_fields__) == list(NAMES.values())


@pytest.mark.parametrize(
    ("world_size", "given", "expected"),
    [
        (1, {}, {}),
        (8, {}, {"dp_shard": 8}),
        (8, {"dp_replicate": 2, "cp": 2}, {"dp_replicate": 2, "cp": 2, "dp_shard": 2}),
        (4, {"tp": 4}, {"tp": 4}),
        (4, {"dp_shard": 4}, {"dp_shard": 4}),
        (8, {"pp": 2, "tp": 2, "ep": 4}, {"pp": 2, "tp": 2, "dp_shard": 2, "ep": 4}),
        (4, {"tp": 2, "etp": 2, "ep": 2}, {"tp": 2, "etp": 2, "ep": 2, "dp_shard": 2}),
    ],
)
def test_degrees_of_a_world(world_size, given, expected):
    degrees = parallel(**given).resolve(world_size)
    assert degrees == Degrees(**expected)
    assert degrees.world_size == world_size


@pytest.mark.parametrize(
    ("world_size", "given", "said"),
    [
        (4, {"pp": 3}, r"pipeline_parallel_degree=3 must divide the number of processes, 4, .*multiple of 3"),
        (
            6,
            {"pp": 2, "tp": 2},
            r"pipeline_parallel_degree=2 \* tensor_parallel_degree=2 = 4 must divide .*6",
        ),
        (
            4,
            {"dp_shard": 4, "tp": 2},
            r"data_parallel_shard_degree=4 \* tensor_parallel_degree=2 = 8 must be the number of processes, 4; "
            r".*start 8 processes \(NGPU or --nproc\)",
        ),
        (2, {"dp_shard": 1}, r"the product of all degrees, 1, must be the number of processes, 2"),
        (
            4,
            {"ep": 3},
            r"expert_parallel_degree=3 must divide data_parallel_shard_degree \* context_parallel_degree \* "
            r"tensor_parallel_degree = 4; set parallelism\.expert_parallel_degree to 1, 2 or 4",
        ),
        (
            4,
            {"tp": 2, "etp": 2, "ep": 4},
            r"expert_parallel_degree=4 .*takes the tensor ranks\) = 2; .* 1 or 2$",
        ),
        (4, {"dp_replicate": 4, "ep": 2}, r"expert_parallel_degree=2 must divide .* = 1; .* to 1$"),
    ],
)
def test_degrees_that_do_not_fit_the_processes_are_refused(world_size, given, said):
    with pytest.raises(ValueError, match=said):
        parallel(**given).resolve(world_size)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tp": 0}, r"tensor_parallel_degree=0 must be at least 1; set parallelism\.tensor_parallel_degree"),
        ({"tp": -1}, r"tensor_parallel_degree=-1 must be at least 1;"),
        ({"dp_shard": 0}, r"data_parallel_shard_degree=0 must be at least 1, or -1 for"),
        ({"tp": 4, "etp": 2}, r"expert_tensor_parallel_degree=2 must be 1 or tensor_parallel_degree=4"),
        ({"pp": 2, "rows": 0}, r"pipeline_parallel_microbatch_size=0 must be at least 1"),
        ({"pp": 2, "schedule": "gpipe"}, r"parallelism\.pipeline_parallel_schedule='gpipe' .*mean 'GPipe'\?"),
    ],
)
def test_degrees_are_validated_when_built(given, said):
    with pytest.raises(ValueError, match=said):
        parallel(**given)


@pytest.mark.parametrize("given", [{"schedule": "GPipe"}, {"rows": 2}])
def test_settings_of_a_pipeline_that_is_none_warn(given):
    (name,) = given
    with pytest.warns(UserWarning, match=f"parallelism.{NAMES[name]} has no effect with .*degree=1"):
        parallel(**given)
    parallel(pp=2, **given)


# ---------------------------------------------------------------- the batch


@pytest.mark.parametrize(
    ("world_size", "given", "rows", "num_microbatches"),
    [
        (1, {}, 4, 4),
        (2, {}, 4, 2),
        (4, {}, 4, 1),
        (1, {"microbatch_size": None}, 16, 1),
        (4, {"microbatch_size": None}, 4, 1),
        (16, {"microbatch_size": None}, 1, 1),
        (4, {"tp": 2}, 4, 2),
        (4, {"pp": 4}, 1, 16),
        (4, {"pp": 4, "rows": 4}, 4, 4),
        (4, {"pp": 4, "microbatch_size": None}, 1, 16),
        (4, {"pp": 2}, 1, 8),
        (4, {"pp": 2, "rows": 2}, 2, 4),
        # Without a global batch size a data rank reads microbatch_size rows, in a pipeline too.
        (2, {"global_batch_size": None}, 4, 1),
        (4, {"global_batch_size": None, "pp": 2}, 1, 4),
    ],
)
def test_rows_are_divided_among_data_ranks_and_forwards(world_size, given, rows, num_microbatches):
    resolved = run(world_size, **given)
    assert (resolved.microbatch_size, resolved.num_microbatches) == (rows, num_microbatches)
    expected = 16 if "global_batch_size" not in given else 4 * resolved.degrees.data
    assert resolved.global_batch_size == expected


@pytest.mark.parametrize(
    ("world_size", "given", "said"),
    [
        (
            3,
            {},
            r"training\.global_batch_size=16 must be a multiple of data ranks=3 \* data\.microbatch_size=4 = 12; "
            r"set training\.global_batch_size to 12 or 24$",
        ),
        (8, {}, r"data ranks=8 \* data\.microbatch_size=4 = 32; .* to 32, or data\.microbatch_size to None$"),
        (32, {"microbatch_size": None}, r"must be a multiple of data ranks=32; .* to 32$"),
        (
            4,
            {"pp": 4, "rows": 3},
            r"data ranks=1 \* parallelism\.pipeline_parallel_microbatch_size=3 = 3; .* to 12 or 24$",
        ),
    ],
)
def test_rows_that_cannot_be_divided_are_refused(world_size, given, said):
    with pytest.raises(ValueError, match=said):
        run(world_size, **given)


def test_the_loader_reads_what_the_run_says():
    config = deepseek_v3_debugmodel_batch_wise()
    config = replace(config, data=replace(config.data, source="fixed", seq_len=16))
    whole = next(config.build_loader(config.for_world(1)))
    shares = [next(config.build_loader(config.for_world(4), data_rank=rank)) for rank in range(4)]
    assert whole.input_ids_BS.shape == (16, 16)
    assert [share.input_ids_BS.tolist() for share in shares] == [
        whole.input_ids_BS[4 * rank : 4 * rank + 4].tolist() for rank in range(4)
    ]
    plain = replace(config, model=replace(config.model, balancing=deepseek_v3_debugmodel().model.balancing))
    pipeline = replace(plain, parallelism=parallel(pp=4))
    loaders = (plain.build_loader(plain.for_world(1)), pipeline.build_loader(pipeline.for_world(4)))
    steps, rows = (
        [next(loader).input_ids_BS for _ in range(n)] for loader, n in zip(loaders, (40, 640), strict=True)
    )
    assert torch.equal(torch.cat(steps), torch.cat(rows))


# ---------------------------------------------------------------- model, data and schedule


@pytest.mark.parametrize(
    ("world_size", "given", "said"),
    [
        (3, {"tp": 3}, r"parallelism\.tensor_parallel_degree=3 must divide model\.num_heads=4"),
        (3, {"ep": 3}, r"parallelism\.expert_parallel_degree=3 must divide model\.num_experts=16"),
        (
            2,
            {"cp": 2, "seq_len": 30},
            r"data\.seq_len=30 .*2 \* cp \* tp = 4.*context_parallel_degree \(cp\)",
        ),
        (4, {"tp": 4, "seq_len": 30}, r"data\.seq_len=30 .*tp = 4"),
    ],
)
def test_a_model_or_row_that_cannot_be_divided_is_refused(world_size, given, said):
    config = deepseek_v3_debugmodel()
    if "seq_len" in given:
        config = replace(config, data=replace(config.data, seq_len=given.pop("seq_len")))
    with pytest.raises(ValueError, match=said):
        run(world_size, config, **given)


def test_families_check_what_they_divide():
    config = qwen3_debugmodel()
    with pytest.raises(ValueError, match=r"tensor_parallel_degree=4 must divide model\.num_kv_heads=2"):
        run(4, config, tp=4)
    narrow = replace(config, model=replace(config.model, expert_hidden_dim=97))
    run(2, narrow, tp=2)
    with pytest.raises(
        ValueError, match=r"expert_tensor_parallel_degree=2 must divide .*expert_hidden_dim=97"
    ):
        run(2, narrow, tp=2, etp=2)


def test_a_pipeline_has_its_plan():
    plan = run(4, pp=2, dp_shard=2, schedule="ZBVZeroBubble").pipeline
    assert (plan.num_stages, plan.num_microbatches) == (4, 8)
    assert run(4).pipeline is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"pp": 4, "schedule": "Interleaved1F1B"},
            r"parallelism\.pipeline_parallel_schedule: .*8 stages.*num_layers=6.*"
            r"num_layers is model\.num_layers",
        ),
        (
            {"pp": 4, "rows": 8},
            r"1F1B with 4 stages .*num_microbatches=2.*num_microbatches is training\.global_batch_size / ",
        ),
    ],
)
def test_a_schedule_that_cannot_run_is_refused_in_the_command_lines_words(given, said):
    with pytest.raises(ValueError, match=said):
        run(4, **given)


def test_a_schedule_that_torch_lacks_is_refused(monkeypatch):
    monkeypatch.delattr(pipelining, SCHEDULES["DualPipeV"].implementation)
    with pytest.raises(ValueError, match=r"'DualPipeV' is not in this PyTorch; .*choose 1F1B"):
        run(4, pp=2, schedule="DualPipeV")


# ---------------------------------------------------------------- balancing


def test_batch_wise_balancing_is_refused_where_a_forward_is_not_the_batch():
    config = deepseek_v3_debugmodel_batch_wise()
    for world_size in (1, 2, 4):
        assert config.for_world(world_size).num_microbatches == 1
    with pytest.raises(ValueError, match=r"GlobalBatch.*SequenceWise") as refused:
        replace(config, parallelism=parallel(pp=4)).for_world(4)
    assert (
        "num_microbatches=16 is training.global_batch_size=16 / (data ranks=1 * "
        "parallelism.pipeline_parallel_microbatch_size=1)"
    ) in str(refused.value)
    averaged = Balancing(objectives=(BatchWise.Config(coef=1.0, average_microbatches=True),))
    assert run(4, balancing=averaged, pp=4).num_microbatches == 16


EXACT = (GlobalBatch.Config(coef=1.0, counts="exact"),)


def test_exact_counts_are_had_where_all_forwards_come_first():
    gpipe = run(4, balancing=Balancing(objectives=EXACT), pp=4, schedule="GPipe")
    assert gpipe.accumulation == Accumulation(num_microbatches=16, order="forward_first")
    assert run(4, pp=4).accumulation == Accumulation(num_microbatches=16)
    first = Balancing(objectives=EXACT, order="forward_first")
    assert run(4, balancing=first, pp=4, schedule="GPipe").order == "forward_first"
    assert run(1, balancing=first).order == "forward_first"
    with pytest.raises(ValueError, match=r"counts='exact' cannot be had .*GPipe"):
        run(4, balancing=Balancing(objectives=EXACT), pp=4)


@pytest.mark.parametrize(
    ("order", "schedule"), [("counting_pass", "1F1B"), ("counting_pass", "GPipe"), ("forward_first", "1F1B")]
)
def test_an_order_that_the_schedule_does_not_have_is_refused(order, schedule):
    balancing = Balancing(objectives=EXACT, order=order)
    said = rf"order='{order}' cannot be had in a pipeline under {schedule}, .*order='alternating'.*GPipe"
    with pytest.raises(ValueError, match=said):
        run(4, balancing=balancing, pp=4, schedule=schedule)
