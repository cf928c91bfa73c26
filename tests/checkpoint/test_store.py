"""Checkpoints on disk: damage is found, foreign code is refused, other directories are explained."""

import json
import os

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import gemma_jax
from gemma_jax.checkpoint import files, store
from gemma_jax.checkpoint.convert import convert
from gemma_jax.errors import CorruptError, InputError


@pytest.fixture
def checkpoint(make_model, tmp_path):
    source, _ = make_model()
    convert(source, tmp_path / "dest", dtype="float32")
    return tmp_path / "dest"


def largest(directory):
    return max((f for f in directory.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def test_a_changed_byte_is_found_unless_hashes_are_not_wanted(checkpoint):
    file = checkpoint / "huggingface" / "config.json"
    file.write_bytes(file.read_bytes()[:-1] + b" ")
    with pytest.raises(CorruptError, match="config.json is damaged"):
        gemma_jax.load(checkpoint)
    gemma_jax.load(checkpoint, verify=False)


@pytest.mark.parametrize(
    "change", [lambda text: text[:50], lambda text: text.replace("24", '"24"')]
)
def test_a_damaged_configuration_is_damage(checkpoint, change):
    file = checkpoint / "config.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(CorruptError, match="config.json"):
        store.read_config(checkpoint)


@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_or_shorter_file_is_always_found(checkpoint, verify):
    file = largest(checkpoint / "params")
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(CorruptError, match=f"has {len(content) - 1} bytes"):
        gemma_jax.load(checkpoint, verify=verify)
    file.unlink()
    with pytest.raises(CorruptError, match="is missing"):
        gemma_jax.load(checkpoint, verify=verify)


def test_damage_that_hashes_would_have_found_is_no_traceback(checkpoint):
    for file in (checkpoint / "params").rglob("*"):
        if file.is_file() and "/d/" in str(file):
            file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(CorruptError, match="cannot be read"):
        gemma_jax.load(checkpoint, verify=False)


def test_the_manifest_must_be_there_and_readable(checkpoint):
    (checkpoint / "manifest.json").write_text("[]")
    with pytest.raises(CorruptError, match="manifest.json"):
        gemma_jax.load(checkpoint)
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(InputError, match="no .complete. checkpoint"):
        gemma_jax.load(checkpoint)


def test_code_named_by_a_checkpoint_is_not_run(checkpoint, tmp_path):
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    content = json.loads((checkpoint / "config.json").read_text())
    content["memory"]["rule"] = f"{trap}:Rule"
    (checkpoint / "config.json").write_text(json.dumps(content))
    store.write_manifest(checkpoint)
    with pytest.raises(InputError, match="names code"):
        gemma_jax.load(checkpoint)
    assert not (tmp_path / "ran").exists()


def test_a_hugging_face_directory_is_explained(make_model):
    source, _ = make_model()
    with pytest.raises(InputError, match=f"python convert_weights.py {source}"):
        gemma_jax.load(source)


@pytest.mark.parametrize("path", ["nowhere", "."])
def test_what_is_no_checkpoint_is_explained(tmp_path, path):
    with pytest.raises(InputError, match="convert_weights.py wrote"):
        gemma_jax.load(tmp_path / path)


def test_another_rule_starts_from_fresh_parameters(checkpoint):
    base = gemma_jax.load(checkpoint)
    model = gemma_jax.load(checkpoint, memory="gated_delta", segment_length=64)
    assert model.config.memory.rule == "gated_delta" and model.config.memory.segment_length == 64
    memory = model.params["layers_2"]["attention"].pop("memory")
    assert set(memory) == {"gate", "write_kernel", "write_bias"}
    assert not np.asarray(memory["gate"]).any()
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), base.params, model.params))


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_files_can_be_read_by_whom_the_directory_can_be(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        with files.new_directory(tmp_path / "made") as content:
            save_file({"x": np.zeros(1)}, content / "private.safetensors")
            (content / "private.safetensors").chmod(0o600)
            (content / "below").mkdir()
            (content / "below" / "plain.json").write_text("{}")
    finally:
        os.umask(before)
    found = [file for file in (tmp_path / "made").rglob("*") if file.is_file()]
    assert len(found) == 2 and {file.stat().st_mode & 0o777 for file in found} == {mode}
