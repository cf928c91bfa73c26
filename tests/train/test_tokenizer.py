"""A learnt tokenizer loses nothing, reads words and numbers in few tokens, and is Gemma's kind."""

import random
import re
from pathlib import Path

import pytest
import tokenizers

from gemma_jax import tasks, text
from gemma_jax.config import GemmaConfig
from gemma_jax.errors import UsageError
from gemma_jax.train import options
from gemma_jax.train.start import answer_words, new_size
from gemma_jax.train.tokenizer import (
    CHARACTERS,
    NUMBERS,
    SMALLEST,
    assemble,
    learn_tokenizer,
    save_tokenizer,
)

TEXTS = ["In the beginning was the word, and the word was 1234 times in the book.\n"] * 20
# One begins with another, one is learnt, one has a hyphen, one a letter that no text has.
WORDS = ("wine", "wine-cellar", "words", "word", "cellar", "Zoë", "swimming-pool", "swim")


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    tokenizer = learn_tokenizer(TEXTS, SMALLEST + 150, WORDS)
    return text.load_tokenizer(save_tokenizer(tokenizer, tmp_path_factory.mktemp("tokenizer")))


def tokens(tokenizer, content):
    return tokenizer.convert_ids_to_tokens(text.encode(tokenizer, content))


@pytest.mark.parametrize(
    "content",
    [
        TEXTS[0],
        " the word",
        "Ünïcödé 漢字 🙂",
        "tabs\tand  two spaces\n\n",
        "<bos> is text",
        " 007, 12345 and 1000000.5; a1b22c333d4444\n0",
        " in the wine-cellar, the wine-cellars and the Zoë",
    ],
)
def test_ids_become_the_text_again(learnt, content):
    assert learnt.backend_tokenizer.decode(text.encode(learnt, content)) == content


def test_frequent_words_are_one_token(learnt):
    assert len(text.encode(learnt, " the word")) == 2
    assert len(text.encode(learnt, " word.")) == 2


# --- numbers ---


@pytest.mark.parametrize(
    "content, groups",
    [
        (" 1234567", ["123", "456", "7"]),
        ("12345.", ["123", "45"]),
        ("a0001b", ["000", "1"]),
        (" 1,234,567", ["1", "234", "567"]),
        ("(98)\n7654", ["98", "765", "4"]),
        ("<0x41>", ["0", "41"]),
        (" the 12 words", ["12"]),
        ("9" * 3000, ["999"] * 1000),
        (" ٣٤٥ 6", ["6"]),  # other digits have no tokens
    ],
)
def test_numbers_are_read_in_groups_of_three_from_the_left(learnt, content, groups):
    assert [token for token in tokens(learnt, content) if re.search("[0-9]", token[:1])] == groups


def test_every_number_of_one_to_three_digits_is_a_token_wherever_it_stands(learnt):
    assert len(set(NUMBERS)) == 1110 and {"0", "00", "007", "999"} < set(NUMBERS)
    for before, after in ((" ", ""), ("the", "."), ("-", " the"), ("\n", "\n"), ("x", "x")):
        around = tokens(learnt, before), tokens(learnt, after)
        batch = text.encode_batch(learnt, [before + number + after for number in NUMBERS])
        for number, ids in zip(NUMBERS, batch, strict=True):
            expected = [*around[0], number, *around[1]]
            assert learnt.convert_ids_to_tokens(ids) == expected, (before, after)


def test_the_smallest_tokenizer_has_all_numbers_whatever_the_texts_hold():
    tokenizer = learn_tokenizer(["no number"], SMALLEST)
    assert tokenizer.get_vocab_size() == SMALLEST and set(NUMBERS) < set(tokenizer.get_vocab())


def test_a_text_is_tokenised_in_pieces_as_at_once(learnt):
    rng = random.Random(0)
    parts = ("the word ", "wine-cellar", *(str(10**digits + 7) for digits in range(12)), ", ", "\n")
    whole = "".join(rng.choices(parts, k=5000))
    for size in (1, 97, 5000):
        pieces = [whole[i : i + size] for i in range(0, len(whole), size)]
        found = [i for some in text.encode_stream(learnt, pieces) for i in some]
        assert found == learnt.backend_tokenizer.encode(whole, add_special_tokens=False).ids


def test_a_text_is_never_cut_within_a_number(learnt):
    parts = [part for part, _ in text.encode_parts(learnt, [" 1234567890" * 5000])]
    assert text.is_cut(learnt) and len(parts) > 5
    for one, other in zip(parts, parts[1:], strict=False):
        assert not (one[-1].isdigit() and other[0].isdigit())


def test_a_tokenizer_without_groups_goes_on_reading_digit_by_digit(tmp_path):
    save_tokenizer(assemble(CHARACTERS, [("t", "h")]), tmp_path)
    old = text.load_tokenizer(tmp_path)
    assert tokens(old, " 1234th") == ["▁", "1", "2", "3", "4", "th"] and text.is_cut(old)


# --- words ---


@pytest.mark.parametrize("room", [150, 60])
def test_words_that_are_asked_for_are_one_token_with_their_space(room):
    tokenizer = learn_tokenizer(TEXTS, SMALLEST + room, WORDS)
    for content in (" {}", " in the {}.", " the {}, the {}?", "\n- {} = {}\n", ": {}-{}"):
        for word in WORDS:
            found = tokenizer.encode(content.format(word, word)).tokens
            assert found.count(f"▁{word}") == content.count(" {}"), found


def test_parts_of_longer_words_are_not_taken_for_them(learnt):
    for word in ("words", "swimming-pool"):
        assert tokens(learnt, f" {word}") == [f"▁{word}"]
    assert "▁wine-cellar" not in tokens(learnt, " wine-dark")
    assert tokens(learnt, "xword")[0] == "x"


def test_equal_arguments_give_equal_tokenizers_of_at_most_the_size():
    one, other = (learn_tokenizer(TEXTS, SMALLEST + 150, WORDS) for _ in range(2))
    assert one.to_str() == other.to_str()
    assert SMALLEST < one.get_vocab_size() <= SMALLEST + 150


def test_a_word_with_digits_is_refused():
    with pytest.raises(ValueError, match="digits"):
        learn_tokenizer(TEXTS, 4096, ["room12"])


def test_all_closed_answers_of_the_recipes_tasks_are_single_tokens():
    found = options.parse(["--recipe", "demo"])
    words, size = answer_words(found), new_size(found.tokenizer)
    assert size == GemmaConfig.from_json(Path(found.config).read_text()).vocab_size
    tokenizer = learn_tokenizer(TEXTS, size, words)
    assert tokenizer.get_vocab_size() <= size
    names = {what for kind, what, _ in found.data if kind == "task"}
    assert {"mqar", "babilong_qa1", "babilong_qa4", "babilong_qa5"} <= names
    asked = 0
    for name in names:
        task = tasks.make(name, forms="train", keys="train")
        assert set(task.vocabulary) <= set(words)
        for seed in range(20 if task.vocabulary else 0):
            for question in task.episode(seed, [0.2, 0.8]).questions:
                (answer,) = question.answers
                assert tokenizer.encode(question.reply).tokens == [f"▁{answer}", "."]
                asked += 1
    assert asked > 100


def test_the_tasks_that_have_no_closed_answers_ask_for_no_words():
    found = options.parse(["--recipe", "demo", "--data", "task:passkey", "text:books"])
    assert answer_words(found) == []


# --- as a whole ---


def test_control_tokens_have_the_ids_of_gemma(learnt):
    assert [learnt.convert_tokens_to_ids(f"<{name}>") for name in ("pad", "eos", "bos")] == [
        0,
        1,
        2,
    ]


@pytest.mark.parametrize("words", [(), WORDS])
def test_the_smallest_size_is_named_and_enough(words):
    with pytest.raises(UsageError, match="too small: choose") as refused:
        learn_tokenizer(TEXTS, SMALLEST - 1, words)
    smallest = int(re.search(r"choose (\d+)", str(refused.value))[1])
    assert (smallest > SMALLEST) == bool(words)
    assert learn_tokenizer(TEXTS, smallest, words).get_vocab_size() <= smallest
    with pytest.raises(UsageError, match="too small"):
        learn_tokenizer([], smallest - 1, words)


def test_tokenizer_json_alone_has_all_of_it(learnt):
    content = " the wine-cellar has 1234567 words"
    alone = tokenizers.Tokenizer.from_str(learn_tokenizer(TEXTS, SMALLEST + 150, WORDS).to_str())
    assert alone.encode(content).ids == text.encode(learnt, content)
