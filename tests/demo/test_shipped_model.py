"""The model that comes with the package: found, whole, small, and what `run.py` asks."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest

import gemma_jax
import run
from gemma_jax import demo
from gemma_jax.checkpoint import store
from gemma_jax.errors import CorruptError, InputError

MOST_BYTES = 16_000_000
shipped = pytest.mark.skipif(
    not demo.MODEL.is_dir(), reason="the trained model is not in gemma_jax/demo/model yet"
)


@pytest.fixture
def answered(monkeypatch, tmp_path, capsys):
    """Runs run.py without --model; gives what it reports and says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call():
        code = run.main(["--prompt", "Call me", "--max-new-tokens", "2", "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else None, err

    return call


@shipped
def test_the_shipped_model_is_whole_and_small():
    store.check(demo.checkpoint())
    assert sum(file.stat().st_size for file in demo.MODEL.rglob("*")) < MOST_BYTES
    config = store.read_config(demo.MODEL)
    assert config.memory.rule != "off" and config.dtype == "bfloat16" and "demo" in config.name
    assert (demo.MODEL / "README.md").is_file()


@shipped
def test_run_py_asks_the_shipped_model_where_none_is_named(answered):
    code, report, err = answered()
    config = store.read_config(demo.MODEL)
    assert (code, report["model"]) == (0, config.name)
    assert report["memory_rule"] == config.memory.rule and "warning" not in err


def test_run_py_asks_what_stands_in_its_place(answered, small_model, monkeypatch):
    monkeypatch.setattr(demo, "MODEL", small_model)
    code, report, err = answered()
    assert (code, report["model"], report["memory_rule"]) == (0, "small-demo", "gated_delta")
    as_recorded = gemma_jax.load(small_model).config
    assert report["state_bytes"] > gemma_jax.state_bytes(as_recorded)  # float32 on CPUs
    assert "warning" not in err and "no --model was given" in err


def test_a_damaged_model_is_refused(small_model, monkeypatch, tmp_path):
    shutil.copytree(small_model, tmp_path / "model")
    monkeypatch.setattr(demo, "MODEL", tmp_path / "model")
    with open(tmp_path / "model" / "tokenizer.json", "a") as file:
        file.write(" ")
    with pytest.raises(CorruptError, match="tokenizer.json"):
        gemma_jax.load(demo.checkpoint())


def test_an_installation_without_it_says_so(answered, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "MODEL", tmp_path / "nothing")
    with pytest.raises(InputError, match="--model"):
        demo.checkpoint()
    code, report, err = answered()
    assert (code, report) == (3, None) and "missing from this installation" in err


def test_loading_leaves_a_model_that_cannot_be_written_as_it_is(small_model):
    def files():
        return {file: file.stat().st_mtime_ns for file in sorted(small_model.rglob("*"))}

    before = files()
    modes = {file: file.stat().st_mode for file in (*before, small_model)}
    try:
        for file in modes:
            file.chmod(0o555 if file.is_dir() else 0o444)
        gemma_jax.load(small_model)
    finally:
        for file, mode in modes.items():
            file.chmod(mode)
    assert files() == before


def test_the_model_belongs_to_what_is_installed():
    project = tomllib.loads((Path(run.__file__).parent / "pyproject.toml").read_text())
    assert "model/**" in project["tool"]["setuptools"]["package-data"]["gemma_jax.demo"]
