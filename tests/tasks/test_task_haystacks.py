"""Books as haystacks: nothing is lost, nothing is held whole, and odd files are cut or refused."""

import itertools
import lzma
import re

import pytest

from gemma_jax.errors import InputError, UsageError
from gemma_jax.tasks import haystacks


def one_round(books, seed="seed"):
    """All fresh pieces."""
    pieces = itertools.takewhile(lambda piece: piece.fresh, haystacks.sentences(books, seed))
    return [piece.text for piece in pieces]


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


PROSE = "".join(
    f"Sentence {number} is about the sea, and about nothing else at all." + "  \n"[number % 3]
    for number in range(3000)
)


@pytest.mark.parametrize(
    "content",
    [
        PROSE,
        "One paragraph without a full stop\n\nand another\n \t\n" * 2000,
        "a table of numbers | 1 | 2 | 3\n" * 4000,
        "無" * 50_000,
        "x" * 200_000,
        "very long words " + "y" * 3000 + " and short ones " * 5000,
        'A. B. C! "D?" e.g. F.\n' * 5000,
        "only one line",
    ],
    ids=["prose", "paragraphs", "table", "chinese", "one word", "mixed", "stops", "short"],
)
def test_a_round_shows_every_character_once_in_pieces_of_bounded_length(book, content):
    pieces = one_round([book(content)])
    shown, whole = squeezed("".join(pieces)), squeezed(content)
    assert len(shown) == len(whole)
    assert shown in whole + whole, "it is the book, turned to another beginning"
    assert max(map(len, pieces)) <= 430
    assert all(piece[0].isspace() or squeezed(piece) in content for piece in pieces)


def test_prose_is_cut_behind_sentences(book):
    pieces = one_round([book(PROSE)])
    assert all(re.fullmatch(r"\s+Sentence \d+ is .* at all\.", piece) for piece in pieces)


def test_all_books_are_shown_before_any_is_repeated(book):
    books = [book(f"{word} again. " * 500, f"{word}.txt") for word in ("alpha", "beta", "gamma")]
    pieces = list(itertools.islice(haystacks.sentences(books, "s"), 3000))
    first = [piece.text for piece in pieces if piece.fresh]
    assert [piece.fresh for piece in pieces] == [True] * len(first) + [False] * (3000 - len(first))
    assert all("".join(first).count(f"{word} again") == 500 for word in ("alpha", "beta", "gamma"))
    assert "".join(p.text for p in pieces[len(first) : 2 * len(first)]) == "".join(first)


def test_the_seed_decides_where_it_begins(book):
    books = [book(PROSE)]
    starts = {next(haystacks.sentences(books, f"seed {number}")).text for number in range(20)}
    assert len(starts) > 15
    again = next(haystacks.sentences(books, "seed 3")).text
    assert again == next(haystacks.sentences(books, "seed 3")).text


def test_windows_line_ends_and_byte_order_marks_are_read_away(book):
    text = "".join(one_round([book(b"\xef\xbb\xbf" + b"One line.\r\nTwo lines.\r\n\r\n" * 9000)]))
    assert "\r" not in text and "\ufeff" not in text and text.count("Two lines.") == 9000


def test_endless_blanks_are_shortened(book):
    pieces = one_round([book("A beginning. " + " \n" * 300_000 + " An end.")])
    assert squeezed("".join(pieces)) in ("Abeginning.Anend.", "Anend.Abeginning.")
    assert sum(map(len, pieces)) < 2000


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "has no text"),
        (b" \n\n\t " * 100, "has no text"),
        (b"Gr\xfc\xdfe aus K\xf6ln. " * 10, "not UTF-8"),
        (b"fine so far. " * 20_000 + b"\xff", "not UTF-8"),
        (b"the end is cut off \xe7\x84", "not UTF-8"),
    ],
)
def test_a_bad_book_is_refused_before_anything_is_read(book, content, says):
    good = book("This one is fine.", "good.txt")
    bad = book(content)
    with pytest.raises(InputError, match=says) as caught:
        haystacks.check([good, bad])
    assert bad in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match=says):
        list(itertools.islice(haystacks.sentences([bad], "s"), 100_000))


def test_what_is_no_file_is_refused(book, tmp_path):
    for bad in (str(tmp_path), str(tmp_path / "missing"), book(b"no archive", "b.txt.xz")):
        with pytest.raises(InputError, match="cannot be read"):
            haystacks.check([bad])
        with pytest.raises(InputError, match="cannot be read"):
            next(haystacks.sentences([bad], "s"))
    cut_short = book(lzma.compress(b"some text. " * 9000)[:-50], "c.txt.xz")
    with pytest.raises(InputError, match="cannot be read"):
        haystacks.check([cut_short])
    with pytest.raises(InputError, match="at least one"):
        haystacks.check([])


def test_the_shipped_books_are_small_readable_and_split():
    train, held_out = haystacks.shipped("train"), haystacks.shipped("held_out")
    assert (len(train), len(held_out)) == (6, 2) and set(train).isdisjoint(held_out)
    sizes = [len(open(path, "rb").read()) for path in (*train, *held_out)]
    assert sum(sizes) <= 3_000_000
    haystacks.check([*train, *held_out])
    letters = [sum(len(lzma.open(p, "rt").read()) for p in split) for split in (train, held_out)]
    assert 1.5 < letters[0] / letters[1] < 2.2
    with pytest.raises(UsageError, match="train or held_out"):
        haystacks.shipped("test")
