"""Initial weights are the same bits on every plan, and no rank holds more than its part."""

from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.parallel.cases import PLANS
from tests.parallel.pool import mesh_of
from tests.parallel.runner import parallelism
from trimtab.models.deepseek_v3 import deepseek_v3_tiny
from trimtab.parallel.experts import SPLIT_DIMS
from trimtab.train.checkpoint_state import canonical_name
from trimtab.train.engine import Engine


def config_of(degrees):
    pipeline = {}
    if degrees.pp > 1:
        pipeline = {"pipeline_parallel_schedule": "1F1B", "pipeline_parallel_microbatch_size": 1}
    base = deepseek_v3_tiny()
    return replace(
        base,
        training=replace(base.training, global_batch_size=8 if degrees.pp > 1 else None),
        parallelism=parallelism(degrees, pipeline),
    )


def weights(degrees):
    """Whole values of this rank's stages, in the shapes of the stock model."""
    config = config_of(degrees)
    mesh = mesh_of(degrees) if degrees.world_size > 1 else None
    run = config.for_world(degrees.world_size)
    engine = Engine(config, run, mesh=mesh, device=torch.device("cpu"), vocab_size=64)
    found = {}
    for part in engine.parts:
        for module_name, module in part.module.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
                if (dim := getattr(module, SPLIT_DIMS, {}).get(key)) is not None:
                    value = value.flatten(dim, dim + 1)
                found[canonical_name(f"{module_name}.{key}")] = value.clone()
    return found


@pytest.mark.parametrize(
    "plan", ["fsdp", "hsdp_ep", "tp", "etp", "ep_of_cp", "pp", "tp_ep_etp2", "pp_fsdp_tp_ep"]
)
def test_plans_start_from_the_same_bits(plan, ranks):
    from trimtab.parallel.mesh import Degrees

    reference = weights(Degrees())
    seen = set()
    for found in ranks.run(weights, PLANS[plan].world_size, PLANS[plan]):
        for name, value in found.items():
            assert torch.equal(value, reference[name]), name
        seen |= found.keys()
    assert seen == reference.keys()
