"""Memory files: what is loaded is what was saved, by the same model, or there is a sentence."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest

import gemma_jax
from gemma_jax.checkpoint import files, memory_file, store
from gemma_jax.checkpoint.__main__ import main as describe
from gemma_jax.checkpoint.memory_file import Memory, Position, Source
from gemma_jax.errors import CorruptError, InputError, UsageError


@pytest.fixture(scope="module")
def model(random_checkpoint):
    return gemma_jax.load(random_checkpoint, segment_length=16)


def state_of(model, dtype="float32"):
    """A State of random numbers, of the model's shapes."""
    config = dataclasses.replace(model.config, dtype=dtype)
    rng = np.random.default_rng(0)

    def random(leaf):
        if leaf.dtype == np.int32:
            return leaf + 7
        return jax.numpy.asarray(rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(random, gemma_jax.init_state(config))


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


@pytest.fixture
def memory(model):
    return Memory(
        state_of(model),
        ids=(3, 4, 5),
        text="é\n",
        sources=(Source("a.txt", 9, "00"),),
        unread=Position((Source("b.txt", 3, "11"),), 2, "22"),
    )


@pytest.fixture
def file(memory, model, tmp_path):
    memory_file.save(tmp_path / "a.mem", memory, model)
    return tmp_path / "a.mem"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_state_comes_back_bit_by_bit(model, tmp_path, dtype):
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, dtype=dtype))
    state = state_of(model, dtype)
    logits = jax.numpy.arange(model.config.vocab_size, dtype="float32")[None]
    gemma_jax.save_state(tmp_path / "s.mem", state, model=model, logits=logits)
    found_logits, found = gemma_jax.load_state(tmp_path / "s.mem", model)
    assert_same((found_logits, found), (logits, state))
    assert found.length.sharding == gemma_jax.init_state(model.config).length.sharding


def test_a_batch_comes_back_with_its_rows(model, tmp_path):
    state = gemma_jax.init_state(model.config, batch_size=3)
    gemma_jax.save_state(tmp_path / "s.mem", state, model=model)
    logits, found = gemma_jax.load_state(tmp_path / "s.mem", model)
    assert logits is None
    assert_same(found, state)


def test_everything_beside_the_state_comes_back_too(model, memory, file):
    found = memory_file.load(file, model)
    assert_same(found.state, memory.state)
    assert dataclasses.replace(found, state=None) == dataclasses.replace(memory, state=None)
    assert found.tokens == 10


def test_the_size_is_that_of_the_state(model, file):
    assert os.path.getsize(file) < gemma_jax.state_bytes(model.config) + 8000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: {"config": m.config.with_memory(segment_length=8)}, "--segment-length 16"),
        (lambda m: {"config": m.config.with_memory(rule="delta")}, "rule was off"),
        (lambda m: {"config": dataclasses.replace(m.config, norm_eps=1e-5)}, "norm_eps was 1e-06"),
        (lambda m: {"hashes": m.hashes | {"weights": "0"}}, "hash of its weights differs"),
        (lambda m: {"hashes": m.hashes | {"tokenizer": "0"}}, "hash of its tokenizer differs"),
        (lambda m: {"hashes": m.hashes | {"adapter": "0"}}, "hash of its adapter was not there"),
    ],
    ids=["segment length", "rule", "shape", "weights", "tokenizer", "adapter"],
)
def test_another_model_is_refused_and_the_difference_is_named(model, file, change, words):
    other = dataclasses.replace(model, **change(model))
    with pytest.raises(UsageError, match=words):
        memory_file.load(file, other)


def test_a_rule_of_ones_own_belongs_to_the_memory_by_its_code(model, tmp_path, memory):
    code = tmp_path / "rule.py"
    code.write_text("first = 1\n")
    config = model.config.with_memory(rule=f"{code}:Rule")
    ours = memory_file.identity(dataclasses.replace(model, config=config))
    code.write_text("first = 2\n")
    theirs = memory_file.identity(dataclasses.replace(model, config=config))
    with pytest.raises(UsageError, match="code of the memory rule differs"):
        memory_file.require_same(tmp_path, theirs, ours)


def test_what_an_earlier_version_did_not_say_is_as_by_default(model, tmp_path):
    def of(**changes):
        config = model.config.with_memory(**changes)
        return memory_file.identity(dataclasses.replace(model, config=config))

    earlier = of(slots=256)
    del earlier["config"]["memory"]["slots"]
    memory_file.require_same(tmp_path, earlier, of(slots=256))
    with pytest.raises(UsageError, match="slots was 256, and is 7 here"):
        memory_file.require_same(tmp_path, earlier, of(slots=7))


def test_a_renamed_checkpoint_is_the_same_model(model, file, tmp_path):
    shutil.copytree(model.path, tmp_path / "elsewhere")
    memory_file.load(file, gemma_jax.load(tmp_path / "elsewhere", segment_length=16))


def test_every_flipped_bit_and_every_truncation_is_found(model, file):
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    head = 8 + int.from_bytes(content[:8], "little")
    places = [*rng.integers(0, 8 * head, 150), *rng.integers(0, 8 * len(content), 50)]
    for place in map(int, places):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(damaged)
        with pytest.raises(CorruptError, match=str(file)):
            memory_file.load(file, model)
    for length in [0, 5, 8, head, len(content) - 1, *rng.integers(0, len(content), 20).tolist()]:
        file.write_bytes(content[:length])
        with pytest.raises(CorruptError, match=str(file)):
            memory_file.load(file, model)


def test_without_verification_content_is_not_hashed_and_nonsense_is_still_refused(model, file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    memory_file.load(file, model, verify=False)
    file.write_bytes(content[:100])
    with pytest.raises(CorruptError):
        memory_file.load(file, model, verify=False)


@pytest.mark.parametrize("content", [b"", b"not a memory file at all", b"\xff" * 100])
def test_other_files_are_refused(model, tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CorruptError, match="memory file"):
        memory_file.load(tmp_path / "x", model)


def test_missing_files_and_directories_are_input_errors(model, tmp_path):
    for path in (tmp_path / "no", tmp_path):
        with pytest.raises(InputError, match="--save-memory wrote"):
            memory_file.load(path, model)


def test_later_versions_are_explained(monkeypatch, model, memory, tmp_path):
    monkeypatch.setattr(memory_file, "VERSION", 2)
    memory_file.save(tmp_path / "b.mem", memory, model)
    monkeypatch.undo()
    with pytest.raises(InputError, match="version 2"):
        memory_file.load(tmp_path / "b.mem", model)


def test_a_place_where_no_file_can_be_is_known_before(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "a.mem"):
        with pytest.raises(InputError, match="cannot be written"):
            memory_file.require_place(path)
    memory_file.require_place(tmp_path / "new" / "a.mem")


# --- files that are there whole or not at all ---


def test_what_was_there_before_survives_a_failure(tmp_path):
    path = tmp_path / "a.mem"
    path.write_bytes(b"before")

    def broken():
        yield b"half of"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        files.write_file(path, broken())
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed_and_what_another_is_writing_is_not(tmp_path):
    (tmp_path / ".a.mem.killed.partial").mkdir()
    with files.new_directory(tmp_path / "a.mem"):
        files.write_file(tmp_path / "a.mem.other", [b"x"])
        files.write_file(tmp_path / "b", [b"x"])
        with files.new_directory(tmp_path / "a.mem") as content:
            (content / "first").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mem", "a.mem.other", "b"]


def test_a_directory_is_replaced_in_one_step(tmp_path, monkeypatch):
    for step in ("one", "two"):
        with files.new_directory(tmp_path / "d") as content:
            (content / step).touch()
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["two"]
    monkeypatch.setattr(files, "_exchange", lambda *_: False)  # a system that cannot
    with files.new_directory(tmp_path / "d") as content:
        (content / "three").touch()
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["three"]
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


# --- python -m gemma_jax.checkpoint ---


def test_a_memory_file_is_described(file, capsys):
    assert describe([str(file)]) == 0
    out = capsys.readouterr().out
    for words in (
        "a memory file",
        "10 tokens",
        "--resume",
        "a.txt: 9 bytes",
        "b.txt: 3 bytes",
        "segments of 16",
    ):
        assert words in out


def test_a_checkpoint_is_described(model, capsys):
    assert describe([str(model.path)]) == 0
    out = capsys.readouterr().out
    for words in ("a checkpoint", "rule off", model.hashes["weights"][:16], "files: whole"):
        assert words in out


def test_an_adapter_is_described(tmp_path, capsys):
    (tmp_path / "adapter.json").write_text(json.dumps({"base": "gemma", "trained": "memory"}))
    store.write_manifest(tmp_path)
    assert describe([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "an adapter" in out and 'base: "gemma"' in out


def test_damage_and_absence_have_their_exit_codes(file, tmp_path, capsys):
    file.write_bytes(file.read_bytes()[:-1])
    assert describe([str(file)]) == 4
    assert describe([str(tmp_path / "no")]) == 3
    assert describe([str(tmp_path)]) == 3
    assert "Traceback" not in capsys.readouterr().err
