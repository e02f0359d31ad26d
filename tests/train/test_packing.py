import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.train.corpus import Document
from trimtab.train.packing import PackedRows, PaddedRows, in_order, shuffled
from trimtab.train.token_store import TokenStore, tokenize
from trimtab.train.tokenizer import ByteTokenizer

BOS, EOS, PAD = 256, 257, 258


def store_of(*texts, add_bos=False):
    documents = [Document(text=text, domain="d", name=str(i)) for i, text in enumerate(texts)]
    return tokenize(documents, ByteTokenizer(), add_bos=add_bos)


def test_packed_batch_literal():
    batch = PackedRows(store_of("abc", "d", "efgh"), 5, in_order).read(0, 2).to_batch(PAD)
    # abc<eos> d<eos> efgh<eos> cut every five tokens; the eleventh token is the next row's.
    assert batch.input_ids_BS.tolist() == [[97, 98, 99, EOS, 100], [EOS, 101, 102, 103, 104]]
    assert batch.labels_BS.tolist() == [[-100, 98, 99, EOS, -100], [-100, -100, 102, 103, 104]]
    assert batch.position_ids_BS.tolist() == [[0, 1, 2, 3, 0], [0, 0, 1, 2, 3]]
    assert batch.cu_seqlens_G.tolist() == [0, 4, 5, 6, 10]
    assert batch.cu_seqlens_G.dtype == torch.int32
    assert batch.document_ids_BS().tolist() == [[0, 0, 0, 0, 1], [2, 3, 3, 3, 3]]
    assert batch.valid_mask_BS.all()
    assert batch.domain_ids_BS.tolist() == [[0] * 5] * 2
    assert (batch.num_tokens, batch.num_label_tokens, batch.num_sequences) == (10, 6, 4)


def test_padded_batch_literal():
    batch = PaddedRows(store_of("abcdef", "g"), 5, in_order).read(0, 3).to_batch(PAD)
    # A chunk of a long document is a row and a segment of its own.
    assert batch.input_ids_BS.tolist() == [
        [97, 98, 99, 100, 101],
        [102, EOS, PAD, PAD, PAD],
        [103, EOS, PAD, PAD, PAD],
    ]
    ignored = [-100] * 3
    assert batch.labels_BS.tolist() == [
        [-100, 98, 99, 100, 101],
        [-100, EOS, *ignored],
        [-100, EOS, *ignored],
    ]
    assert batch.valid_mask_BS.sum(1).tolist() == [5, 2, 2]
    assert batch.domain_ids_BS[1].tolist() == [0, 0, -1, -1, -1]
    assert batch.position_ids_BS.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert batch.cu_seqlens_G.tolist() == [0, 5, 10, 15]
    assert (batch.num_tokens, batch.num_label_tokens, batch.num_sequences) == (9, 6, 3)


def test_bos_makes_the_first_token_predicted():
    store = store_of("ab", add_bos=True)
    batch = PackedRows(store, 4, in_order).read(0, 1).to_batch(PAD)
    assert batch.input_ids_BS.tolist() == [[BOS, 97, 98, EOS]]
    assert batch.labels_BS.tolist() == [[-100, 97, 98, EOS]]


def naive_packing(store: TokenStore, orders, seq_len, num_rows):
    """Token by token: (id, label, position, segment, domain) of each place of the rows."""
    stream = []
    for order in orders:
        for d in order:
            ids = store.tokens_N[store.offsets_D[d] : store.offsets_D[d + 1]].tolist()
            stream += [(token, i == 0, int(store.domain_ids_D[d])) for i, token in enumerate(ids)]
    places, segment, position = [], -1, 0
    for t, (token, is_first, domain) in enumerate(stream[: seq_len * num_rows]):
        if is_first or t % seq_len == 0:
            segment, position = segment + 1, 0
        places.append((token, token if position else -100, position, segment, domain))
        position += 1
    return places


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=8),
    seq_len=st.integers(2, 9),
    first_row=st.integers(0, 12),
    num_rows=st.integers(1, 6),
    seed=st.integers(0, 2**40),
)
def test_packing_matches_the_naive_loop_at_any_row(lengths, seq_len, first_row, num_rows, seed):
    store = store_of(*("abcdefghijkl"[:n] for n in lengths))
    permute = shuffled(seed, 0, 0)
    num_epochs = (first_row + num_rows) * seq_len // len(store.tokens_N) + 1
    orders = [permute(epoch, len(lengths)) for epoch in range(num_epochs)]
    expected = naive_packing(store, orders, seq_len, first_row + num_rows)[first_row * seq_len :]
    batch = PackedRows(store, seq_len, permute).read(first_row, num_rows).to_batch(PAD)
    ids, labels, positions, segments, domains = zip(*expected, strict=True)
    assert batch.input_ids_BS.flatten().tolist() == list(ids)
    assert batch.labels_BS.flatten().tolist() == list(labels)
    assert batch.position_ids_BS.flatten().tolist() == list(positions)
    assert batch.document_ids_BS().flatten().tolist() == [s - segments[0] for s in segments]
    assert batch.domain_ids_BS.flatten().tolist() == list(domains)
    assert batch.num_label_tokens == sum(label != -100 for label in labels)
    assert batch.num_sequences == segments[-1] - segments[0] + 1 == len(batch.cu_seqlens_G) - 1


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=8),
    seq_len=st.integers(2, 9),
    rows=st.sampled_from([PackedRows, PaddedRows]),
    seed=st.integers(0, 100),
)
def test_no_token_is_lost_or_repeated_in_an_epoch(lengths, seq_len, rows, seed):
    store = store_of(*(chr(97 + i) * n for i, n in enumerate(lengths)))
    stream = rows(store, seq_len, shuffled(seed, 0, 0))
    num_rows = -int(-stream.rows_per_epoch // 1) + 2
    batch = stream.read_once(0, num_rows).to_batch(PAD)
    tokens = batch.input_ids_BS[batch.valid_mask_BS].tolist()
    assert sorted(tokens) == sorted(store.tokens_N.tolist())
    assert batch.num_tokens == len(tokens) == sum(lengths) + len(lengths)
    padding = ~batch.valid_mask_BS
    assert (batch.input_ids_BS[padding] == PAD).all()
    assert (batch.labels_BS[padding] == -100).all()
    assert (batch.domain_ids_BS[padding] == -1).all()
    assert batch.cu_seqlens_G[-1] == num_rows * seq_len
    # Two rows of padding only are segments, but no sequences.
    assert batch.num_sequences == len(batch.cu_seqlens_G) - 1 - 2
    pieces = [stream.read_once(r, 1).to_batch(PAD).input_ids_BS for r in range(num_rows)]
    assert torch.equal(torch.cat(pieces), batch.input_ids_BS)


def test_padded_rows_shuffle_each_epoch_anew():
    texts = [chr(97 + i) for i in range(20)]
    stream = PaddedRows(store_of(*texts), 2, shuffled(3, 0, 0))
    epochs = [stream.read(20 * e, 20).ids_BS[:, 0].tolist() for e in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    across = stream.read(15, 10).ids_BS[:, 0].tolist()
    assert across == epochs[0][15:] + epochs[1][:5]


def test_shuffling_is_the_same_on_every_machine():
    # A stored order: a change would break resuming of every run.
    assert shuffled(7, 0, 2)(1, 10).tolist() == [9, 4, 6, 5, 7, 0, 1, 8, 3, 2]
    assert shuffled(7, 0, 2)(2, 10).tolist() != [9, 4, 6, 5, 7, 0, 1, 8, 3, 2]


def test_labels_are_what_a_hugging_face_model_expects():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).double().eval()
    texts = ("the first", "second one", "a third")
    batch = PackedRows(store_of(*texts), 29, in_order).read(0, 1).to_batch(PAD)
    packed = model(
        input_ids=batch.input_ids_BS,
        position_ids=batch.position_ids_BS,
        labels=batch.labels_BS,
        use_cache=False,
    ).loss
    total = torch.zeros((), dtype=torch.float64)
    for text in texts:
        ids = torch.tensor([[*text.encode(), EOS]])
        total = total + model(input_ids=ids, labels=ids).loss.double() * (ids.numel() - 1)
    assert batch.num_label_tokens == sum(map(len, texts))
    # The model takes its loss in float32.
    torch.testing.assert_close(packed.double() * batch.num_label_tokens, total, rtol=1e-6, atol=0)
