"""The benchmark counts what was done, and writes records that can be rerun."""

import dataclasses
import json

import numpy as np
import pytest

from gemma_jax import PRESETS, random_model
from gemma_jax.benchmark import command, device, files, peer, profile, records, running
from gemma_jax.checkpoint import store
from gemma_jax.errors import GemmaError, InputError, UsageError
from gemma_jax.inference import console

NAME = "random_tiny_gemma"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from gemma_jax.checkpoint.convert import convert

    directory = tmp_path_factory.mktemp("benchmark")
    source = random_model.write_hugging_face(directory / random_model.NAME)
    convert(source, directory / "model", dtype="float32")
    return str(directory / "model")


def measured(arguments, file):
    assert command.main([*map(str, arguments), "--output", str(file)]) == 0
    return {record.name: record for record in records.read(file)}


def test_reading_then_writing_in_one_run(checkpoint, tmp_path, capsys):
    file = tmp_path / "records.json"
    arguments = ["prefill", "decode", "--model", checkpoint, "--tokens", "512", "--repeats", "2"]
    arguments += ["--local-attention", "segment", "--segment-length", "64", "--chunk-tokens", "128"]
    arguments += ["--batch-size", "3", "--new-tokens", "4", "--format", "markdown"]
    measured(arguments, file)
    found = measured(arguments, file)  # replaces what the first run wrote
    name = f"{NAME}_{{}}_512_segment_off_s64_float32_b3_chunk128"
    prefill, decode = name.format("prefill"), name.format("decode")
    speed, dense = (found[f"{prefill}_{x}"] for x in ("tokens_per_second", "dense"))
    assert len(json.loads(file.read_text())) == len(found)
    assert min(speed.repeats) <= speed.value <= max(speed.repeats) and len(speed.repeats) == 2
    flops = running.dense_flops(store.read_config(checkpoint))
    assert dense.repeats == pytest.approx([r * flops / 1e12 for r in speed.repeats])
    assert found[f"{decode}_tokens_per_second"].value > 0
    assert found[f"{decode}_weight_copies"].value == 0
    assert len(found[f"{decode}_tokens_per_second"].repeats) == 8
    shown = capsys.readouterr().out
    assert f"| {speed.name} | {speed.value:,.5g} | tokens/s |" in shown and "| --- |" in shown


@pytest.mark.parametrize("chunk", [48, 96, 100, 1000])
def test_pieces_need_not_end_where_segments_do(checkpoint, tmp_path, chunk):
    arguments = ["prefill", "--model", checkpoint, "--tokens", "250", "--repeats", "1"]
    arguments += ["--segment-length", "64", "--chunk-tokens", chunk]
    found = measured(arguments, tmp_path / "records.json")
    assert any(name.endswith("_tokens_per_second") for name in found)


@pytest.mark.parametrize("error", [GemmaError("stopped"), KeyboardInterrupt()], ids=type)
def test_what_was_measured_before_an_error_is_kept(checkpoint, tmp_path, monkeypatch, error):
    def decode(self):
        raise error

    monkeypatch.setattr(running.Run, "decode", decode)
    file = tmp_path / "records.json"
    arguments = ["prefill", "decode", "--model", checkpoint, "--tokens", "64", "--repeats", "1"]
    assert command.main([*arguments, "--output", str(file)]) != 0
    assert f"{NAME}_prefill_64_off_float32_tokens_per_second" in {
        r.name for r in records.read(file)
    }


def test_int8_weights_are_named(monkeypatch, tmp_path):
    changes = {"vocab_size": 50, "width": 16, "mlp_dim": 24, "num_heads": 2, "head_dim": 8}
    tiny = dataclasses.replace(PRESETS["gemma-2b"], layer_types=("global",), **changes)
    monkeypatch.setitem(PRESETS, "gemma-2b", tiny)
    arguments = ["decode", "--preset", "gemma-2b", "--quantize", "int8", "--tokens", "64"]
    arguments += ["--memory", "gated_delta", "--new-tokens", "2"]
    found = measured(arguments, tmp_path / "records.json")
    speed, read = (found[f"decode_64_int8_{x}"] for x in ("tokens_per_second", "weights_read"))
    bytes_read = read.value * 1e9 / speed.value
    matrices = 50 * 16 + 16 * 32 + 16 * 16 + 3 * 16 * 24
    assert matrices < bytes_read < 2 * matrices  # a byte each; scales, norms and memory beside


def test_rows_of_a_batch_all_count(checkpoint):
    arguments = ["prefill", "--model", checkpoint, "--tokens", "512", "--batch-size", "3"]
    (task,) = command.plan(command.parse([*arguments, "--repeats", "2"]))
    run = running.Run(task, store.read_config(checkpoint), {})
    run._read = lambda length: 0.5
    rates = {name.rpartition("prefill_")[2]: repeats for name, _, repeats in run.prefill()}
    assert rates["512_off_float32_b3_tokens_per_second"] == [3 * 512 / 0.5] * 2


def test_each_shape_has_its_own_process_and_the_records_name_this_command(checkpoint, tmp_path):
    file = tmp_path / "records.json"
    found = measured(
        ["prefill", "--model", checkpoint, "--tokens", "64", "128", "--repeats", "1"], file
    )
    for length in (64, 128):
        record = found[f"{NAME}_prefill_{length}_off_float32_tokens_per_second"]
        assert record.value > 0 and record.command == records.command()


def test_loading_is_timed_from_the_disk_to_the_device(checkpoint, tmp_path):
    found = measured(["load", "--model", checkpoint, "--repeats", "2"], tmp_path / "r.json")
    times, rate = found[f"{NAME}_load_float32_seconds"], found[f"{NAME}_load_float32_rate"]
    model = store.load(checkpoint)
    size = sum(leaf.nbytes for layer in model.params.values() for leaf in _leaves(layer))
    assert rate.repeats == pytest.approx([size / s / 1e9 for s in times.repeats])


def _leaves(tree):
    return [tree] if not isinstance(tree, dict) else [x for t in tree.values() for x in _leaves(t)]


def test_a_training_step_is_measured(monkeypatch, tmp_path):
    changes = {"vocab_size": 50, "width": 16, "mlp_dim": 24, "num_heads": 2, "head_dim": 8}
    tiny = dataclasses.replace(PRESETS["gemma-2b"], layer_types=("global",), **changes)
    monkeypatch.setitem(PRESETS, "gemma-2b", tiny)
    arguments = ["train-step", "--preset", "gemma-2b", "--tokens", "64", "--memory", "gated_delta"]
    arguments += ["--segment-length", "32", "--repeats", "2"]
    found = measured(arguments, tmp_path / "records.json")
    rate, mfu = (found[f"train_step_64_s32_{x}"].value for x in ("tokens_per_second", "mfu"))
    # Embedding; qkv and out; gate, up and down; three norms; the memory's gate, kernel and bias.
    count = 50 * 16 + 16 * 32 + 16 * 16 + 3 * 16 * 24 + 3 * 16 + 2 + 16 + 1
    assert mfu == pytest.approx(6 * count * rate / 989e12)


def test_real_text_is_read_to_the_first_token(checkpoint, tmp_path, capsys):
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for text in texts:
        text.write_text("the people of that time made long words " * 40)
    arguments = ["read", "--model", checkpoint, "--text", *texts, "--repeats", "2", "--tokens"]
    found = measured([*arguments, "600"], tmp_path / "records.json")
    whole, alone, beyond = (
        found[f"{NAME}_600_seconds_{x}"].repeats
        for x in ("to_first_token", "tokenizing", "beyond_tokenizing")
    )
    assert beyond == pytest.approx(np.subtract(whole, alone))
    capsys.readouterr()
    assert command.main([*map(str, arguments), "10M"]) == 3
    said = capsys.readouterr().err
    model = store.load(checkpoint)
    with pytest.raises(InputError) as error:
        list(files.text_ids(model, [str(text) for text in texts], 10**7))
    assert said == f"error: {error.value}\n" and "have only" in said


def test_the_text_is_cut_at_the_last_token(checkpoint, tmp_path):
    (tmp_path / "a.txt").write_text("the people of that time made long words " * 40)
    model = store.load(checkpoint)
    ids = [
        [i for some in files.text_ids(model, [str(tmp_path / "a.txt")], n) for i in some]
        for n in (7, 300)
    ]
    assert len(ids[0]) == 7 and len(ids[1]) == 300 and ids[1][:7] == ids[0] and ids[0][0] == 2


def test_shares_are_of_the_best_in_the_same_run():
    made = {
        name: records.make_record(name, unit, repeats)
        for name, unit, repeats in (
            ("prefill_10m_dense", "TFLOP/s", [590.0, 600.0, 640.0]),
            ("decode_weights_read", "GB/s", [2000.0]),
            ("matmul_ceiling", "TFLOP/s", [800.0]),
            ("copy_ceiling", "GB/s", [4000.0]),
        )
    }
    dense, read = device.shares(made)
    assert dense.name == "prefill_10m_ceiling_share" and dense.repeats == [0.7375, 0.75, 0.8]
    assert dense.value == 0.75 and (read.name, read.value) == ("decode_ceiling_share", 0.5)


def test_the_peer_is_measured_on_the_same_shapes(checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    arguments = ["prefill", "decode", "--model", checkpoint, "--tokens", "96", "--repeats", "2"]
    monkeypatch.setattr(command, "in_process_of_its_own", ours)
    found = measured([*arguments, "--new-tokens", "3", "--peer", "hf"], tmp_path / "records.json")
    for what in ("prefill", "decode"):
        name = f"{NAME}_{{}}_96{{}}_tokens_per_second"
        mine = found[name.format(what, "_off_float32")]
        theirs = found[name.format(f"hf_{what}", "")]
        ratio = found[f"{NAME}_{what}_vs_hf_96_off_float32"]
        assert ratio.value == pytest.approx(mine.value / theirs.value)
        assert "torch" in theirs.versions and len(theirs.repeats) == (2 if what == "prefill" else 8)


def ours(task):
    """Figures as another process of ours would give them."""
    config = running.read_config(task)
    return [
        records.make_record(
            f"{records.figure_name(what, config, tokens=task.tokens)}_tokens_per_second",
            "tokens/s",
            [90.0, 100.0, 120.0],
        )
        for what in task.what
    ]


@pytest.mark.parametrize("preset", ["gemma-2b", "gemma-2-2b", "gemma-3-1b"])
def test_the_peer_has_the_same_shape(preset):
    config = PRESETS[preset]
    fields = peer.huggingface_fields(config, 8192)
    if config.family == "gemma2":
        fields |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    back = running.GemmaConfig.from_hf(fields)
    for name in ("width", "mlp_dim", "num_heads", "num_kv_heads", "head_dim", "layer_types"):
        assert getattr(back, name) == getattr(config, name)
    assert back.query_scale == pytest.approx(config.query_scale)
    assert back.sliding_window == config.sliding_window


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["prefill", "--preset", "gemma-2b", "--tokens", "0"], 2, "at least 1"),
        (["prefill", "--preset", "gemma-2b", "--repeats", "0"], 2, "at least 1"),
        (["prefill", "--preset", "gemma-2b", "--memory", "no"], 2, "no memory rule 'no'"),
        (["prefill"], 2, "--preset NAME or --model DIR"),
        (["prefill", "--model", "nowhere"], 3, "is not a directory"),
        (["load", "--preset", "gemma-2b"], 2, "--model DIR"),
        (["train-step", "--preset", "gemma-2b", "--quantize", "int8"], 2, "--quantize"),
        (["train-step", "--preset", "gemma-2b", "--peer", "hf"], 2, "prefill and decode alone"),
        (["prefill", "--preset", "gemma-2b", "--output", "no/where.json"], 3, "--output"),
        (["ceilings", "--profile", "pages"], 2, "--profile is for prefill, decode, train-step"),
        (["prefill", "--preset", "gemma-2b", "--profile", __file__], 3, "name a directory"),
    ],
)
def test_wrong_options_are_one_sentence_before_anything_is_measured(
    arguments, code, said, capsys, monkeypatch
):
    monkeypatch.setattr(command, "measure", None)
    monkeypatch.setattr(device, "is_cpu_by_choice", lambda: False)
    monkeypatch.setattr(command, "in_process_of_its_own", None)
    try:
        found = command.main(arguments)
    except SystemExit as end:
        found = end.code
    error = capsys.readouterr().err
    assert found == code and said in error and error.count("\n") == 1


def test_read_needs_text(checkpoint, capsys):
    assert command.main(["read", "--model", checkpoint]) == 2
    assert "--text FILE" in capsys.readouterr().err
    assert command.main(["read", "--model", checkpoint, "--text", "none.txt"]) == 3


def test_the_ceilings_come_first_and_from_a_process_of_their_own(monkeypatch):
    asked = []

    def process(task):
        asked.append(command.as_arguments(task))
        return [records.make_record("matmul_ceiling", "TFLOP/s", [800.0])]

    monkeypatch.setattr(device, "is_cpu_by_choice", lambda: False)
    monkeypatch.setattr(command, "in_process_of_its_own", process)
    monkeypatch.setattr(
        command, "measure", lambda task: iter([("prefill_8k_dense", "TFLOP/s", [400.0])])
    )
    assert command.main(["prefill", "--preset", "gemma-2b", "--tokens", "8K"]) == 0
    assert asked == [["ceilings"]]
    assert command.main(["prefill", "--preset", "gemma-2b", "--tokens", "8K", "2K"]) == 0
    assert [line[0] for line in asked[1:]] == ["ceilings", "prefill", "prefill"]
    assert "8192" in asked[2] and "2048" in asked[3]
    again = command.parse(asked[2])
    assert again.tokens == [8192] and again.preset == "gemma-2b" and again.repeats == 3


def test_what_another_process_had_measured_is_kept(checkpoint, tmp_path, capsys):
    file = tmp_path / "records.json"
    arguments = ["prefill", "decode", "--model", checkpoint, "--tokens", "64", "32"]
    arguments += ["--repeats", "1", "--new-tokens", str(2**62)]  # more than decoding takes
    assert command.main([*arguments, "--output", str(file)]) != 0
    assert "error: " in capsys.readouterr().err
    names = {record.name for record in records.read(file)}
    assert f"{NAME}_prefill_64_off_float32_tokens_per_second" in names


def profiled(monkeypatch, call):
    """`call` with a profiler that sees one kernel; the calls that were profiled."""
    seen = []

    def record(call):
        seen.append(call())
        return [profile.Kernel("product", 0.0, 1e-3)]

    monkeypatch.setattr(profile, "check", lambda: None)
    monkeypatch.setattr(profile, "record", record)
    call()
    return seen


def test_profiles_come_after_the_figures_and_change_none(checkpoint, tmp_path, monkeypatch):
    lengths = []
    block = running.Run.decode

    def decode(self):
        lengths.append(int(self.reading[1].length[0]))
        yield from block(self)

    monkeypatch.setattr(running.Run, "decode", decode)
    file, pages = tmp_path / "records.json", tmp_path / "profiles"
    arguments = [
        "prefill",
        "decode",
        "--model",
        checkpoint,
        "--tokens",
        "72",
        "--chunk-tokens",
        "32",
    ]
    arguments += ["--repeats", "1", "--new-tokens", "2", "--profile", str(pages)]
    found = {}
    seen = profiled(monkeypatch, lambda: found.update(measured(arguments, file)))
    assert len(seen) == 2 and lengths == [72]
    names = {f"{NAME}_{what}_72_off_float32_chunk32" for what in ("prefill", "decode")}
    assert {page.name for page in pages.iterdir()} == {f"{name}.md" for name in names}
    assert all("`product`" in page.read_text() for page in pages.iterdir())
    assert {f"{name}_tokens_per_second" for name in names} <= set(found)
    assert not any("--profile" in record.command for record in found.values())


def test_a_step_of_training_is_profiled(monkeypatch, tmp_path):
    changes = {"vocab_size": 50, "width": 16, "mlp_dim": 24, "num_heads": 2, "head_dim": 8}
    tiny = dataclasses.replace(PRESETS["gemma-2b"], layer_types=("global",), **changes)
    monkeypatch.setitem(PRESETS, "gemma-2b", tiny)
    arguments = ["train-step", "--preset", "gemma-2b", "--memory", "gated_delta", "--tokens", "64"]
    arguments += ["--segment-length", "16", "--repeats", "1", "--profile", str(tmp_path)]
    assert len(profiled(monkeypatch, lambda: command.main(arguments))) == 1
    (page,) = tmp_path.iterdir()
    assert "train_step_" in page.name and "`product`" in page.read_text()


@pytest.mark.parametrize("code, kind", [(2, UsageError), (3, InputError), (77, GemmaError)])
def test_what_another_process_said_is_said_again(code, kind):
    error = command.failed(code, "noise\nerror: It is so.\n")
    assert type(error) is kind and str(error) == "It is so."


def test_dense_work_of_a_token():
    assert running.dense_flops(PRESETS["gemma-2b"]) == pytest.approx(3.96e9, rel=0.01)


@pytest.mark.parametrize("text, number", [("10M", 10_000_000), ("8K", 8192), ("700", 700)])
def test_counts(text, number):
    assert console.count(text) == number
