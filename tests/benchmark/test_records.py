"""Names of figures are those of the published tables, and no two measurements share one."""

import dataclasses
import sys

import pytest

from gemma_jax import PRESETS
from gemma_jax.benchmark import records
from gemma_jax.errors import InputError

GEMMA = PRESETS["gemma-2b"].with_memory(rule="gated_delta")


@pytest.mark.parametrize(
    "number, text",
    [
        (10_000_000, "10m"),
        (100_000, "100k"),
        (8192, "8k"),
        (131_072, "131k"),
        (524_288, "524k"),
        (2048, "2k"),
        (700, "700"),
        (1000, "1000"),
        (1024, "1k"),
        (312_500, "312500"),
    ],
)
def test_labels(number, text):
    assert records.label(number) == text


def test_no_two_numbers_share_a_label():
    numbers = {2**i for i in range(24)} | {n * 1000 for n in range(1, 20_000)}
    numbers |= {n * 1_000_000 for n in range(1, 50)} | set(range(1, 5000))
    assert len({records.label(number) for number in numbers}) == len(numbers)


@pytest.mark.parametrize(
    "what, options, name",
    [
        ("prefill", {"tokens": 10_000_000}, "prefill_10m"),
        ("decode", {}, "decode"),
        ("decode", {"tokens": 2048}, "decode_2k"),
        ("decode", {"quantized": True}, "decode_int8"),
        ("decode", {"batch_size": 32}, "decode_b32"),
        ("prefill", {"tokens": 8192, "chunk_tokens": 4096}, "prefill_8k_chunk4k"),
        ("train_step", {}, "train_step"),
    ],
)
def test_names_of_gemma_2b(what, options, name):
    assert records.figure_name(what, GEMMA, **options) == name


def test_names_tell_forms_rules_and_models_apart():
    def name(config):
        return records.figure_name("prefill", config, tokens=10_000_000)

    segment = {"local_attention": "segment", "segment_length": 2048}
    assert name(GEMMA.with_memory(rule="linear", **segment)) == "prefill_10m_segment"
    assert name(GEMMA.with_memory(rule="linear")) == "prefill_10m_linear"
    assert name(GEMMA.with_memory(segment_length=512)) == "prefill_10m_s512"
    assert name(GEMMA.with_memory(rule="my/rule.py:MyRule")) == "prefill_10m_myrule"
    assert name(dataclasses.replace(GEMMA, dtype="float32")) == "prefill_10m_float32"
    small = PRESETS["gemma-3-270m"].with_memory(rule="gated_delta")
    small = dataclasses.replace(small, name="mine")
    assert name(small) == "gemma3_270m_prefill_10m"
    assert name(PRESETS["gemma-2-2b"].with_memory(rule="gated_delta")) == "gemma2_2b_prefill_10m"


def test_records_survive_the_file_and_replace_their_like(tmp_path):
    file = tmp_path / "records.json"
    first, second, other = (
        records.make_record(name, "s", values)
        for name, values in (("a", [1.0, 3.0, 2.0]), ("a", [5.0]), ("b", [1.0]))
    )
    records.append(file, [first, other])
    records.append(file, [second])
    assert records.read(file) == [other, second] and first.value == 2.0
    elsewhere = dataclasses.replace(first, command="another")
    records.append(file, [elsewhere])
    assert records.read(file) == [other, second, elsewhere]


def test_options_that_no_figure_depends_on_are_left_out_of_the_command(monkeypatch):
    typed = "command --quiet --output=a/b x --output c --outputs --lengths 4K --output"
    monkeypatch.setattr(sys, "argv", typed.split())
    assert records.command("m", {"--output": 1, "--quiet": 0}) == (
        "python -m m x --outputs --lengths 4K"
    )
    assert records.command("m") == f"python -m m {typed.removeprefix('command ')}"


@pytest.mark.parametrize("content", ["", "[1]", '[{"name": 1}]', "{}x"])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    file = tmp_path / "records.json"
    file.write_text(content)
    with pytest.raises(InputError, match="no records"):
        records.read(file)
