"""Files and prompts become one stream of text, whole, whatever their bytes and however they are
read.
"""

import hashlib
import io
import os
import sys

import hypothesis
import pytest
from hypothesis import strategies as st

from gemma_jax.errors import InputError, UsageError
from gemma_jax.inference import documents
from gemma_jax.inference.documents import Documents


@pytest.fixture
def file(tmp_path):
    def write(content: bytes, name: str = "file.txt") -> str:
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return write


@pytest.fixture
def small_reads(monkeypatch):
    monkeypatch.setattr(documents, "READ_BYTES", 3)


def give_standard_input(monkeypatch, data: bytes):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_files_and_prompt_are_joined_by_newlines(file):
    assert "".join(Documents([file(b"a\n"), file(b"b", "2")], "c")) == "a\n\nb\nc"
    assert "".join(Documents([file(b"a")])) == "a"
    assert "".join(Documents([], "c")) == "c"


def test_line_ends_are_kept(file):
    assert "".join(Documents([file(b"a\r\nb\rc\n")])) == "a\r\nb\rc\n"


@hypothesis.given(content=st.text(min_size=1, max_size=30))
@hypothesis.settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_characters_that_span_two_reads_stay_whole(small_reads, file, content):
    assert "".join(Documents([file(content.encode())])) == content.removeprefix("\ufeff")


@hypothesis.given(data=st.binary(min_size=1, max_size=30), extra=st.text("�é", max_size=3))
@hypothesis.settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_replaced_bytes_are_counted_and_real_replacement_characters_are_not(
    small_reads, file, data, extra
):
    data += extra.encode()
    read = Documents([file(data)], errors="replace")
    text = "".join(read)
    assert text == data.decode("utf-8", "replace").removeprefix("\ufeff")
    assert read.replaced == text.count("�") - data.count("�".encode())
    assert read.bytes_read == read.total_bytes == len(data)


@pytest.mark.parametrize(
    ("data", "offset"),
    [(b"\xff", 0), (b"abcdefgh\xffi", 8), ("é漢".encode() + b"\x80", 5), (b"abcde\xe6\xbc", 5)],
)
def test_bytes_that_are_not_utf8_are_refused_with_file_and_offset(small_reads, file, data, offset):
    path = file(data)
    with pytest.raises(
        InputError, match=f"{path} is not UTF-8 at byte {offset}:.*--encoding-errors replace"
    ):
        list(Documents([path]))


def test_a_byte_order_mark_is_not_text(file):
    assert "".join(Documents([file(b"\xef\xbb\xbfa\xef\xbb\xbf")])) == "a\ufeff"


@pytest.mark.parametrize("prompt", ["", "-"])
def test_an_empty_prompt_is_refused(monkeypatch, prompt):
    give_standard_input(monkeypatch, b"")
    with pytest.raises(InputError, match="is empty"):
        list(Documents([], prompt))


def test_missing_empty_and_unreadable_files_are_refused_before_anything_is_read(file, tmp_path):
    for path, reason in (
        (file(b""), "is empty"),
        (str(tmp_path / "no"), "No such file"),
        (str(tmp_path), "directory"),
    ):
        with pytest.raises(InputError, match=reason):
            Documents([path], "prompt")
    with pytest.raises(InputError, match="cannot be read"):
        Documents(["a\0b"])


def test_nothing_to_read_and_standard_input_twice_are_usage_errors():
    for files, prompt in (([], None), (["-", "-"], None), (["-"], "-")):
        with pytest.raises(UsageError):
            Documents(files, prompt)


def test_standard_input_is_read_as_bytes(monkeypatch, file):
    give_standard_input(monkeypatch, "é漢".encode())
    read = Documents([file(b"a")], "-")
    assert read.total_bytes is None
    assert "".join(read) == "a\né漢"


def test_a_prompt_with_bytes_that_are_not_utf8_is_treated_like_a_file():
    with pytest.raises(InputError, match="the prompt is not UTF-8 at byte 1"):
        list(Documents([], "a\udcff"))
    read = Documents([], "a\udcff", errors="replace")
    assert ("".join(read), read.replaced) == ("a�", 1)
    with pytest.raises(InputError, match="not characters"):
        Documents([], "\ud800")


def test_a_pipe_has_no_known_size(tmp_path):
    reader, writer = os.pipe()
    os.write(writer, b"abc")
    os.close(writer)
    read = Documents([f"/dev/fd/{reader}"])
    assert (read.total_bytes, "".join(read), read.bytes_read) == (None, "abc", 3)
    os.close(reader)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no files without a size here")
def test_a_file_that_tells_no_size_is_read_all_the_same():
    assert "Name:" in "".join(Documents(["/proc/self/status"]))


# --- going on ---


@hypothesis.given(
    contents=st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=3),
    at=st.integers(0, 60),
)
@hypothesis.settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_a_text_can_be_gone_on_with_at_any_character(small_reads, file, contents, at):
    paths = [file(content, str(i)) for i, content in enumerate(contents)]

    def documents():
        read = Documents(paths, errors="replace")
        read.track()
        return read

    first = documents()
    text = "".join(first)
    at = min(at, len(text))
    second = documents()
    second.go_on(first.position(at))
    assert "".join(second) == text[at:]
    assert second.sources == first.sources
    third = documents()
    third.go_on(second.position(max(0, len(text) - at - 1)))
    assert "".join(third) == text[max(at, len(text) - 1) :]


def test_sources_are_named_with_size_and_hash(file):
    read = Documents([file(b"a\n")], "b")
    list(read)
    names = [(source.name, source.bytes) for source in read.sources]
    assert names == [(file(b"a\n"), 2), ("the prompt", 1)]
    assert read.sources[1].sha256 == hashlib.sha256(b"b").hexdigest()


@pytest.mark.parametrize("size", [3, 4, 100])
@pytest.mark.parametrize("changed", [b"Abcdefgh", b"abcdEfgh", b"abc", b"abcde"])
def test_a_file_that_is_not_what_was_read_is_refused(monkeypatch, file, changed, size):
    monkeypatch.setattr(documents, "READ_BYTES", size)
    first = Documents([file(b"abcdefgh")])
    first.track()
    list(first)
    for data, given in ((b"abcdefxyz", "xyz"), (changed, None)):
        second = Documents([file(data)])
        second.go_on(first.position(6))
        if given:
            assert "".join(second) == given
        else:
            with pytest.raises(InputError, match="does not begin with what was read before"):
                list(second)


def test_fewer_files_than_were_begun_are_refused(file):
    first = Documents([file(b"a"), file(b"b", "2")])
    first.track()
    list(first)
    with pytest.raises(InputError, match="2 files or prompts"):
        Documents([file(b"a")]).go_on(first.position(3))
