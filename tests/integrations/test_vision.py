"""Vision towers: batches without images, and where pipeline stages may be cut."""

import contextlib

import pytest
import torch

import trimtab
from tests.hf_models import make_batch, tiny_model
from trimtab.integrations.stages import divide_layers, split_into_stages
from trimtab.integrations.stages_examination import examine
from trimtab.integrations.vision import image_arguments, prepare_vision, sample_images, tower_blocks, tower_of
from trimtab.microbatch import describe

PATCH_DIM = 3 * 2 * 16 * 16


def vision_model(num_layers=4, **settings):
    model = tiny_model("qwen3_vl_moe", num_layers=num_layers, experts_implementation="eager", **settings)[0]
    prepare_vision(model)
    return model


def no_images(ids):
    places = torch.arange(ids.shape[1]).expand(ids.shape)
    none = torch.zeros(0, PATCH_DIM), torch.zeros(0, 3, dtype=torch.int64)
    return {"input_ids": ids, **image_arguments(places, places.expand(3, *ids.shape), *none)}


def test_zero_images_pass_the_tower_and_change_nothing():
    model, ids = vision_model(), make_batch()["input_ids"].clamp(max=50)
    runs = []
    handle = model.model.visual.register_forward_hook(lambda *args: runs.append(1))
    out = model(**no_images(ids), use_cache=False).logits
    handle.remove()
    assert len(runs) == 1
    stock = tiny_model("qwen3_vl_moe", num_layers=4, experts_implementation="eager")[0]
    assert torch.equal(out, stock(input_ids=ids, use_cache=False).logits)
    out.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if ".visual." in name}
    assert grads
    assert all(grad is not None and not grad.any() for grad in grads.values())


def test_the_tower_is_found():
    model = vision_model()
    assert tower_of(model) == "model.visual"
    assert tower_blocks(model) == list(model.model.visual.blocks)
    text = tiny_model("mixtral")[0]
    assert tower_of(text) is None
    assert tower_blocks(text) == []
    with pytest.raises(ValueError, match="MixtralForCausalLM has no module that holds a tower"):
        prepare_vision(text)


def test_layers_that_images_reach_are_found_by_trying():
    anatomy = examine(vision_model())
    assert anatomy.first == ("model.visual",)
    assert anatomy.num_first == 1
    # A tower of as many blocks as there are layers is not taken for the decoder.
    assert len(anatomy.layers) == 4


def test_the_first_stage_has_the_tower_alone():
    first, last = (split_into_stages(vision_model(), num_stages=2, stage=stage) for stage in range(2))
    assert tower_blocks(first)
    assert not tower_blocks(last)
    assert not any(".visual." in name for name, _ in last.named_parameters())
    both = [name for name, _ in (*first.named_parameters(), *last.named_parameters())]
    assert sorted(both) == sorted(name for name, _ in vision_model().named_parameters())


def test_stages_are_cut_after_the_layers_that_images_reach():
    assert divide_layers(6, 3) == [range(2), range(2, 5), range(5, 6)]
    assert divide_layers(6, 3, num_first=4) == [range(4), range(4, 5), range(5, 6)]
    message = r"num_layers=4 cannot be divided into num_stages=3: .* after the first 3 layers"
    with pytest.raises(ValueError, match=message):
        divide_layers(4, 3, num_first=3)


def tell_layers(model, make):
    """Give every decoder layer another argument, made of where images are."""
    decoder = model.model.language_model
    stock = type(decoder)

    class Telling(stock):
        def forward(self, *args, visual_pos_masks=None, **kwargs):
            told = make(visual_pos_masks)
            return super().forward(*args, visual_pos_masks=visual_pos_masks, hint=told, **kwargs)

    decoder.__class__ = Telling


def test_layers_that_read_images_otherwise_are_refused():
    model = vision_model()
    tell_layers(model, lambda mask: torch.zeros(2, 5) if mask is None else mask.float())
    with pytest.raises(ValueError, match=r"layer [123] reads 'hint', which depends on images"):
        split_into_stages(model, num_stages=2, stage=0)


def test_what_is_the_same_with_images_is_not_refused():
    model = vision_model()
    tell_layers(model, lambda mask: torch.zeros(2, 5))
    assert examine(model).num_first == 1


def test_images_added_after_the_last_layer_leave_no_stage_to_cut():
    model = vision_model()
    decoder = model.model.language_model
    stock = type(decoder)

    class Late(stock):
        def forward(self, *args, visual_pos_masks=None, **kwargs):
            out = super().forward(*args, visual_pos_masks=visual_pos_masks, **kwargs)
            if visual_pos_masks is not None:
                out.last_hidden_state = out.last_hidden_state + visual_pos_masks[..., None]
            return out

    decoder.__class__ = Late
    with pytest.raises(ValueError, match="after the first 4 layers, which the first stage must have"):
        split_into_stages(model, num_stages=2, stage=0)


def test_the_sample_is_a_batch_that_the_model_takes():
    model = vision_model()
    out = model(**sample_images(model, (2, 5)), use_cache=False)
    assert out.logits.shape[:2] == (2, 5)


def stock_images():
    """A batch as the stock processor makes it: two rows, one image of 2 x 1 visual tokens each."""
    ids = make_batch(2, 12)["input_ids"].clamp(max=50)
    ids[:, 3:5] = 60
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == 60).int(),
        "pixel_values": torch.randn(16, PATCH_DIM, generator=torch.Generator().manual_seed(0)),
        "image_grid_thw": torch.tensor([[1, 4, 2], [1, 4, 2]]),
    }


@pytest.mark.parametrize(("exclude", "num_tokens"), [(False, 21), (True, 17)])
def test_attached_alone_visual_tokens_count_unless_they_are_declared(exclude, num_tokens):
    model, batch = vision_model(), stock_images()
    balancer = trimtab.attach(model, [trimtab.SequenceWise.Config(coef=0.1, unit="document")])
    described = contextlib.nullcontext()
    if exclude:
        text = batch["input_ids"] != model.config.image_token_id
        described = balancer.microbatch(valid_mask=batch["attention_mask"].bool() & text)
    with described:
        model(**batch, use_cache=False).logits.sum().backward()
    balancer.step()
    assert balancer.metrics()["num_tokens"] == [num_tokens] * 4


def test_documents_are_found_in_positions_of_several_axes():
    # Two documents; the second begins with an image of 2 x 2 tokens, whose temporal positions are all 0.
    time = torch.tensor([0, 1, 2, 0, 0, 0, 0, 2, 3])
    height = torch.tensor([0, 1, 2, 0, 0, 1, 1, 2, 3])
    width = torch.tensor([0, 1, 2, 0, 1, 0, 1, 2, 3])
    place = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5])
    shape = {"active": True, "batch_shape": (1, 9), "device": torch.device("cpu")}
    for axes in ([place, time, height, width], [time, height, width]):
        positions = torch.stack(axes)[:, None]
        found = describe("document", **shape, position_ids=positions)
        assert found.num_tokens_G.tolist() == [3, 6]
