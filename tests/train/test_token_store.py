import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.train.corpus import Document
from trimtab.train.token_store import split_validation, tokenize
from trimtab.train.tokenizer import ByteTokenizer

EOS = 257


def store_of(*texts):
    documents = [Document(text=text, domain="d", name=str(i)) for i, text in enumerate(texts)]
    return tokenize(documents, ByteTokenizer())


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 60)), min_size=1, max_size=20),
    fraction=st.floats(0.01, 0.5),
)
def test_split_loses_nothing_and_holds_out_a_share_of_every_domain(lengths, fraction):
    made = [Document(text=d * (n + 1), domain=d, name=str(i)) for i, (d, n) in enumerate(lengths)]
    store = tokenize(made, ByteTokenizer())
    train, validation = split_validation(store, fraction)
    assert sorted([*train.tokens_N, *validation.tokens_N]) == sorted(store.tokens_N)
    for i in range(len(store.domains)):
        total, kept, held = (int(s.lengths_D[s.domain_ids_D == i].sum()) for s in (store, train, validation))
        target = max(1, round(fraction * total))
        assert kept > 0
        assert target / 2 <= held <= max(1.25 * target, 1)
        assert kept + held == total
    assert (train.lengths_D > 0).all()
    assert (validation.lengths_D > 0).all()


def test_split_depends_on_names_not_on_order():
    made = [Document(text=f"text {i}", domain="d", name=str(i)) for i in range(50)]

    def held_out(order):
        _, validation = split_validation(tokenize(order, ByteTokenizer()), 0.2)
        texts = np.split(validation.tokens_N, validation.offsets_D[1:-1])
        return {ByteTokenizer().decode(ids) for ids in texts}

    assert held_out(made) == held_out(made[::-1])
    assert 5 <= len(held_out(made)) <= 12


def test_split_of_one_document_takes_its_end():
    train, validation = split_validation(store_of("abcdefghi"), 0.3)
    assert train.tokens_N.tolist() == [*b"abcdefg"]
    assert validation.tokens_N.tolist() == [*b"hi", EOS]


def test_split_of_too_little_text():
    with pytest.raises(
        ValueError, match=r"domain 'd' has 1 tokens, too few to hold out validation_fraction=0.5"
    ):
        split_validation(store_of(""), 0.5)


def test_tokenize_errors():
    with pytest.raises(ValueError, match=r"the source holds no documents"):
        tokenize([], ByteTokenizer())

    class WithoutBos(ByteTokenizer):
        bos_id = None

    with pytest.raises(ValueError, match=r"add_bos=True needs a tokenizer with a bos token"):
        tokenize([Document(text="a", domain="d", name="0")], WithoutBos(), add_bos=True)
