"""What a process holds is seen while it runs, and judged from the end of its start."""

import json
import sys

import pytest

from benchmarks import resident_memory
from gemma_jax.errors import GemmaError, UsageError
from gemma_jax.inference.console import Console

GROWING = "import time; held = []\nfor i in range(5): held.append(b'x' * 2**26); time.sleep(1)"


def test_a_process_that_grows_is_seen_to_grow():
    samples = resident_memory.sample([sys.executable, "-c", GROWING], 60, Console(quiet=True))
    seconds, held = zip(*samples, strict=True)
    assert 3 <= len(samples) <= seconds[-1] + 1.5 and list(seconds) == sorted(seconds)
    assert 3 * 2**26 < held[-1] - held[0] < 6 * 2**26


def test_a_process_is_ended_when_its_time_is_over():
    sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
    samples = resident_memory.sample(sleeping, 2.5, Console(quiet=True))
    assert 2 <= len(samples) <= 3 and samples[-1][0] < 3


def test_a_command_that_fails_is_an_error():
    with pytest.raises(GemmaError, match="failed with 7"):
        resident_memory.sample([sys.executable, "-c", "exit(7)"], 60, Console(quiet=True))


def test_what_came_after_the_start_is_judged():
    samples = [(1.0, 900), (2.0, 100), (3.0, 130), (4.0, 120), (5.0, 150), (6.0, 140)]
    assert resident_memory.judged(samples, 2.0) == {
        "seconds": 6,
        "bytes_after_start": 100,
        "most_bytes_after_start": 150,
        "bytes_at_the_end": 140,
        "most_in_first_half": 130,
        "most_in_second_half": 150,
    }
    with pytest.raises(UsageError, match="ended within 6 s"):
        resident_memory.judged(samples, 6.0)


def test_the_command_reads_books_and_writes_its_figures(random_checkpoint, tmp_path, capsys):
    file = tmp_path / "figures.json"
    options = ["--gigabytes", "0.0003", "--start", "1", "--output", str(file)]
    assert resident_memory.main(["--model", str(random_checkpoint), *options]) == 0
    found = json.loads(file.read_text())
    assert found["text_bytes"] == 300_000
    assert found["bytes_after_start"] > 5e7 and len(found["samples"]) >= 2
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert shown == list(found)[: len(shown)] and "most_in_second_half" in shown
