"""Perplexity by position: `python -m gemma_jax.evaluate --text FILE`."""

import json
import lzma

from gemma_jax import random_model
from gemma_jax.checkpoint import store
from gemma_jax.model.adapting import split
from gemma_jax.train.result import write_adapter


def test_local_attention_is_as_asked_for(sources, evaluate, tmp_path):
    (tmp_path / "text.txt").write_text("the people called him by his name and " * 20)
    arguments = ["--model", sources[1], "--text", tmp_path / "text.txt", "--tokens", "120"]
    forms = ["--local-attention", "segment", "--segment-length", "64"]
    result = evaluate(*arguments, *forms, "--without-sink", "--json")
    found = [json.loads(line) for line in result.out.splitlines()]
    assert result.code == 0 and len(found) == 2
    assert {record["segment_length"] for record in found} == {64}
    assert {record["local_attention"] for record in found} == {"segment"}
    assert [record["sink"] for record in found] == [True, False]
    assert all(0 < record["nll"] < 30 and record["tokens"] == 120 for record in found)


def test_a_compressed_text_is_the_text(sources, evaluate, tmp_path):
    data = b"\xef\xbb\xbf" + b"the people called him\r\nby his name and " * 20
    (tmp_path / "text.txt").write_bytes(data)
    (tmp_path / "text.txt.xz").write_bytes(lzma.compress(data))
    (tmp_path / "bad.txt.xz").write_bytes(lzma.compress(data)[:-30])
    arguments = ["--model", sources[1], "--segment-length", "64", "--json", "--text"]
    plain, packed, bad = (
        evaluate(*arguments, tmp_path / name) for name in ("text.txt", "text.txt.xz", "bad.txt.xz")
    )
    assert plain.code == 0 and plain.out == packed.out
    assert bad.code == 3 and "bad.txt.xz cannot be read" in bad.err


def test_an_adapter_is_measured_beside_its_model(sources, evaluate, tmp_path):
    (tmp_path / "text.txt").write_text("the people called him by his name and " * 500)
    model = store.load(sources[1], memory="linear", segment_length=64)
    trained, frozen = split(model.params, "memory")
    for layer in trained.values():  # a gate that reads memory alone
        layer["attention"]["memory"]["gate"] += 50.0
    write_adapter(tmp_path / "one", model.config, trained, frozen, "memory", {}, "float32")
    arguments = ["--model", sources[1], "--text", tmp_path / "text.txt", "--tokens", "3K", "--json"]
    result = evaluate(*arguments, "--adapter", tmp_path / "one")
    assert result.code == 0, result.err
    off, ours = [json.loads(line) for line in result.out.splitlines()]
    assert (off["memory"], ours["memory"]) == ("off", "linear")
    assert off["segment_length"] == ours["segment_length"] == 64
    assert ours["model"] == f"{off['model']} with adapter" == f"{random_model.NAME} with adapter"
    assert len(ours["nll_by_position"]) == 2 and abs(ours["nll"] - off["nll"]) > 0.01
