"""Models that are broken in some way: a sentence and an exit code of the contract, never more."""

import json
import math
import struct

import numpy as np
import pytest

import convert_weights

CODES = {2, 3, 4}


@pytest.fixture
def convert(tmp_path, capsys):
    """Runs the command on a model directory; gives its exit code and last line."""

    def call(source):
        try:
            code = convert_weights.main([str(source), str(tmp_path / "dest"), "--overwrite"])
        except SystemExit as exit_:
            code = exit_.code
        lines = capsys.readouterr().err.strip().splitlines()
        assert not any(path.name.startswith(".dest") for path in tmp_path.iterdir())
        return code, lines[-1]

    return call


def assert_refused(found, *words):
    code, line = found
    assert code in CODES, line
    assert line.startswith("error: ") and "Internal error" not in line
    for word in words:
        assert word in line


VALUES = (None, "x", "", -1, 0, 1.5, True, [], {}, [1, "a"], 10**30, math.nan, -math.inf)
FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "layer_types",
    "query_pre_attn_scalar",
    "vocab_size",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "eos_token_id",
    "hidden_activation",
)


@pytest.mark.parametrize("field", FIELDS)
def test_any_value_of_a_field_of_the_configuration_is_taken_or_refused(make_model, convert, field):
    directory, _ = make_model()
    content = json.loads((directory / "config.json").read_text())
    refused = 0
    for value in VALUES:
        (directory / "config.json").write_text(json.dumps(content | {field: value}))
        code, line = convert(directory)
        assert code in {0, *CODES}, (value, line)
        assert "Internal error" not in line, (value, line)
        refused += code != 0
    assert refused


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b'"a"',
        b"\xff\xfe",
        b"{}",
        b"[" * 10**5,
        b'{"model_type": 3}',
    ],
    ids=lambda content: repr(content[:12]),
)
def test_a_configuration_that_is_none_is_refused(make_model, convert, content):
    directory, _ = make_model()
    (directory / "config.json").write_bytes(content)
    assert_refused(convert(directory))


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/b",
        None,
        3,
        ["a"],
        "a\0b",
        "no" * 200,
    ],
    ids=repr,
)
def test_an_index_that_names_what_is_no_file_beside_it_is_refused(make_model, convert, shard):
    directory, tensors = make_model(shards=2)
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(tensors))] = shard
    index.write_text(json.dumps(content))
    assert_refused(convert(directory))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"weight_map": 3}',
        b'{"weight_map": {}}',
        b'{"weight_map": []}',
        b"\xff",
    ],
    ids=repr,
)
def test_an_index_that_is_none_is_refused(make_model, convert, content):
    directory, _ = make_model(shards=2)
    (directory / "model.safetensors.index.json").write_bytes(content)
    assert_refused(convert(directory))


def with_header(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BROKEN = {
    "empty": b"",
    "short": b"\x01\x02",
    "no header": b"\xff" * 64,
    "huge header": struct.pack("<Q", 2**62),
    "truncated header": struct.pack("<Q", 100) + b"{",
    "no JSON": with_header(b"nonsense"),
    "list": with_header([]),
    "no tensors": with_header({}),
    "not UTF-8": with_header(b"\xff\xfe"),
    "no data": with_header({"a": F32}),
    "offsets backwards": with_header({"a": F32 | {"data_offsets": [8, 0]}}, b"\0" * 8),
    "offsets beyond": with_header({"a": F32 | {"data_offsets": [0, 2**60]}}, b"\0" * 8),
    "negative shape": with_header({"a": F32 | {"shape": [-2]}}, b"\0" * 8),
    "huge shape": with_header({"a": F32 | {"shape": [2**62, 2**62]}}, b"\0" * 8),
    "unknown dtype": with_header({"a": F32 | {"dtype": "F7"}}, b"\0" * 8),
    "integers": with_header({"a": F32 | {"dtype": "I32"}}, b"\0" * 8),
    "another tensor": with_header({"a": F32}, b"\0" * 8),
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_weights_that_are_none_are_refused(make_model, convert, content):
    directory, _ = make_model()
    (directory / "model.safetensors").write_bytes(content)
    assert_refused(convert(directory))


@pytest.mark.parametrize("share", np.linspace(0, 0.99, 10))
def test_truncated_weights_are_refused_with_their_name(make_model, convert, share):
    directory, _ = make_model()
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    code, line = convert(directory)
    assert code == 4
    assert "model.safetensors" in line


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"eos_token_id": "x"}'], ids=repr)
def test_broken_files_beside_the_weights_are_refused_or_not_needed(
    make_model, convert, name, content
):
    directory, _ = make_model()
    (directory / name).write_bytes(content)
    code, line = convert(directory)
    assert code in {0, *CODES} and "Internal error" not in line
