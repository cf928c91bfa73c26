"""A tokenizer learnt from texts: it loses nothing, and cuts where a memory's facts want it."""

import pytest

from gemma_jax import text
from gemma_jax.errors import UsageError
from gemma_jax.train.tokenizer import SMALLEST, learn_tokenizer, save_tokenizer

TEXTS = ["In the beginning was the word, and the word was 1234 times in the book.\n"] * 20


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    directory = save_tokenizer(learn_tokenizer(TEXTS, 512), tmp_path_factory.mktemp("tokenizer"))
    return text.load_tokenizer(directory)


@pytest.mark.parametrize(
    "content",
    [TEXTS[0], " the word", "Ünïcödé 漢字 🙂", "tabs\tand  two spaces\n\n", "<bos> is text"],
)
def test_ids_become_the_text_again(learnt, content):
    assert learnt.backend_tokenizer.decode(text.encode(learnt, content)) == content


def test_frequent_words_are_one_token_and_digits_one_each(learnt):
    assert len(text.encode(learnt, " the word")) == 2
    assert len(text.encode(learnt, " 98765")) == 6
    assert len(text.encode(learnt, " word.")) == 2


def test_a_text_is_tokenised_in_pieces_as_at_once(learnt):
    whole = TEXTS[0] * 300
    pieces = [whole[i : i + 97] for i in range(0, len(whole), 97)]
    found = [i for some in text.encode_stream(learnt, pieces) for i in some]
    assert found == learnt.backend_tokenizer.encode(whole, add_special_tokens=False).ids


def test_control_tokens_have_the_ids_of_gemma(learnt):
    assert [learnt.convert_tokens_to_ids(f"<{name}>") for name in ("pad", "eos", "bos")] == [
        0,
        1,
        2,
    ]


def test_equal_texts_give_equal_tokenizers_of_at_most_the_size():
    one, other = (learn_tokenizer(TEXTS, 400) for _ in range(2))
    assert one.to_str() == other.to_str() and SMALLEST <= one.get_vocab_size() <= 400


def test_a_size_without_room_for_characters_is_refused():
    with pytest.raises(UsageError, match="too small"):
        learn_tokenizer(TEXTS, SMALLEST - 1)
