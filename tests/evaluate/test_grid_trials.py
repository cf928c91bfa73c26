"""Trials are what they always were: records name them by their hash."""

import functools
import hashlib
import shlex
from pathlib import Path

import pytest

from gemma_jax import tasks
from gemma_jax.benchmark import records
from gemma_jax.evaluate import command, results
from gemma_jax.evaluate import plan as planning
from gemma_jax.evaluate.grid import blank
from gemma_jax.evaluate.report import Recall
from gemma_jax.tasks import haystacks
from gemma_jax.text import encode_batch

ROOT = Path(command.__file__).parents[2]
MOST_TOKENS = 1_000_000  # of a recorded grid that is composed again

# Change these only when trials are meant to change: recorded results are then about other texts.
HASHES = {
    ("passkey", "grass"): "eb1a4cc381d13b98",
    ("passkey", "books"): "e15f6f0ddf75d4a7",
    ("niah_single_2", "books"): "d7c7ea6ba93dbf38",
    ("niah_multikey_2", "needles"): "393ae49cab6a8a51",
    ("babilong_qa2", "books"): "230bdb19b7e6f12d",
}


@pytest.mark.parametrize("name, filler", HASHES)
def test_the_ids_of_a_grid_are_those_of_recorded_ones(tokenizer, name, filler):
    """Short haystacks and shared ones."""
    options = planning.Options(
        tasks=(tasks.make(name, haystack=filler),),
        lengths=(3000, 200_000),
        depths=(0.0, 0.5, 1.0),
        trials=2,
        questions=2,
        haystacks=2,
        shared="auto",
        seed=11,
        books=haystacks.shipped("held_out"),
        rows=4,
    )
    grid = planning.plan(options, functools.partial(encode_batch, tokenizer), 2)
    found = hashlib.sha256()
    for haystack in grid.haystacks:
        text = grid.text(haystack)
        for _ in text:
            pass
        for asked in haystack.asked:
            found.update(repr(sorted(text.trial(asked).items())).encode())
    assert found.hexdigest()[:16] == HASHES[name, filler]


def test_the_recorded_trials_of_the_shipped_model_are_made_again(monkeypatch):
    monkeypatch.chdir(ROOT)
    recorded = {
        found.command: found.trials_sha256
        for found in records.read(ROOT / "benchmarks" / "recall.json", Recall)
        if "gemma_jax/demo/model" in found.command
        and found.trials_sha256
        and " --haystack " not in found.command  # a file that is not here
    }
    made = {}
    for typed in recorded:
        subject = command.check(command.parse(shlex.split(typed)[3:]))
        haystacks_of_it = list(subject.grid.haystacks)
        if sum(haystack.tokens for haystack in haystacks_of_it) > MOST_TOKENS:
            continue
        trials = []
        for haystack in haystacks_of_it:
            text = subject.grid.text(haystack)
            for _ in text:
                pass
            for number, asked in enumerate(haystack.asked):
                digest = text.trial(asked)["text_sha256"]
                trials.append(blank("ours", haystack, number, text_sha256=digest))
        made[typed] = results.trials_sha256(trials)
    assert made and all(recorded[typed] == digest for typed, digest in made.items())
