import builtins
import json
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from trimtab.models.deepseek_v3 import deepseek_v3_tiny
from trimtab.models.qwen3_vl import qwen3_vl_debugmodel
from trimtab.train.corpus import Document
from trimtab.train.data import DataConfig
from trimtab.train.images import ImageLayout, Pictures
from trimtab.train.images_files import read_image_documents
from trimtab.train.images_shapes import COLOURS, PLACES, SHAPES, Drawing, ShapesConfig
from trimtab.train.images_store import ImagesConfig, tokenize_images
from trimtab.train.tokenizer import ByteTokenizer

VOCAB = ByteTokenizer.vocab_size


def layout(patch_size=4, merge_size=2, **options):
    ids = {"start_id": VOCAB, "image_id": VOCAB + 1, "end_id": VOCAB + 2}
    return ImageLayout(patch_size=patch_size, merge_size=merge_size, **{**ids, **options})


def shapes_loader(
    *, rank=0, world_size=1, seq_len=96, microbatch_size=2, num_documents=60, text=True, **options
):
    shapes = ShapesConfig(num_documents=num_documents, text=text)
    config = DataConfig(
        source="shapes",
        seq_len=seq_len,
        microbatch_size=microbatch_size,
        images=ImagesConfig(shapes=shapes),
        **options,
    )
    return config.build(rank=rank, world_size=world_size, image_layout=lambda vocab_size: layout())


def assert_same(one, other):
    for name in ("input_ids_BS", "labels_BS", "position_ids_BS", "cu_seqlens_G"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    for name in ("patches_PX", "grids_I3", "visual_mask_BS", "positions_3BS"):
        assert torch.equal(getattr(one.images, name), getattr(other.images, name))


# ------------------------------------------------------------------ patches


def test_patches_by_hand():
    # One channel value per pixel, patches of one pixel, two by two of them a visual token.
    pixels = np.arange(8, dtype=np.uint8).reshape(2, 4, 1).repeat(3, axis=2)
    found = layout(patch_size=1, temporal_patch_size=1).patches(pixels)
    want = (np.array([0, 1, 4, 5, 2, 3, 6, 7]) / 255 - 0.5) / 0.5
    assert found == pytest.approx(np.repeat(want[:, None], 3, axis=1), abs=1e-6)


def test_patches_are_those_of_the_stock_processor():
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    pytest.importorskip("PIL")
    for patch_size, merge_size, frames in ((4, 2, 2), (2, 3, 1)):
        own = layout(patch_size, merge_size, temporal_patch_size=frames)
        processor = module.Qwen2VLImageProcessorPil(
            patch_size=patch_size,
            merge_size=merge_size,
            temporal_patch_size=frames,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            size={"shortest_edge": 1, "longest_edge": 10**9},
        )
        rng = np.random.default_rng(0)
        for cells in ((1, 3), (4, 2)):
            pixels = rng.integers(0, 256, (cells[0] * own.cell, cells[1] * own.cell, 3), dtype=np.uint8)
            found = processor(images=[pixels], return_tensors="np")
            assert np.abs(own.patches(pixels) - found["pixel_values"]).max() < 1e-6
            assert own.patch_dim == found["pixel_values"].shape[1]


def test_image_whose_sides_do_not_fit():
    with pytest.raises(ValueError, match=r"\(8, 12, 3\) must have sides that are multiples of .* = 8"):
        layout().patches(np.zeros((8, 12, 3), np.uint8))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"patch_size": 0}, "patch_size=0 must be at least 1"), ({"end_id": VOCAB}, "three different tokens")],
)
def test_layout_is_validated(options, message):
    with pytest.raises(ValueError, match=message):
        layout(**options)


# ------------------------------------------------------------------ rows


def test_rows_hold_whole_documents_with_their_images():
    own = layout()
    loader = shapes_loader(num_documents=300)
    num_images = 0
    for _ in range(25):
        batch = next(loader)
        images = batch.images
        assert int(images.visual_mask_BS.sum()) == int(images.grids_I3.prod(dim=1).sum()) // 4
        assert torch.equal(images.visual_mask_BS, batch.input_ids_BS == own.image_id)
        place = 0
        bounds = batch.cu_seqlens_G.tolist()
        for first, end in pairwise(bounds):
            ids = batch.input_ids_BS.flatten()[first:end].tolist()
            if own.start_id not in ids:
                continue
            text = bytes(i for i in ids if i < 256).decode()
            for words in re.findall(
                rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}), ({'|'.join(PLACES)})", text
            ):
                _, height, width = images.grids_I3[num := place_of(images, place)].tolist()
                drawn = Drawing(
                    layout=own,
                    colour=words[0],
                    shape=words[1],
                    place=words[2],
                    cells=(height // 2, width // 2),
                    key="",
                )
                shown = images.patches_PX[place : place + height * width]
                assert np.array_equal(shown.numpy(), drawn.patches()), f"image {num} is not {text!r}"
                place += height * width
                num_images += 1
        assert place == len(images.patches_PX)
    assert num_images > 50


def place_of(images, patch):
    """Number of the image that begins at a patch."""
    return int((images.grids_I3.prod(dim=1).cumsum(0) <= patch).sum())


def test_nothing_of_images_is_predicted():
    own = layout()
    batch = next(shapes_loader(text=False))
    inserted = torch.isin(batch.input_ids_BS, torch.tensor([own.start_id, own.image_id, own.end_id]))
    assert inserted.any()
    assert (batch.labels_BS[inserted] == -100).all()
    starts = batch.position_ids_BS == 0
    text = batch.valid_mask_BS & ~inserted & ~starts
    assert torch.equal(batch.labels_BS[text], batch.input_ids_BS[text])
    assert int((batch.labels_BS != -100).sum()) == batch.num_label_tokens


def test_positions_are_the_stock_model_s_for_each_document():
    model = qwen3_vl_debugmodel().model.build(vocab_size=VOCAB, seq_len=96)
    own = qwen3_vl_debugmodel().model.image_layout(VOCAB)
    rng = np.random.default_rng(0)

    def document(number):
        shown = [grid_picture(own, rng.integers(1, 5, 2)) for _ in range(rng.integers(0, 4))]
        text = "<image>".join("ab" * int(rng.integers(0, 4)) for _ in range(len(shown) + 1))
        return Document(text=text, domain="d", name=str(number)), tuple(shown)

    documents = [document(number) for number in range(40)]
    store = tokenize_images(documents, ByteTokenizer(), own, seq_len=96, marker="<image>")
    config = DataConfig(source="shapes", seq_len=96, microbatch_size=8, validation_fraction=0.0)
    from trimtab.train.data import TokenLoader

    loader = TokenLoader(
        config, tokenizer=ByteTokenizer(), train=store, validation=store.select(np.array([], int))
    )
    batch = next(loader)
    bounds, grid = batch.cu_seqlens_G.tolist(), 0
    positions = batch.images.positions_3BS.flatten(1)
    compared = 0
    for first, end in pairwise(bounds):
        ids = batch.input_ids_BS.flatten()[None, first:end]
        visual = batch.images.visual_mask_BS.flatten()[None, first:end]
        num_images = int((ids == own.start_id).sum())
        grids = batch.images.grids_I3[grid : grid + num_images]
        grid += num_images
        want, _ = model.model.get_rope_index(ids, visual.int(), image_grid_thw=grids)
        assert torch.equal(positions[:, first:end], want[:, 0])
        compared += num_images > 1
    assert compared > 5


def grid_picture(own, cells):
    return Drawing(
        layout=own,
        shape="disc",
        colour="red",
        place="middle",
        cells=(int(cells[0]), int(cells[1])),
        key=str(cells),
    )


def test_padded_rows_hold_one_document():
    batch = next(shapes_loader(packing=False, microbatch_size=4))
    assert batch.num_sequences == 4
    assert len(batch.images.grids_I3) == int((batch.input_ids_BS == VOCAB).sum())


def test_rows_without_images_have_none():
    loader = shapes_loader(domain_pure=True)
    numbers = [len(next(loader).images.grids_I3) for _ in range(12)]
    assert min(numbers) == 0
    assert max(numbers) > 0


def test_a_part_of_an_image_is_refused():
    own = layout()
    images_BS = np.full((1, 4), -1)
    images_BS[0, 2:] = 0
    pictures = Pictures(own, (grid_picture(own, (2, 2)),))
    with pytest.raises(ValueError, match="holds a part of image"):
        pictures.to_inputs(images_BS, np.arange(4)[None])


# ------------------------------------------------------------------ a sequence of microbatches


def test_every_machine_draws_the_same():
    one, other = shapes_loader(), shapes_loader()
    for _ in range(3):
        assert_same(next(one), next(other))
    assert not torch.equal(next(one).input_ids_BS, next(shapes_loader(seed=1)).input_ids_BS)


def test_a_run_continues_where_it_was():
    loader = shapes_loader()
    for _ in range(3):
        next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = shapes_loader()
    resumed.load_state_dict(state)
    for _ in range(30):  # into the second epoch
        assert_same(next(loader), next(resumed))


def test_other_images_are_another_run():
    state = shapes_loader().state_dict()
    config = DataConfig(source="shapes", seq_len=96, microbatch_size=2)
    for other in (ShapesConfig(num_documents=60, seed=1), ShapesConfig(num_documents=60, max_side=2)):
        loader = replace(config, images=ImagesConfig(shapes=other)).build(
            image_layout=lambda vocab_size: layout()
        )
        with pytest.raises(ValueError, match="the data differ"):
            loader.load_state_dict(state)


def test_ranks_read_what_one_would():
    whole = shapes_loader()
    ranks = [shapes_loader(rank=rank, world_size=2) for rank in range(2)]
    for _ in range(3):
        for rank in ranks:
            assert_same(next(rank), next(whole))


def test_validation_holds_out_whole_documents():
    loader = shapes_loader(validation_fraction=0.2)
    held_out, trained = set(), set()
    for _, batch in loader.validation_batches():
        held_out |= captions(batch)
    for _ in range(60):
        trained |= captions(next(loader))
    assert held_out
    assert trained
    assert not held_out & trained


def captions(batch):
    """Documents of shapes, by what identifies them: their patches and text."""
    found, patch = set(), 0
    bounds = batch.cu_seqlens_G.tolist()
    grids = iter(batch.images.grids_I3.prod(dim=1).tolist())
    for first, end in pairwise(bounds):
        ids = batch.input_ids_BS.flatten()[first:end]
        sizes = [next(grids) for _ in range(int((ids == VOCAB).sum()))]
        if sizes:
            text = bytes(i for i in ids.tolist() if i < 256).split(b".")[0]
            found.add((text, batch.images.patches_PX[patch : patch + sum(sizes)].numpy().tobytes()))
        patch += sum(sizes)
    return found


def test_ranks_without_the_tower_read_no_image():
    config = qwen3_vl_debugmodel()
    run = config.for_world(1)
    with_tower, without = (config.build_loader(run, stages=stages) for stages in ((0, 3), (1, 2)))
    for _ in range(3):
        whole, rest = next(with_tower), next(without)
        assert len(whole.images.patches_PX) == int(whole.images.grids_I3.prod(dim=1).sum()) > 0
        assert len(rest.images.patches_PX) == 0
        assert torch.equal(rest.images.positions_3BS, whole.images.positions_3BS)
        assert torch.equal(rest.images.visual_mask_BS, whole.images.visual_mask_BS)


# ------------------------------------------------------------------ documents


def store_of(text, num_images, **options):
    own = layout()
    shown = tuple(grid_picture(own, (1, 2)) for _ in range(num_images))
    given = {"seq_len": 64, "marker": "<image>", **options}
    return tokenize_images(
        [(Document(text=text, domain="d", name="x"), shown)], ByteTokenizer(), own, **given
    )


def test_images_stand_where_the_text_says():
    image = [VOCAB, VOCAB + 1, VOCAB + 1, VOCAB + 2]
    assert store_of("a<image>b<image>", 2).tokens_N.tolist() == [97, *image, 98, *image, 257]
    assert store_of("ab", 2).tokens_N.tolist() == [*image, *image, 97, 98, 257]
    assert store_of("ab", 1, add_bos=True).tokens_N.tolist() == [256, *image, 97, 98, 257]
    assert store_of("a<image>b<image>", 2).images_N.tolist() == [-1, -1, 0, 0, -1, -1, -1, 1, 1, -1, -1]


def test_text_without_images_keeps_its_markers_and_is_cut():
    store = store_of("<image>" * 20, 0)
    assert store.lengths_D.tolist() == [64, 64, 13]
    assert (store.images_N == -1).all()


@pytest.mark.parametrize(
    ("text", "num_images", "message"),
    [
        ("a<image>", 2, "'x' has 2 images and 1 markers '<image>'"),
        ("a" * 60, 1, "'x' has 65 tokens with its 1 images, which do not fit into data.seq_len=64"),
    ],
)
def test_documents_that_do_not_fit(text, num_images, message):
    with pytest.raises(ValueError, match=message):
        store_of(text, num_images)


def test_text_cannot_pretend_to_be_an_image():
    own = layout(start_id=97)
    documents = [(Document(text="cab", domain="d", name="x"), ())]
    with pytest.raises(ValueError, match="'x' has token 97 in its text, which stands for images"):
        tokenize_images(documents, ByteTokenizer(), own, seq_len=8, marker="<image>")


# ------------------------------------------------------------------ the user's files


@pytest.fixture
def folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (40, 25)), ("b.png", (16, 16))):
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        image.fromarray(pixels).save(tmp_path / "images" / name)
    return tmp_path


def write(folder, *records):
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def read(path, **options):
    config = ImagesConfig(enable=True, min_pixels=64, max_pixels=2000, **options)
    return list(read_image_documents([path], config, layout()))


def test_files_name_images(folder):
    path = write(
        folder,
        {"text": "one", "image": "images/a.png"},
        {"text": "x <image> y <image>", "image": ["images/b.png", "images/a.png"], "domain": "pairs"},
        {"text": "none"},
    )
    (_, first), (second, pair), (_, none) = read(path)
    assert [len(first), len(pair), len(none)] == [1, 2, 0]
    assert second.domain == "pairs"
    assert first[0].grid == (6, 10)
    assert first[0].patches().shape == (60, layout().patch_dim)
    assert pair[0].grid == (4, 4)
    assert len({picture.name for picture in pair}) == 2


def test_a_turned_photograph(folder):
    image = pytest.importorskip("PIL.Image")
    picture = image.open(folder / "images" / "a.png")
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(folder / "images" / "turned.png", exif=exif)
    ((_, shown),) = read(write(folder, {"text": "one", "image": "images/turned.png"}))
    assert shown[0].grid == (10, 6)
    assert shown[0].patches().shape == (60, layout().patch_dim)


def test_images_of_files_reach_the_loader(folder):
    records = [{"text": f"caption {i}", "image": "images/a.png"} for i in range(20)]
    config = DataConfig(
        source=write(folder, *records),
        seq_len=64,
        microbatch_size=2,
        validation_fraction=0.0,
        images=ImagesConfig(enable=True, min_pixels=64, max_pixels=600),
    )
    batch = next(config.build(image_layout=lambda vocab_size: layout()))
    assert len(batch.images.grids_I3) == batch.num_sequences >= 2
    assert len(batch.images.patches_PX) == int(batch.images.grids_I3.prod(dim=1).sum())


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x", "image": "images/none.png"}, "line 1: image .*none.png cannot be read"),
        ({"text": "x", "image": "captions.jsonl"}, "line 1: image .*captions.jsonl cannot be read"),
        (
            {"text": "x", "image": 3},
            "line 1: field 'image' must be the path of an image or a list of paths, got 3",
        ),
        ({"text": "", "image": "images/a.png"}, "line 1: field 'text' must be text, got ''"),
        ({"caption": "x"}, "line 1: no field 'text'"),
    ],
)
def test_records_that_cannot_be_used(folder, record, message):
    with pytest.raises(ValueError, match=message):
        read(write(folder, record))


def test_an_image_that_changes_during_a_run(folder):
    image = pytest.importorskip("PIL.Image")
    ((_, shown),) = read(write(folder, {"text": "one", "image": "images/a.png"}))
    image.new("RGB", (16, 40)).save(folder / "images" / "a.png")
    with pytest.raises(
        ValueError, match=r"a.png has changed while training: \(\d+, \d+\) patches, was \(6, 10\)"
    ):
        shown[0].patches()


def test_without_pillow(folder, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "PIL":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    path = write(folder, {"text": "one", "image": "images/a.png"})
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ValueError, match="line 1: images need the package pillow; install it with: pip install"
    ):
        read(path)


# ------------------------------------------------------------------ configuration


def test_a_model_without_tower_refuses_images():
    config = deepseek_v3_tiny()
    with pytest.raises(
        ValueError, match=r"data\.source='shapes' has images, which DeepseekV3ModelConfig does not"
    ):
        replace(config, data=replace(config.data, source="shapes"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_documents": 1}, "num_documents=1 must be at least 2; raise data.images.shapes.num_documents"),
        ({"min_side": 4}, "max_side=3 must be at least min_side=4"),
    ],
)
def test_shapes_are_validated(options, message):
    with pytest.raises(ValueError, match=message):
        ShapesConfig(**options)


def test_images_are_validated():
    with pytest.raises(ValueError, match=r"min_pixels=10 must be in \[1, max_pixels=5\]"):
        ImagesConfig(enable=True, min_pixels=10, max_pixels=5)
    with pytest.raises(ValueError, match=r"marker='' is empty; set data\.images\.marker"):
        ImagesConfig(enable=True, marker="")
    with pytest.warns(UserWarning, match=r"data\.images\.marker has no effect without data\.images\.enable"):
        ImagesConfig(marker="*")
    with pytest.raises(
        ValueError, match=r"images\.enable is for files that name images, and source='embedded' has none"
    ):
        DataConfig(seq_len=8, microbatch_size=1, images=ImagesConfig(enable=True))
    with pytest.warns(UserWarning, match=r"data\.images\.shapes has no effect with source='fixed'"):
        DataConfig(
            seq_len=8,
            microbatch_size=1,
            source="fixed",
            images=ImagesConfig(shapes=ShapesConfig(max_images=1)),
        )


def test_conversations_have_no_images():
    from trimtab.train.chat import ChatConfig

    with pytest.raises(ValueError, match="conversations are of text, and this source has images"):
        DataConfig(seq_len=8, microbatch_size=1, source="shapes", chat=ChatConfig(enable=True))
