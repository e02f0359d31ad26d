"""Documents of one row in gated delta networks: apart, and each as if it were alone."""

import pytest
import torch

from tests.hf_models import make_batch, tiny_model
from tests.parallel.double import double_precision
from trimtab.integrations.linear_attention import separate_documents, stack_documents

# Documents of the two rows: some shorter than the convolution, one longer than a chunk of the recurrence.
LENGTHS = ((1, 2, 80, 17), (100,))


def batch():
    ids = make_batch(2, 100)["input_ids"]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    return ids, positions


def delta_model(family, *, prepared):
    model = tiny_model(family, dtype=torch.float64, num_layers=3, experts_implementation="eager")[0]
    if prepared:
        separate_documents(model)
    return model


def logits(model, ids, positions):
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits


def change_of_others(model):
    """How much the third document of the first row changes with the second."""
    ids, positions = batch()
    other = ids.clone()
    other[0, 1:3] = (other[0, 1:3] + 7) % 50 + 3
    with torch.no_grad():
        return (logits(model, ids, positions) - logits(model, other, positions))[0, 3:83].abs().max()


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_next"])
def test_the_stock_model_mixes_documents_and_a_prepared_one_does_not(family):
    with double_precision():
        assert change_of_others(delta_model(family, prepared=False)) > 1e-4
        assert change_of_others(delta_model(family, prepared=True)) == 0


def test_each_document_is_what_it_is_alone():
    ids, positions = batch()
    stock, model = (delta_model("qwen3_5_moe", prepared=prepared) for prepared in (False, True))
    weights = torch.randn(2, 100, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with double_precision():
        (logits(model, ids, positions) * weights).sum().backward()
        for row, lengths in enumerate(LENGTHS):
            for first, end in (
                zip([0, 1, 3, 83], [1, 3, 83, 100], strict=True) if len(lengths) > 1 else [(0, 100)]
            ):
                place = (slice(row, row + 1), slice(first, end))
                (logits(stock, ids[place], positions[place]) * weights[place]).sum().backward()
    for (name, want), (_, have) in zip(stock.named_parameters(), model.named_parameters(), strict=True):
        assert (have.grad - want.grad).abs().max() <= 1e-10 * want.grad.abs().max().clamp(min=1e-3), name


def test_documents_are_stacked_by_length():
    _, positions = batch()
    groups, inverse_T = stack_documents(positions)
    assert [tuple(index.shape) for index in groups] == [(3, 17), (2, 100)]
    flat = torch.cat([index.reshape(-1) for index in groups])
    assert torch.equal(flat[inverse_T], torch.arange(200))


def test_rows_of_one_document_are_left_alone():
    assert stack_documents(torch.arange(5).repeat(3, 1)) is None


def test_positions_in_four_axes_tell_documents_by_the_first():
    ids, positions = batch()
    model = delta_model("qwen3_5_moe", prepared=True)
    # All rotary positions are 0: only the first axis knows where documents begin.
    four = torch.cat([positions[None], torch.zeros(3, *positions.shape, dtype=torch.int64)])
    plain = torch.zeros(4, *positions.shape, dtype=torch.int64)
    plain[0] = torch.arange(100)
    with double_precision(), torch.no_grad():
        apart, together = (logits(model, ids, p) for p in (four, plain))
        alone = logits(model, ids[:1, 3:83], four[:, :1, 3:83])
    assert (apart[:1, 3:83] - alone).abs().max() < 1e-12
    assert (together[:1, 3:83] - alone).abs().max() > 1e-4


def test_a_model_without_gated_delta_networks():
    with pytest.raises(ValueError, match="MixtralForCausalLM has no gated delta networks"):
        separate_documents(tiny_model("mixtral")[0])
