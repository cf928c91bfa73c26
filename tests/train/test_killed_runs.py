"""A run that is killed at any moment, and resumed, ends bit-identical to one never interrupted."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import gemma_jax

KILLS = 5
ROOT = Path(gemma_jax.__file__).parent.parent


def steps(directory):
    """The checkpoints of the run that is killed."""
    return sorted(path.name for path in directory.glob("killed.training/checkpoints/step-*"))


@pytest.mark.slow
def test_a_run_killed_five_times_is_bit_identical(home, tmp_path):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
    }
    arguments = [
        *(sys.executable, "-m", "gemma_jax.train", "--config", home / "tiny.json"),
        *("--tokenizer", home, "--data", f"text:{home / 'book.txt'}=1", "task:mqar=2"),
        *("--segments", 8, "--tokens-per-step", 512, "--steps", 400, "--carry", 0.5),
        *("--checkpoint-steps", 9, "--data-workers", 1, "--density", 5, "--log-steps", 7),
    ]

    def start(name):
        given = [*map(str, arguments), "--output", str(tmp_path / name), "--resume"]
        return subprocess.Popen(given, env=environment, stderr=subprocess.PIPE, text=True)

    whole = start("whole")
    _, said = whole.communicate(timeout=600)
    assert whole.returncode == 0, said
    rng, saved = random.Random(0), []
    for kill in range(KILLS):
        process = start("killed")
        before = steps(tmp_path)
        while kill and steps(tmp_path) == before and process.poll() is None:
            time.sleep(0.01)  # the first one may die before it has saved anything
        time.sleep(rng.uniform(0.0, 2.0))
        assert process.poll() is None, "it was done before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        saved.append(steps(tmp_path)[-1:])
    last = start("killed")
    _, said = last.communicate(timeout=600)
    assert last.returncode == 0, said
    assert sorted(saved) == saved and len(set(map(tuple, saved))) >= KILLS - 1, saved
    one, other = (gemma_jax.load(tmp_path / name).params for name in ("whole", "killed"))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
    logs = [
        [
            [cell for i, cell in enumerate(line.split(",")) if i != 1]  # seconds
            for line in (tmp_path / f"{name}.training" / "log.csv").read_text().splitlines()
        ]
        for name in ("whole", "killed")
    ]
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_processes_that_make_batches_end_with_their_parent(home, tmp_path):
    arguments = [
        *(sys.executable, "-m", "gemma_jax.train", "--config", home / "tiny.json"),
        *("--tokenizer", home, "--data", f"text:{home / 'book.txt'}", "--minutes", 5),
        *("--output", tmp_path / "one", "--tokens-per-step", 1024, "--data-workers", 2),
    ]
    process = subprocess.Popen(
        list(map(str, arguments)),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 120
    while len(found := children.read_text().split()) < 3:  # two of them, and multiprocessing's own
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in found):
        assert time.monotonic() < deadline
        time.sleep(0.2)
