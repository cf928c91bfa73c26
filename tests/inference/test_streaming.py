"""Ids to text as they come: exact, in whole characters, and never past a stop text."""

import functools

import hypothesis
import pytest
import tokenizers
import transformers
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from gemma_jax import random_model, text
from gemma_jax.errors import UsageError
from gemma_jax.inference.streaming import StopTexts, StreamDecoder

BOS, END_OF_TURN = 2, 5


def wrap(backend: tokenizers.Tokenizer) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


@functools.cache
def gemma_like():
    return wrap(random_model.make_tokenizer())


@functools.cache
def byte_level():
    """Its tokens are pieces of bytes, which may end within a character."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    corpus = ["the whale, the whale!", "漢字かな交じり文 Grüße"]
    backend.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet)
    )
    return wrap(backend)


@functools.cache
def metaspace():
    """Its decoder drops the space of the first token only: it looks at what comes before."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"])
    backend.train_from_iterator(["the whale, the whale!", "one two three"], trainer)
    return wrap(backend)


def decoded(tokenizer, ids) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(token) for token in ids), decoder.finish()]


@pytest.mark.parametrize("kind", [gemma_like, byte_level, metaspace])
@hypothesis.given(content=st.text(max_size=40))
@hypothesis.example("𤡼À")  # the fourth token of the first character begins the second one
@hypothesis.example("\N{REPLACEMENT CHARACTER}ăă")  # which is no half of a character here
@hypothesis.settings(max_examples=100, deadline=None)
def test_streaming_decode_gives_the_text_of_all_ids(kind, content):
    tokenizer = kind()
    ids = text.encode(tokenizer, content)
    assert "".join(decoded(tokenizer, ids)) == tokenizer.backend_tokenizer.decode(ids)


@pytest.mark.parametrize("kind", [gemma_like, byte_level])
def test_a_character_comes_whole_with_its_last_byte(kind):
    tokenizer = kind()
    ids = text.encode(tokenizer, "🦀")
    assert decoded(tokenizer, ids) == [*[""] * (len(ids) - 1), "🦀", ""]


def test_what_makes_no_character_is_not_held_for_ever():
    tokenizer = byte_level()
    given = decoded(tokenizer, [tokenizer.convert_tokens_to_ids("ÿ")] * 200)  # byte 0xFF
    assert "".join(given) == "\N{REPLACEMENT CHARACTER}" * 200
    assert len("".join(given[:-1])) > 100


def bytes_to_ids(tokenizer, data: bytes) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in data]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\xff", "�"),
        (b"\xe6\xbc", "��"),
        (b"\xe6\xbc\xa2\xff\xe6\xbc\xa2", "漢�漢"),
        (b"\x80A\xc3", "�A�"),
        ("é漢🦀".encode(), "é漢🦀"),
    ],
)
def test_bytes_that_make_no_character_are_replaced_one_by_one(data, expected):
    tokenizer = gemma_like()
    assert "".join(decoded(tokenizer, bytes_to_ids(tokenizer, data))) == expected


def test_incomplete_bytes_end_where_other_text_begins():
    tokenizer = gemma_like()
    the = tokenizer.convert_tokens_to_ids("▁people")
    assert decoded(tokenizer, [*bytes_to_ids(tokenizer, b"\xe6\xbc"), the, the]) == [
        "",
        "",
        "�� people",
        " people",
        "",
    ]


def test_control_tokens_and_ids_beyond_the_tokenizer_give_no_text():
    tokenizer = gemma_like()
    the = tokenizer.convert_tokens_to_ids("▁people")
    assert "".join(decoded(tokenizer, [BOS, the, END_OF_TURN, 100_000, the])) == " people people"


@pytest.mark.parametrize("kind", [gemma_like, byte_level])
@hypothesis.given(ids=st.lists(st.integers(0, 399), max_size=30))
@hypothesis.settings(max_examples=100, deadline=None)
def test_any_ids_decode_to_valid_text(kind, ids):
    "".join(decoded(kind(), ids)).encode()  # raises on halves of characters


# --- stop texts ---


@hypothesis.given(
    content=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    size=st.integers(1, 5),
)
def test_nothing_of_a_stop_text_is_ever_shown(content, stops, size):
    filter_ = StopTexts(stops)
    shown = ""
    for piece in (content[i : i + size] for i in range(0, len(content), size)):
        shown += filter_.push(piece)
        assert not any(stop in shown for stop in stops)
    shown += filter_.finish()
    if filter_.found:
        assert content.startswith(shown)
        assert any(content[len(shown) :].startswith(stop) for stop in stops)
    else:
        assert shown == content
        assert not any(stop in content for stop in stops)


def test_text_that_cannot_be_a_stop_text_is_not_held_back():
    filter_ = StopTexts(["\nUser:"])
    assert [
        filter_.push("hello"),
        filter_.push("\nUs"),
        filter_.push("a"),
        filter_.push("x\nUser: hi"),
    ] == [
        "hello",
        "",
        "\nUsa",
        "x",
    ]
    assert filter_.found


def test_an_empty_stop_text_is_refused():
    with pytest.raises(UsageError, match="stop"):
        StopTexts(["a", ""])
