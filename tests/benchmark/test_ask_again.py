"""A text asked from its memory file gives the answers of reading it anew, and the figures are written."""

import json

import numpy as np
import pytest

from benchmarks import ask_again
from gemma_jax import demo
from gemma_jax.checkpoint import store
from gemma_jax.inference.prefill import piece_sizes
from gemma_jax.inference.reader import read

pytestmark = pytest.mark.skipif(not demo.MODEL.is_dir(), reason="the small model is not there")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_memory_file_answers_as_a_full_read_does(tmp_path, capsys):
    file = tmp_path / "figures.json"
    arguments = ["--tokens", "3K", "--questions", "4", "--output", str(file)]
    assert ask_again.main(arguments) == 0
    said, found = capsys.readouterr(), json.loads(file.read_text())
    assert 2900 < found["tokens"] < 3072
    assert found["questions"] == found["identical_answers"] == 4
    assert found["right_from_memory"] == found["right_by_full_read"] >= 3
    assert 0 < found["load_seconds"] < found["median_full_read_seconds"]
    assert found["memory_file_bytes"] > 1e6 and found["command"].startswith("python -m benchmarks.")
    shown = [line.split()[0] for line in said.out.splitlines()]
    assert shown == list(found)[1 : len(shown) + 1] and "right_by_full_read" in shown
    assert "full read 4 of 4: " in said.err


@pytest.mark.parametrize("more", [-1, 0, 5])
def test_a_memory_and_a_question_are_what_a_full_read_gives_in_every_bit(more):
    """Wherever in a piece the text ends; it is shorter than one, too."""
    model = store.load(demo.MODEL, dtype="float32")
    size = piece_sizes(model.config)[1] + more
    *ids, question = np.random.default_rng(0).integers(5, 5000, size + 1).tolist()
    memory = ask_again.read_once(model, ids)
    found = read(model, [[*memory.ids, question]], memory.state)
    expected = read(model, [[*ids, question]])
    np.testing.assert_array_equal(found.logits, expected.logits)


@pytest.mark.parametrize(
    "arguments, word",
    [
        (("--tokens", "1K"), "--tokens"),
        (("--questions", "0"), "--questions"),
        (("--question", "5"), "--question"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_with_exit_code_2(arguments, word, capsys):
    try:
        code = ask_again.main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2 and word in capsys.readouterr().err
