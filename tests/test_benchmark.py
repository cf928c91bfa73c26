"""The benchmark counts what was done, and writes records that can be rerun."""

import json

import pytest

from gemma_jax import PRESETS, benchmark, demo
from gemma_jax.checkpoint import store


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from gemma_jax.checkpoint.convert import convert

    directory = tmp_path_factory.mktemp("benchmark")
    source = demo.write_hugging_face(directory / "source")
    convert(source, directory / "model", dtype="float32")
    return directory / "model"


@pytest.mark.parametrize("what", ["prefill", "decode"])
def test_records(checkpoint, tmp_path, capsys, what):
    file = tmp_path / "records.json"
    arguments = [what, "--model", checkpoint, "--tokens", "700", "--chunk-tokens", "256"]
    arguments += ["--memory", "linear", "--segment-length", "128", "--new-tokens", "4"]
    for _ in range(2):
        assert benchmark.main([*map(str, arguments), "--output", str(file)]) == 0
    name = "prefill_700_tokens_per_second" if what == "prefill" else "decode_tokens_per_second"
    records = [record for record in json.loads(file.read_text()) if record["name"] == name]
    (record,) = records  # the second run replaced the first
    assert record["value"] > 0 and len(record["repeats"]) == (3 if what == "prefill" else 8)
    assert min(record["repeats"]) <= record["value"] <= max(record["repeats"])
    assert name in capsys.readouterr().out


def test_reading_then_writing_in_one_run(checkpoint, tmp_path):
    file = tmp_path / "records.json"
    arguments = ["prefill", "decode", "--model", checkpoint, "--tokens", "512", "--repeats", "2"]
    arguments += ["--local-attention", "segment", "--segment-length", "64", "--chunk-tokens", "128"]
    assert benchmark.main([*map(str, arguments), "--batch-size", "3", "--output", str(file)]) == 0
    records = {record["name"]: record for record in json.loads(file.read_text())}
    speed, dense = (records[f"prefill_512_segment_{x}"] for x in ("tokens_per_second", "dense"))
    flops = benchmark.dense_flops(store.read_config(checkpoint))
    assert dense["repeats"] == pytest.approx([r * flops / 1e12 for r in speed["repeats"]])
    # Three rows are three times the tokens of one.
    run = benchmark.Run(benchmark.parse([*map(str, arguments), "--batch-size", "3"]), None, None)
    run.config, run._read = store.read_config(checkpoint), lambda length: 0.5
    rates = {name: repeats for name, _, repeats in run.prefill()}
    assert rates["prefill_512_tokens_per_second"] == [3 * 512 / 0.5] * 2
    assert records["decode_b3_tokens_per_second"]["value"] > 0


def test_shares_are_of_the_best_in_the_same_run():
    records = {
        name: benchmark.make_record(name, value, "TFLOP/s", repeats)
        for name, value, repeats in (
            ("prefill_10m_dense", 600.0, [590.0, 600.0, 640.0]),
            ("matmul_ceiling", 800.0, [800.0]),
        )
    }
    ((name, _, repeats),) = benchmark.shares(records)
    assert name == "prefill_10m_ceiling_share" and repeats == [0.7375, 0.75, 0.8]


@pytest.mark.parametrize(
    "number, text", [(10_000_000, "10m"), (100_000, "100k"), (8192, "8k"), (700, "700")]
)
def test_labels(number, text):
    assert benchmark.label(number) == text


def test_dense_work_of_a_token():
    assert benchmark.dense_flops(PRESETS["gemma-2b"]) == pytest.approx(3.96e9, rel=0.01)


@pytest.mark.parametrize("option", ["--tokens", "--repeats", "--segment-length"])
def test_out_of_range_is_one_sentence(option, capsys):
    with pytest.raises(SystemExit) as end:
        benchmark.main(["prefill", "--preset", "gemma-2b", option, "0"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and "at least 1" in said and said.count("\n") == 1


@pytest.mark.parametrize("text, number", [("10M", 10_000_000), ("8K", 8192), ("700", 700)])
def test_counts(text, number):
    assert benchmark.count(text) == number
