"""The command line of convert_weights.py: one sentence and an exit code for everything."""

import subprocess
import sys
from pathlib import Path

import pytest

import convert_weights
import gemma_jax
from gemma_jax import random_model

ROOT = Path(__file__).parents[1]


@pytest.fixture
def source(tmp_path):
    return random_model.write_hugging_face(tmp_path / "source")


def run(*arguments):
    return convert_weights.main([str(argument) for argument in arguments])


def test_there_and_back(source, tmp_path, capsys):
    assert run(source, tmp_path / "dest") == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "source: " in said.err and "parameters, 2 layers, head of its own" in said.err
    assert f"written to {tmp_path / 'dest'}." in said.err
    assert run(tmp_path / "dest", tmp_path / "back", "--to-hf") == 0
    assert (tmp_path / "back" / "model.safetensors").is_file()


def test_relative_paths(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("source", "dest") == 0
    assert run("dest", "back", "--to-hf") == 0
    assert gemma_jax.load("dest").config.num_layers == 2


def test_nothing_else_is_lost_by_overwriting(source, tmp_path, capsys):
    """Neither the source, nor what lies beside a model, nor what holds them."""
    checkpoint, back = tmp_path / "checkpoint", tmp_path / "back"
    assert run(source, checkpoint) == run(checkpoint, back, "--to-hf") == 0
    capsys.readouterr()
    (back / "precious.txt").write_text("mine")
    for arguments in (
        (checkpoint, back, "--to-hf"),
        (checkpoint, checkpoint, "--to-hf"),
        (checkpoint, tmp_path, "--to-hf"),
        (source, source),
        (source, tmp_path),
    ):
        assert run(*arguments, "--overwrite") == 2
        assert "choose another name" in capsys.readouterr().err
    assert (back / "precious.txt").read_text() == "mine"
    assert (checkpoint / "manifest.json").is_file() and (source / "config.json").is_file()
    (back / "precious.txt").unlink()
    assert run(checkpoint, back, "--to-hf", "--overwrite") == 0


def test_verification_is_reported(source, tmp_path, capsys):
    pytest.importorskip("torch")
    assert run(source, tmp_path / "dest", "--dtype", "float32", "--verify") == 0
    said = capsys.readouterr().err
    assert "verified against Hugging Face transformers over 500 tokens: maximum KL" in said
    assert "top-5 agreement 100.0%" in said


def run_without_torch(*arguments):
    code = (
        "import sys; sys.modules['torch'] = None;"
        " import convert_weights; sys.exit(convert_weights.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_without_torch_verification_is_refused_before_any_work(source, tmp_path):
    done = run_without_torch(source, tmp_path / "dest", "--verify")
    assert done.returncode == 2 and "pip install torch" in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_without_torch_torch_files_are_refused_and_safetensors_converted(source, tmp_path):
    assert run_without_torch(source, tmp_path / "dest").returncode == 0
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    done = run_without_torch(source, tmp_path / "other")
    assert done.returncode == 2 and "pip install torch" in done.stderr


@pytest.mark.parametrize(
    "arguments, code, sentence",
    [
        (["{tmp}/nowhere", "{tmp}/dest"], 3, "does not exist"),
        (["{tmp}/source", "{tmp}/source"], 2, "--overwrite"),
        (["{tmp}/source", "{tmp}/source", "--overwrite"], 2, "overlap"),
        (["{tmp}/source", "{tmp}/dest", "--to-hf"], 3, "is a Hugging Face model"),
        (["{tmp}/source", "{tmp}/dest", "--revision", "main"], 2, "--revision"),
        (["{tmp}/source", "{tmp}/source/config.json"], 2, "exists"),
        (["{tmp}/source", "{tmp}/source/config.json/x"], 3, "cannot be read or written"),
    ],
)
def test_one_sentence_and_its_code(source, tmp_path, capsys, arguments, code, sentence):
    assert run(*(argument.format(tmp=tmp_path) for argument in arguments)) == code
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert sentence in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_damage_is_exit_code_4(source, tmp_path, capsys):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert run(source, tmp_path / "dest") == 4
    assert "download it again" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["one"], ["a", "b", "--dtype", "int4"], ["a", "b", "--to-hf", "--verify"]]
)
def test_options_that_make_no_sense(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
