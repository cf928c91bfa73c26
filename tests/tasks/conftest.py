"""Books of a test's own."""

import pytest


@pytest.fixture
def book(tmp_path):
    def write(content, name="book.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write
