"""Vision-language models on ranks: every gradient is that of one process, whoever has images."""

import pytest
import torch

from tests.parallel.pool import Ranks
from tests.parallel.vision import Case, Outcome, expected, microbatches, run_case
from trimtab.parallel.mesh import Degrees

CASES = [
    Case(),
    Case(family="qwen3_5"),
    Case(degrees=Degrees(dp_shard=2), visual_tokens="exclude"),
    Case(degrees=Degrees(dp_shard=2, ep=2), checkpointing=True),
    Case(family="qwen3_5", degrees=Degrees(dp_shard=2, ep=2)),
    Case(degrees=Degrees(dp_replicate=2), visual_tokens="exclude", checkpointing=True),
    Case(degrees=Degrees(pp=2), schedule="GPipe"),
    Case(degrees=Degrees(pp=2), schedule="1F1B", checkpointing=True, visual_tokens="exclude"),
    Case(family="qwen3_5", degrees=Degrees(pp=2), schedule="GPipe", checkpointing=True),
    Case(degrees=Degrees(pp=2, dp_shard=2, ep=2), schedule="GPipe"),
    # Four stages of five layers, the first of which would have one if it did not need two.
    Case(degrees=Degrees(pp=2), schedule="Interleaved1F1B"),
]


def check(case: Case, outcomes: list[Outcome], tolerance: float) -> None:
    want = expected(case)
    assert sum(outcome.loss for outcome in outcomes) == pytest.approx(want.loss, abs=tolerance)
    assert all(outcome.replicas_agree for outcome in outcomes)
    have = {name: grad for outcome in outcomes for name, grad in (outcome.grads or {}).items()}
    assert have.keys() == want.grads.keys()
    for name, grad in want.grads.items():
        error = (have[name].double() - grad).abs().max() / grad.abs().max().clamp(min=1e-3)
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_one_process(case: Case, ranks: Ranks) -> None:
    check(case, ranks.run(run_case, case.degrees.world_size, case), 1e-10)


# Dynamo looks at .grad of every graph input, and a layer's input is not a leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_layers(ranks: Ranks) -> None:
    case = Case(degrees=Degrees(pp=2), schedule="GPipe", compiled=True)
    check(case, ranks.run(run_case, 2, case), 1e-5)


def test_microbatches_differ_in_images() -> None:
    batches = microbatches(Case())
    grids = [batch.images.grids_I3 for batch in batches if batch.images is not None]
    assert [len(grid) > 0 for grid in grids] == [True, False, True, False]
    assert len(torch.cat(grids).unique(dim=0)) > 2
    assert max(map(len, grids)) >= 4
