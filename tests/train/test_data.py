import json
import time

import numpy as np
import pytest
import torch

from trimtab.train.corpus import Document, EmbeddedCorpusConfig
from trimtab.train.data import DataConfig, TokenLoader
from trimtab.train.packing import TokenBatch
from trimtab.train.token_store import split_validation, tokenize
from trimtab.train.tokenizer import ByteTokenizer

EOS = 257


def store_of(*texts):
    documents = [Document(text=text, domain="d", name=str(i)) for i, text in enumerate(texts)]
    return tokenize(documents, ByteTokenizer())


def loader(
    store,
    *,
    rank=0,
    world_size=1,
    validation_fraction=0.0,
    forward_rows=None,
    global_batch_size=None,
    **options,
):
    options = {"seq_len": 8, "microbatch_size": 2, **options}
    config = DataConfig(source="unused", validation_fraction=validation_fraction, **options)
    train, validation = split_validation(store, validation_fraction)
    return TokenLoader(
        config,
        tokenizer=ByteTokenizer(),
        train=train,
        validation=validation,
        rank=rank,
        world_size=world_size,
        microbatch_size=forward_rows,
        global_batch_size=global_batch_size,
    )


def three_domains(num_documents=40):
    rng = np.random.default_rng(0)
    made = []
    for domain, share in (("a", 1), ("b", 2), ("c", 4)):
        for i in range(num_documents * share):
            text = domain * int(rng.integers(1, 30))
            made.append(Document(text=text, domain=domain, name=f"{domain}{i}"))
    return tokenize(made, ByteTokenizer())


def assert_same(first: TokenBatch, second: TokenBatch):
    for name in TokenBatch.__dataclass_fields__:
        a, b = getattr(first, name), getattr(second, name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), name
        else:
            assert a == b, name


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("domain_pure", [True, False])
@pytest.mark.parametrize("consumed", [0, 1, 37])
def test_resume_is_bitwise(packing, domain_pure, consumed):
    options = {"packing": packing, "domain_pure": domain_pure, "seed": 5}
    store = three_domains(num_documents=4)
    first = loader(store, **options)
    for _ in range(consumed):
        next(first)
    state = json.loads(json.dumps(first.state_dict()))
    rest = [next(first) for _ in range(60)]
    assert first.epoch > 1, "the comparison must cross an epoch"
    second = loader(store, **options)
    next(second)
    second.load_state_dict(state)
    for expected in rest:
        assert_same(next(second), expected)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("domain_pure", [True, False])
def test_ranks_share_the_sequence_of_one_rank(world_size, domain_pure):
    store = three_domains()
    alone = loader(store, domain_pure=domain_pure)
    ranks = [loader(store, domain_pure=domain_pure, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(20):
        for rank in ranks:
            assert_same(next(rank), next(alone))
    assert all(rank.state_dict() == alone.state_dict() for rank in ranks)
    assert ranks[0].epoch == alone.epoch


def test_resume_on_another_number_of_ranks():
    store = three_domains()
    ranks = [loader(store, rank=r, world_size=2) for r in range(2)]
    for rank in ranks:
        for _ in range(3):
            next(rank)
    alone = loader(store)
    alone.load_state_dict(ranks[0].state_dict())
    assert_same(next(alone), next(ranks[0]))
    assert_same(next(alone), next(ranks[1]))
    resumed = loader(store, rank=1, world_size=2)
    resumed.load_state_dict(alone.state_dict())
    assert_same(next(resumed), next(ranks[1]))
    four = loader(store, rank=0, world_size=4)
    with pytest.raises(ValueError, match=r"after 6 microbatches, which do not divide among 4 data ranks"):
        four.load_state_dict(ranks[1].state_dict() | {"num_microbatches": 6})


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("domain_pure", [True, False])
@pytest.mark.parametrize(("num_ranks", "rows"), [(1, 1), (2, 1), (4, 1), (2, 2), (1, 8), (1, 3)])
def test_the_rows_of_a_step_do_not_depend_on_how_they_are_divided(domain_pure, shuffle, num_ranks, rows):
    """Two steps of 12 rows (24 for 8 at once), in order of microbatches, are those of one forward of four rows."""
    store, options = three_domains(), {"domain_pure": domain_pure, "shuffle": shuffle, "microbatch_size": 4}
    whole = loader(store, **options)
    ranks = [
        loader(store, rank=r, world_size=num_ranks, forward_rows=rows, **options) for r in range(num_ranks)
    ]
    expected = torch.cat([next(whole).input_ids_BS for _ in range(6)])
    batches = [next(rank) for _ in range(24 // (rows * num_ranks)) for rank in ranks]
    assert {len(batch.input_ids_BS) for batch in batches} == {rows}
    assert torch.equal(torch.cat([batch.input_ids_BS for batch in batches]), expected)
    assert ranks[0].state_dict() == whole.state_dict()
    assert ranks[0].epoch == whole.epoch
    again = loader(store, rank=num_ranks - 1, world_size=num_ranks, forward_rows=rows, **options)
    again.load_state_dict(whole.state_dict())
    for rank in ranks:
        expected_batch = next(rank)
    assert_same(next(again), expected_batch)


def test_rows_of_a_step_are_drawn_together_where_no_size_is_given():
    store = three_domains()
    alone = loader(store, microbatch_size=None, global_batch_size=4, domain_pure=True)
    ranks = [
        loader(
            store,
            microbatch_size=None,
            global_batch_size=4,
            domain_pure=True,
            rank=r,
            world_size=2,
            forward_rows=2,
        )
        for r in range(2)
    ]
    for _ in range(10):
        whole, parts = next(alone), [next(rank) for rank in ranks]
        assert len(whole.domain_ids_BS.unique()) == 1
        assert torch.equal(torch.cat([part.input_ids_BS for part in parts]), whole.input_ids_BS)
    with pytest.raises(ValueError, match=r"microbatch_size=None draws .* say global_batch_size"):
        loader(store, microbatch_size=None)


def test_a_state_inside_a_chunk_is_refused():
    data = loader(three_domains(), microbatch_size=4, forward_rows=1)
    next(data)
    with pytest.raises(ValueError, match=r"1 of 4 rows that are drawn together are read"):
        data.state_dict()


def test_validation_is_the_same_text_however_rows_are_divided():
    options = {"validation_fraction": 0.2, "microbatch_size": 4, "max_validation_microbatches": 2}
    store = three_domains()
    tokens = []
    for num_ranks, rows in ((1, 4), (2, 1), (1, 2)):
        shares = [
            list(
                loader(store, rank=r, world_size=num_ranks, forward_rows=rows, **options).validation_batches()
            )
            for r in range(num_ranks)
        ]
        assert {tuple(batch.input_ids_BS.shape) for share in shares for _, batch in share} == {(rows, 8)}
        seen = [b.input_ids_BS[b.valid_mask_BS] for step in zip(*shares, strict=True) for _, b in step]
        tokens.append(torch.cat(seen))
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])


def test_domain_pure_microbatches_in_proportion():
    store = three_domains()
    data = loader(store, domain_pure=True, seq_len=16)
    assert data.domains == ("a", "b", "c")
    seen = []
    for _ in range(data.microbatches_per_epoch):
        ids = next(data).domain_ids_BS.unique().tolist()
        assert len(ids) == 1
        seen += ids
    sizes = np.array(list(data.num_tokens_per_domain.values()))
    np.testing.assert_allclose(np.bincount(seen), sizes / 32, atol=0.51)
    # Every stretch holds the domains in proportion, not only the whole epoch.
    for start in range(0, len(seen) - 28, 14):
        share = np.bincount(seen[start : start + 28], minlength=3) / 28
        np.testing.assert_allclose(share, sizes / sizes.sum(), atol=3 / 28)
    # And the order is not a fixed pattern.
    other = loader(store, domain_pure=True, seq_len=16, seed=1)
    assert seen != [int(next(other).domain_ids_BS[0, 0]) for _ in seen]


def test_mixed_microbatches_hold_several_domains():
    data = loader(three_domains(), seq_len=64, microbatch_size=4)
    assert all(len(next(data).domain_ids_BS.unique()) > 1 for _ in range(5))


def test_shuffled_rows_are_every_row_of_every_domain():
    """Each cycle reads each domain's rows of that stretch of text once, in another order."""
    texts = {"a": "abcdefgh" * 3, "b": "ijklmnop" * 9}
    made = [Document(text=text, domain=d, name=d) for d, text in texts.items()]
    data = loader(tokenize(made, ByteTokenizer()), domain_pure=True, seq_len=4, microbatch_size=1)
    streams = [[*text.encode(), EOS] * 4 for text in texts.values()]
    moved = 0
    for cycle in range(3):
        seen = {0: [], 1: []}
        for _ in range(data.microbatches_per_epoch):
            batch = next(data)
            seen[int(batch.domain_ids_BS[0, 0])].append(batch.input_ids_BS.flatten().tolist())
        for i, stream in enumerate(streams):
            n = len(seen[i])
            rows = [stream[4 * r : 4 * r + 4] for r in range(cycle * n, (cycle + 1) * n)]
            assert sorted(seen[i]) == sorted(rows)
            moved += seen[i] != rows
    assert moved >= 4


def test_rows_of_a_microbatch_are_of_several_documents():
    made = [Document(text=chr(97 + i) * 400, domain="d", name=str(i)) for i in range(12)]
    data = loader(tokenize(made, ByteTokenizer()), seq_len=16, microbatch_size=8)
    letters = [len(set(next(data).input_ids_BS[:, 0].tolist()) - {EOS}) for _ in range(20)]
    assert sum(letters) / 20 > 4


def test_without_shuffling_the_order_is_the_sources():
    data = loader(store_of(*"abcdefgh"), shuffle=False, seq_len=4)
    first = [next(data).input_ids_BS.flatten().tolist() for _ in range(3)]
    assert first[0] == [97, EOS, 98, EOS, 99, EOS, 100, EOS]
    assert first[2] == first[0]
    shuffled_data = loader(store_of(*"abcdefgh"), seq_len=4)
    assert next(shuffled_data).input_ids_BS.flatten().tolist() != first[0]


def test_seeds_differ_and_repeat():
    store = three_domains()
    one, same, other = (next(loader(store, seed=seed)) for seed in (1, 1, 2))
    assert_same(one, same)
    assert not torch.equal(one.input_ids_BS, other.input_ids_BS)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_sees_each_held_out_token_once_on_all_ranks_together(packing, world_size):
    store = three_domains(num_documents=10)
    options = {"validation_fraction": 0.2, "packing": packing, "world_size": world_size}
    ranks = [loader(store, rank=r, **options) for r in range(world_size)]
    shares = [list(rank.validation_batches()) for rank in ranks]
    assert len({tuple(name for name, _ in share) for share in shares}) == 1, "collectives would not match"
    counts = dict.fromkeys("abc", 0)
    for share in shares:
        for name, batch in share:
            counts[name] += batch.num_tokens
            text = ByteTokenizer().decode(batch.input_ids_BS[batch.valid_mask_BS].tolist())
            assert set(text) <= {name}
            assert batch.input_ids_BS.shape == (2, 8)
    assert counts == ranks[0].num_validation_tokens_per_domain
    assert min(counts.values()) > 0
    again = list(ranks[0].validation_batches())
    for (_, a), (_, b) in zip(shares[0], again, strict=True):
        assert_same(a, b)


def test_validation_limit_counts_all_ranks():
    store = three_domains()
    options = {"validation_fraction": 0.2, "max_validation_microbatches": 3, "world_size": 2}
    full = [list(loader(store, rank=r, **options).validation_batches()) for r in range(2)]
    alone = list(loader(store, **{**options, "world_size": 1}).validation_batches())
    assert [name for name, _ in alone] == ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    assert len(full[0]) == len(full[1]) == 6
    assert [batch.num_tokens > 0 for _, batch in full[1]] == [True, False] * 3
    assert sum(b.num_tokens for share in full for _, b in share) == sum(b.num_tokens for _, b in alone)


def test_validation_does_not_move_the_training_data():
    store = three_domains()
    data, other = (loader(store, validation_fraction=0.1) for _ in range(2))
    next(data), next(other)
    list(data.validation_batches())
    assert_same(next(data), next(other))


def test_validation_without_held_out_text():
    with pytest.raises(ValueError, match=r"validation_fraction=0 held nothing out"):
        next(loader(three_domains()).validation_batches())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 10}, r"seq_len \(saved 8, now 10\)"),
        ({"microbatch_size": 3}, r"microbatch_size \(saved 2, now 3\)"),
        ({"packing": False}, r"packing \(saved True, now False\)"),
        ({"domain_pure": True}, r"domain_pure \(saved False, now True\)"),
        ({"shuffle": False, "seed": 4}, r"shuffle \(saved True, now False\), seed \(saved 0, now 4\)"),
        ({"validation_fraction": 0.1}, r"text \(saved '\w+', now '\w+'\)"),
    ],
)
def test_resume_refuses_other_data(options, message):
    store = three_domains()
    state = loader(store).state_dict()
    with pytest.raises(ValueError, match=rf"differ from those of the checkpoint: {message}; .* new run"):
        loader(store, **options).load_state_dict(state)


def test_resume_refuses_another_text_and_another_tokenizer():
    state = loader(three_domains()).state_dict()
    with pytest.raises(ValueError, match=r"checkpoint: text \(saved"):
        loader(three_domains(num_documents=41)).load_state_dict(state)
    state["fingerprint"]["tokenizer"] = "hf-123"
    with pytest.raises(ValueError, match=r"tokenizer \(saved 'hf-123', now 'byte-v1'\)"):
        loader(three_domains()).load_state_dict(state)


def test_resume_refuses_a_foreign_state():
    with pytest.raises(
        ValueError, match=r"data state has keys \['step'\] and version None, expected version 1"
    ):
        loader(three_domains()).load_state_dict({"step": 3})


def test_batch_to_moves_every_tensor():
    batch = next(loader(three_domains()))
    moved = batch.to("meta")
    for name in TokenBatch.__dataclass_fields__:
        if isinstance(getattr(batch, name), torch.Tensor):
            assert getattr(moved, name).device.type == "meta", name
    assert moved.num_tokens == batch.num_tokens


def test_warnings_of_settings_without_effect():
    with pytest.warns(UserWarning, match=r"domain_pure has no effect: 'd' is the only domain"):
        loader(store_of("a" * 100), domain_pure=True)
    with pytest.warns(
        UserWarning, match=r"d: 1.25 rows of seq_len=8 do not fill a microbatch of 2: text repeats"
    ):
        loader(store_of("a" * 9))
    with pytest.warns(UserWarning, match=r"data.embedded has no effect with source='fixed'"):
        DataConfig(
            seq_len=8,
            microbatch_size=1,
            source="fixed",
            embedded=EmbeddedCorpusConfig(domains=("cpp",)),
        )
    with pytest.warns(UserWarning, match=r"data.text_field has no effect with source='embedded'"):
        DataConfig(seq_len=8, microbatch_size=1, text_field="content")
    with pytest.warns(UserWarning, match=r"max_validation_microbatches has no effect"):
        DataConfig(seq_len=8, microbatch_size=1, validation_fraction=0, max_validation_microbatches=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, r"seq_len=1 must be at least 2"),
        ({"microbatch_size": 0}, r"microbatch_size=0 must be at least 1"),
        ({"seed": -1}, r"seed=-1 must be at least 0"),
        ({"validation_fraction": 0.6}, r"validation_fraction=0.6 must be in \[0, 0.5\]"),
        ({"max_validation_microbatches": 0}, r"max_validation_microbatches=0 must be at least 1"),
        ({"source": ()}, r"source=\(\) names nothing"),
        ({"source": ""}, r"source='' names nothing"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"seq_len": 8, "microbatch_size": 2, **options})


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 1), (0, 0)])
def test_rank_out_of_range(rank, world_size):
    with pytest.raises(ValueError, match=rf"rank={rank} must be in \[0, world_size={world_size}\)"):
        loader(three_domains(), rank=rank, world_size=world_size)


def test_default_embedded_loader_is_fast_and_complete():
    start = time.perf_counter()
    data = DataConfig(seq_len=192, microbatch_size=2, domain_pure=True).build()
    assert time.perf_counter() - start < 3
    assert data.domains == ("cpp", "prose", "python", "yaml")
    sizes = data.num_tokens_per_domain
    assert min(sizes.values()) > 300_000
    for name, held_out in data.num_validation_tokens_per_domain.items():
        assert 0.02 < held_out / sizes[name] < 0.07
    batch = next(data)
    assert batch.input_ids_BS.shape == (2, 192)
    assert len(ByteTokenizer().decode(batch.input_ids_BS.flatten().tolist())) > 300


def test_fixed_source_golden():
    data = DataConfig(
        seq_len=64, microbatch_size=1, source="fixed", shuffle=False, validation_fraction=0
    ).build()
    assert data.domains == ("cpp", "prose", "python", "yaml")
    text = ByteTokenizer().decode(next(data).input_ids_BS[0].tolist())
    assert text == "A trim tab is a small surface hinged to the trailing edge of a l"
    assert sum(data.num_tokens_per_domain.values()) == 10_034
