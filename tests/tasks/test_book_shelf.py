"""Books that are kept in memory show what a stream of them shows, and are tokenised once."""

import itertools
import lzma
import random
import tracemalloc

import pytest

from gemma_jax import tasks
from gemma_jax.tasks import haystacks, shelf
from gemma_jax.tasks.base import Composition, Run


@pytest.fixture(autouse=True)
def empty_shelf(monkeypatch):
    monkeypatch.setattr(shelf, "_books", {})


def prose(seed, *, words=6000, stop=0.1, paragraph=0.01, longest=8, letters="abcdefgh", closing=1):
    rng, parts = random.Random(seed), []
    for _ in range(words):
        parts.append("".join(rng.choices(letters, k=rng.randint(1, longest))))
        if rng.random() < stop:
            parts.append(
                rng.choice(".!?") + "".join(rng.choices("\"')”", k=rng.randrange(closing)))
            )
        parts.append("\n\n" if rng.random() < paragraph else rng.choice("   \n"))
    return "".join(parts)


# Stops so rare that the end of a block decides where a long piece is cut.
RARE = {"stop": 0.012, "closing": 60}
TEXTS = {
    "prose": prose(1),
    "no paragraphs": prose(2, paragraph=0),
    "rare stops": prose(3, paragraph=0.0005, **RARE),
    "rare stops of letters of several bytes": prose(4, letters="aé無𝄞", **RARE),
    "no stops": prose(5, stop=0, paragraph=0.002),
    "long words": prose(6, longest=700, words=300),
    "long words without stops": prose(8, words=600, stop=0, paragraph=0, longest=250),
    "one word": "x" * 40_000,
    "windows": b"\xef\xbb\xbf" + prose(7).replace("\n", "\r\n").encode(),
    "short": "Only one line.",
}


def shown(books, seed, count):
    pieces = itertools.islice(haystacks.sentences(books, seed), count)
    return [(piece.text, piece.fresh) for piece in pieces]


def streamed(monkeypatch, *arguments):
    with monkeypatch.context() as patch:
        patch.setattr(shelf, "kept", lambda path: None)
        return shown(*arguments)


@pytest.mark.parametrize("block, sheet", [(65_536, 16_384), (900, 1000), (500, 5000)])
@pytest.mark.parametrize("name", TEXTS)
def test_a_kept_book_shows_what_a_stream_of_it_shows(book, monkeypatch, name, block, sheet):
    monkeypatch.setattr(shelf, "BLOCK_BYTES", block)
    monkeypatch.setattr(shelf, "SHEET_BYTES", sheet)
    books = [book(TEXTS[name]), book("Another one. And its second sentence.\n", "other.txt")]
    for seed in ("a", "b", "c"):
        once = streamed(monkeypatch, books, seed, 6000)
        assert shelf.kept(books[0])
        assert shown(books, seed, len(once)) == once


def test_most_of_a_book_comes_from_its_sheets(book):
    for name in ("prose", "no paragraphs", "windows"):
        long = TEXTS[name] * 20
        path = book(long.encode() if isinstance(long, str) else long.replace(b"\xef\xbb\xbf", b""))
        found = itertools.islice(haystacks.runs([path], "seed"), 60)
        runs = [(item.last - item.first) if isinstance(item, Run) else 0 for item in found]
        assert sum(runs) > 20 * runs.count(0)


@pytest.mark.parametrize(
    "content",
    [
        "A beginning. " + " \n" * 3000 + " An end.",
        "Closed for a long time." + '"' * 500 + " And on it goes. " * 99,
        b"old line ends\rand no others\r" * 50,
        b"no UTF-8 \xff",
    ],
    ids=["blanks", "closing", "line ends", "UTF-8"],
)
def test_what_could_be_cut_otherwise_is_read_as_a_stream(book, content):
    assert shelf.kept(book(content)) is None


def test_a_changed_file_is_read_again(book):
    path = book("The first text. " * 9)
    assert "first" in shown([path], "s", 3)[0][0]
    book("A second one, and longer than the other. " * 9)
    assert "second" in shown([path], "s", 3)[0][0]


def test_no_more_books_are_kept_than_there_is_room_for(book, monkeypatch):
    texts = [book(prose(number, words=2000), f"{number}.txt") for number in range(3)]
    size = max(len(open(text, "rb").read()) for text in texts)
    monkeypatch.setattr(shelf, "KEPT_BYTES", 2 * size)
    once = streamed(monkeypatch, texts, "seed", 3000)
    assert shown(texts, "seed", 3000) == once
    assert [shelf.kept(text) is not None for text in texts].count(True) == 2


def test_compressed_and_plain_books_show_the_same(book):
    plain = shown([book(TEXTS["prose"])], "seed", 3000)
    packed = book(lzma.compress(TEXTS["prose"].encode()), "book.txt.xz")
    assert shown([packed], "seed", 3000) == plain


class Counting:
    """Ids are the text's bytes; counts those that it was given."""

    def __init__(self):
        self.count = 0

    def __call__(self, texts):
        self.count += sum(map(len, texts))
        return [list(text.encode()) for text in texts]


def compose(books, tokens, encode, seed=0):
    task = tasks.make("passkey", haystack="books")
    episode = task.episode(seed, [0.0, 0.3, 1.0], 3)
    text = Composition(episode, task.filler(episode, books), tokens, encode)
    return [i for ids in text for i in ids], text


def test_a_book_is_tokenised_once_for_all_texts_that_show_it(book):
    encode, books = Counting(), [book(TEXTS["prose"] * 30)]
    size = len(TEXTS["prose"]) * 30
    compose(books, 3 * size, encode)
    assert size < encode.count < 1.1 * size
    before = encode.count
    for seed in range(1, 4):
        compose(books, size, encode, seed)
    assert encode.count - before < 0.1 * size


def test_texts_are_the_same_from_kept_and_from_streamed_books(book, monkeypatch):
    books = [book(TEXTS["prose"] * 3)]
    kept, text = compose(books, 300_000, Counting())
    monkeypatch.setattr(shelf, "kept", lambda path: None)
    again, plain = compose(books, 300_000, Counting())
    assert kept == again
    assert (text.ends, text.tokens) == (plain.ends, plain.tokens)
    assert text.repeated_tokens == plain.repeated_tokens > 0


def test_another_tokenizer_gets_its_own_ids(book):
    books, encode = [book(TEXTS["prose"] * 3)], Counting()
    first, _ = compose(books, 50_000, encode)
    other, _ = compose(books, 50_000, lambda texts: [[i + 1 for i in ids] for ids in encode(texts)])
    again, _ = compose(books, 50_000, encode)
    assert [i + 1 for i in first] == other and first == again


def test_what_is_kept_of_a_book_is_a_few_times_its_size(book):
    content = TEXTS["prose"] * 60

    def encode(texts):
        return [[1] * (len(text) // 4) for text in texts]

    path = book(content)
    tracemalloc.start()
    try:
        task = tasks.make("passkey", haystack="books")
        episode = task.episode(0, [0.5])
        for _ in Composition(episode, task.filler(episode, [path]), len(content) // 4, encode):
            pass
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 3 * len(content) and peak < 5 * len(content)
