"""Adapters: what was trained comes back, belongs to its base, and says so when it does not."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from reference import random_params
from teaching import equal_trees

import gemma_jax
import run
from gemma_jax import random_model
from gemma_jax.checkpoint import adapter as adapters
from gemma_jax.checkpoint import store
from gemma_jax.checkpoint.convert import convert
from gemma_jax.errors import CorruptError, InputError
from gemma_jax.model import adapting
from gemma_jax.train import result


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return random_model.write_hugging_face(tmp_path_factory.mktemp("hf") / "small", seed=3)


@pytest.fixture(scope="module")
def base(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "small"
    convert(source, path, dtype="float32")
    return path


@pytest.fixture(scope="module", params=["memory", "lora"])
def trained(request, base, tmp_path_factory):
    """An adapter on disk, and the model it stands for."""
    model = gemma_jax.load(base, memory="gated_delta", segment_length=32)
    parts = adapting.split(model.params, request.param, rank=2, key=jax.random.key(0))
    changed = jax.tree.map(
        lambda leaf: leaf + np.random.default_rng(1).normal(0, 0.1, leaf.shape).astype("float32"),
        parts[0],
    )
    path = tmp_path_factory.mktemp("adapter") / request.param
    result.write_adapter(path, model.config, changed, parts[1], request.param, {}, "float32")
    return path, model.config, adapting.join(parts[1], changed)


def test_a_loaded_adapter_is_what_was_trained(base, trained):
    path, config, params = trained
    model = gemma_jax.load(base, adapter=path)
    assert model.config == config and equal_trees(model.params, params)
    assert equal_trees(
        adapting.without_memory(gemma_jax.load(base).params),
        adapting.without_memory(model.params),
    ) == (path.name == "memory")


def test_memory_can_be_off_with_an_adapter(base, trained):
    path, _, params = trained
    model = gemma_jax.load(base, adapter=path, memory="off", segment_length=16)
    assert model.config.memory.rule == "off" and model.config.memory.segment_length == 16
    assert equal_trees(model.params, adapting.without_memory(params))


def test_every_conversion_of_the_same_weights_is_the_same_base(base, source, trained, tmp_path):
    other = tmp_path / "half"
    convert(source, other, dtype="bfloat16")
    manifests = [json.loads((path / store.MANIFEST).read_text()) for path in (base, other)]
    assert manifests[0] != manifests[1]
    assert gemma_jax.load(other, adapter=trained[0]).config.dtype == "bfloat16"


def test_an_adapter_of_another_model_is_refused(trained, tmp_path):
    other = random_model.write_hugging_face(tmp_path / "hf", seed=4)
    convert(other, tmp_path / "other", dtype="float32")
    with pytest.raises(InputError, match="trained for small .* this model is hf "):
        gemma_jax.load(tmp_path / "other", adapter=trained[0])


def test_one_changed_number_is_another_model(base):
    params = gemma_jax.load(base).params
    before = adapters.params_hash(params)
    norm = params["layers_1"]["pre_mlp_norm"]
    norm["scale"] = norm["scale"].at[3].add(0.1)
    assert adapters.params_hash(params) != before


def test_memory_is_no_part_of_what_an_adapter_belongs_to(base):
    hashes = {
        adapters.params_hash(gemma_jax.load(base, memory=rule).params)
        for rule in ("off", "linear", "gated_delta")
    }
    assert len(hashes) == 1


@pytest.mark.parametrize("file", [adapters.ARRAYS, adapters.DESCRIPTION])
def test_a_damaged_adapter_is_said_to_be(base, trained, tmp_path, file):
    shutil.copytree(trained[0], tmp_path / "copy")
    content = bytearray((tmp_path / "copy" / file).read_bytes())
    content[-3] ^= 1
    (tmp_path / "copy" / file).write_bytes(content)
    with pytest.raises(CorruptError, match="train the adapter again"):
        gemma_jax.load(base, adapter=tmp_path / "copy")


def test_run_reads_with_an_adapter(base, trained, capsys):
    arguments = ["--model", str(base), "--prompt", "the people", "--max-new-tokens", "1", "--json"]
    assert run.main([*arguments, "--adapter", str(trained[0])]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["memory_rule"] == "gated_delta" and "not trained" not in err
    assert run.main([*arguments, "--adapter", str(base)]) == 3
    assert "holds no adapter" in capsys.readouterr().err


def test_a_whole_model_comes_back(base, tmp_path):
    model = gemma_jax.load(base)
    config = dataclasses.replace(model.config.with_memory(rule="linear"), dtype="bfloat16")
    params = random_params(dataclasses.replace(config, dtype="float32"))
    result.write_model(tmp_path / "taught", config, params, base, {"steps": 3})
    found = gemma_jax.load(tmp_path / "taught")
    assert found.config == dataclasses.replace(config, name="taught")
    assert found.params["layers_0"]["attention"]["qkv"].dtype == "bfloat16"
    gate = found.params["layers_0"]["attention"]["memory"]["gate"]
    np.testing.assert_array_equal(gate, params["layers_0"]["attention"]["memory"]["gate"])
    assert found.tokenizer.get_vocab() == model.tokenizer.get_vocab()


def test_code_that_an_adapter_names_is_run_only_when_asked_for(base, trained, tmp_path):
    rule = tmp_path / "rule.py"
    rule.write_text("from gemma_jax.model.memory import GatedDelta\nclass Mine(GatedDelta): pass\n")
    shutil.copytree(trained[0], tmp_path / "copy")
    described = tmp_path / "copy" / adapters.DESCRIPTION
    content = json.loads(described.read_text())
    content["memory"]["rule"] = "elsewhere/rule.py:Mine"
    described.write_text(json.dumps(content))
    store.write_manifest(tmp_path / "copy")
    with pytest.raises(InputError, match="names code"):
        gemma_jax.load(base, adapter=tmp_path / "copy")
    model = gemma_jax.load(base, adapter=tmp_path / "copy", memory=f"{rule}:Mine")
    assert equal_trees(model.params, trained[2])
