"""The command end to end: the same trials always, nothing lost, and one sentence for what is wrong."""

import csv
import dataclasses
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemma_jax import PRESETS
from gemma_jax.benchmark import records
from gemma_jax.checkpoint import store
from gemma_jax.checkpoint.store import read_config
from gemma_jax.errors import OutOfMemoryError
from gemma_jax.evaluate import command, peer
from gemma_jax.evaluate import plan as planning
from gemma_jax.evaluate.journal import JOURNAL
from gemma_jax.evaluate.report import Recall
from gemma_jax.evaluate.running import Reader
from gemma_jax.model.adapting import split
from gemma_jax.model.state import state_bytes
from gemma_jax.train.result import write_adapter

GRID = ["--task", "passkey", "--lengths", "500,700", "--depths", "0,100", "--trials", "3"]
SMALL = ["--segment-length", "64", "--batch-size", "3"]
HAS_TORCH = importlib.util.find_spec("torch") is not None


def rows(directory, setting="ours"):
    with open(directory / "trials.csv", newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["setting"] == setting]


def results(directory):
    return json.loads((directory / "results.json").read_text())


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory):
    """A grid that was run without interruption."""
    directory = tmp_path_factory.mktemp("whole")
    arguments = ["--model", str(sources[1]), *GRID, *SMALL, "--output", str(directory)]
    assert command.main([*arguments, "--record", str(directory / "recall.json")]) == 0
    return directory


def test_every_trial_is_in_the_table_the_files_and_the_records(whole, sources, evaluate, tmp_path):
    result = evaluate("--model", sources[1], *GRID, *SMALL, "--output", tmp_path)
    assert result.code == 0
    found = rows(tmp_path)
    assert len(found) == 12
    for row in found:
        length, read, distance = (int(row[k]) for k in ("tokens", "tokens_read", "distance"))
        assert length - 100 < read <= length and 0 < distance < read
        assert row["within_reach"] == str(distance < 3 * 64)  # two layers
        assert row["correct"] == str(row["score"] == "1.0") and row["expected"].isdecimal()
        assert row["failed"] == ""
        assert 0 < float(row["repeated_share"]) < 1
    content = results(tmp_path)
    cells = {(c["tokens"], c["depth"]): c for c in content["cells"]}
    for length in (500, 700):
        assert cells[length, 0.0]["estimate"]["trials"] == 3
        assert cells[length, 1.0]["within_reach"] and not cells[length, 0.0]["within_reach"]
        assert cells[length, None]["estimate"] == cells[length, 0.0]["estimate"]  # the rest is near
    assert content["trials_sha256"] in result.out and "chance 1.11e-05" in result.out
    assert all(f"{length}" in result.out for length in (500, 700))
    assert (tmp_path / "passkey_ours.png").read_bytes().startswith(b"\x89PNG")
    assert "6 trials" not in result.err and "12 trials in 12 haystacks" in result.err
    recalls = records.read(whole / "recall.json", Recall)
    assert {(r.tokens, r.depth) for r in recalls} == set(cells)
    assert {(r.model, r.rule, r.seed) for r in recalls} == {("random_tiny_gemma", "off", 0)}
    assert {r.haystack for r in recalls} == {"grass"}
    assert {r.trials_sha256 for r in recalls} == {content["trials_sha256"]}  # the same twice


def test_the_same_trials_whatever_the_model_and_its_batches_are(whole, evaluate, tmp_path):
    """Random weights of another shape, one row at a time, with the same tokenizer."""
    arguments = ["--batch-size", 5, "--segment-length", 32, "--memory", "gated_delta"]
    subject = command.check(
        command.parse(
            [str(a) for a in ["--preset", "gemma-2b", *GRID, *arguments, "--output", tmp_path]]
        )
    )
    found = [subject.grid.text(haystack) for haystack in subject.grid.haystacks]
    hashes = []
    for haystack, text in zip(subject.grid.haystacks, found, strict=True):
        for _ in text:
            pass
        hashes.append(text.trial(haystack.asked[0])["text_sha256"])
    assert hashes == [row["text_sha256"] for row in rows(whole)]


def test_a_run_that_was_killed_goes_on_and_gives_the_same_files(whole, sources, evaluate, tmp_path):
    arguments = ["--model", sources[1], *GRID, *SMALL, "--output", tmp_path]
    process = subprocess.Popen(
        [sys.executable, "-m", "gemma_jax.evaluate", *map(str, arguments)],
        cwd=Path(command.__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")},
        stderr=subprocess.DEVNULL,
    )
    journal, started = tmp_path / JOURNAL, time.monotonic()
    while not (journal.exists() and journal.read_text().count("\n") > 1):
        assert process.poll() is None and time.monotonic() - started < 200
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "trials.csv").exists()
    before = journal.read_text()
    assert evaluate(*arguments, "--resume").code == 0
    assert journal.read_text().startswith(before[: before.rindex("\n")])
    assert_same_files(whole, tmp_path)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.65, 1.0])
def test_whatever_was_finished_is_not_done_again(
    whole, sources, evaluate, tmp_path, monkeypatch, share
):
    data = (whole / JOURNAL).read_bytes()
    start = data.index(b"\n") + 1
    (tmp_path / JOURNAL).write_bytes(data[: start + round((len(data) - start) * share)])
    finished = (tmp_path / JOURNAL).read_bytes().count(b'"trial"')
    asked, answer = [], Reader.answer

    def counted(reader, state, questions, limits):
        asked.extend(questions if limits != [1] else [])  # not those of the warm-up
        return answer(reader, state, questions, limits)

    monkeypatch.setattr(Reader, "answer", counted)
    assert evaluate("--model", sources[1], *GRID, *SMALL, "--output", tmp_path).code == 0
    assert_same_files(whole, tmp_path)
    assert len(asked) <= 12 - (finished - 1) // 3 * 3


SHARED = [*GRID, "--shared", "--haystacks", "5", "--questions", "7", "--filler", "books"]


@pytest.fixture(scope="module")
def beside(sources, tmp_path_factory):
    """A grid whose shared haystacks were read side by side: five as three and two."""
    directory = tmp_path_factory.mktemp("beside")
    arguments = ["--model", str(sources[1]), *SHARED, *SMALL, "--output", str(directory)]
    assert command.main([*arguments, "--quiet"]) == 0
    return directory


def test_shared_haystacks_read_side_by_side_give_what_they_give_one_by_one(
    beside, sources, evaluate, tmp_path, monkeypatch
):
    monkeypatch.setattr(planning, "BUSY_WEIGHTS", 0)
    rows_read, read = [], Reader.read

    def counted(reader, texts, rows, on_tokens):
        rows_read.append((len(texts), rows))
        return read(reader, texts, rows, on_tokens)

    monkeypatch.setattr(Reader, "read", counted)
    assert evaluate("--model", sources[1], *SHARED, *SMALL, "--output", tmp_path).code == 0
    assert rows_read == [(1, 1)] * (1 + 2 * 5)  # the first one is the warm-up
    assert len(results(beside)["figures"]["ours"]) and len(rows(beside)) == 2 * 2 * 7
    assert len({row["answered"] for row in rows(beside)}) > 9
    assert_same_files(beside, tmp_path)
    one, other = (results(path)["figures"]["ours"]["tokens_read"] for path in (beside, tmp_path))
    assert one == other


# Ten questions about the first three haystacks and four about the others, three at a time.
@pytest.mark.parametrize("answers, finished, to_read", [(2, 3, 10), (6, 13, 7)])
def test_a_run_that_ended_amid_haystacks_read_side_by_side_goes_on(
    beside, sources, evaluate, tmp_path, monkeypatch, answers, finished, to_read
):
    arguments = ["--model", sources[1], *SHARED, *SMALL, "--output", tmp_path]
    answer, calls, read, texts_read = Reader.answer, [], Reader.read, []

    def interrupted(reader, *rest):
        calls.append(rest)
        if len(calls) == 1 + answers:  # the first one is the warm-up
            raise KeyboardInterrupt
        return answer(reader, *rest)

    def counted(reader, texts, *rest):
        texts_read.extend(texts)
        return read(reader, texts, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "answer", interrupted)
        assert evaluate(*arguments).code == 130
    assert (tmp_path / JOURNAL).read_text().count('"trial"') == finished
    monkeypatch.setattr(Reader, "read", counted)
    assert evaluate(*arguments, "--resume").code == 0
    assert_same_files(beside, tmp_path)
    assert len(texts_read) == 1 + to_read  # the first one is the warm-up


def assert_same_files(whole, other):
    assert (whole / "trials.csv").read_bytes() == (other / "trials.csv").read_bytes()
    assert (whole / "passkey_ours.png").read_bytes() == (other / "passkey_ours.png").read_bytes()
    first, second = results(whole), results(other)
    for name in ("cells", "trials_sha256", "settings", "chances"):
        assert first[name] == second[name]


def test_records_name_the_device_that_read_though_another_process_writes_them(
    whole, sources, evaluate, tmp_path
):
    journal = (whole / JOURNAL).read_text()
    assert '"device": "cpu"' in journal
    (tmp_path / JOURNAL).write_text(journal.replace('"device": "cpu"', '"device": "a GPU"'))
    arguments = ["--model", sources[1], *GRID, *SMALL, "--output", tmp_path]
    assert evaluate(*arguments, "--record", tmp_path / "recall.json").code == 0
    assert {r.device for r in records.read(tmp_path / "recall.json", Recall)} == {"a GPU"}
    assert results(tmp_path)["figures"]["ours"]["device"] == "a GPU"


def test_trials_whose_reading_was_cut_short_are_recorded(whole, sources, evaluate, tmp_path):
    lines = (whole / JOURNAL).read_text().splitlines(keepends=True)
    (tmp_path / JOURNAL).write_text("".join(line for line in lines if '"reading"' not in line))
    arguments = ["--model", sources[1], *GRID, *SMALL, "--output", tmp_path]
    assert evaluate(*arguments, "--record", tmp_path / "recall.json").code == 0
    found = records.read(tmp_path / "recall.json", Recall)
    assert sum(r.trials for r in found if r.depth is not None) == 12
    assert {(r.read_tokens_per_second, r.peak_bytes) for r in found} == {(None, None)}


def test_an_interruption_ends_with_130_and_keeps_what_was_finished(
    whole, sources, evaluate, tmp_path, monkeypatch
):
    arguments = ["--model", sources[1], *GRID, *SMALL, "--output", tmp_path]
    read, calls = Reader.read, []

    def interrupted(reader, *rest):
        calls.append(rest)
        if len(calls) == 4:  # the first one is the warm-up
            raise KeyboardInterrupt
        return read(reader, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "read", interrupted)
        assert evaluate(*arguments).code == 130
    assert (tmp_path / JOURNAL).read_text().count('"trial"') == 6
    assert evaluate(*arguments).code == 0
    assert_same_files(whole, tmp_path)


def test_what_fails_is_reported_never_counted_and_tried_again(
    whole, sources, evaluate, tmp_path, monkeypatch
):
    arguments = ["--model", sources[1], *GRID, *SMALL, "--output", tmp_path]
    read, calls = Reader.read, []

    def failing(reader, *rest):
        calls.append(rest)
        if len(calls) == 3:
            raise OutOfMemoryError("no room")
        return read(reader, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "read", failing)
        result = evaluate(*arguments, "--debug")
    assert "in failing\n" in result.err  # the traceback
    assert result.code == 1 and "error: 3 of 12 trials failed (no room)" in result.err
    assert "3 failed" in result.out
    failed = [row for row in rows(tmp_path) if row["failed"]]
    assert [(row["score"], row["correct"], row["failed"]) for row in failed] == [
        ("", "", "no room")
    ] * 3
    (cell,) = [c for c in results(tmp_path)["cells"] if c["failed"] and c["depth"] is not None]
    assert cell["estimate"] is None and cell["failed"] == 3
    assert evaluate(*arguments).code == 0
    assert_same_files(whole, tmp_path)


def test_the_baseline_is_the_model_with_memory_off_on_the_same_trials(
    whole, sources, evaluate, tmp_path
):
    arguments = ["--memory", "linear", "--baseline", "--record", tmp_path / "recall.json"]
    result = evaluate("--model", sources[1], *GRID, *SMALL, *arguments, "--output", tmp_path)
    assert result.code == 0 and "memory linear" in result.out and "memory off" in result.out
    off, plain = rows(tmp_path, "off"), rows(whole)
    same = ("haystack", "answered", "score", "text_sha256", "distance")
    assert [[row[k] for k in same] for row in off] == [[row[k] for k in same] for row in plain]
    assert [row["text_sha256"] for row in rows(tmp_path)] == [row["text_sha256"] for row in off]
    found = records.read(tmp_path / "recall.json", Recall)
    assert {r.rule for r in found} == {"linear", "off"}
    assert all((r.baseline is None) == (r.rule == "off") for r in found)
    states = {r.rule: r.state_bytes for r in found}
    config = read_config(sources[1]).with_memory(segment_length=64)
    assert states["off"] == state_bytes(config) < states["linear"]
    assert results(tmp_path)["state_bytes"] == {"ours": states["linear"], "off": states["off"]}
    (recorded,) = {r.command for r in found}
    assert recorded == shlex.join(
        ["python", "-m", "gemma_jax.evaluate", "--model", str(sources[1]), *GRID, *SMALL]
        + [str(argument) for argument in arguments]
    )  # where the files go does not matter


def test_an_adapter_is_asked_beside_its_model_with_memory_off(whole, sources, evaluate, tmp_path):
    model = store.load(sources[1], memory="linear", segment_length=64)
    trained, frozen = split(model.params, "memory")
    for layer in trained.values():  # a gate that reads memory alone
        layer["attention"]["memory"]["gate"] += 50.0
    write_adapter(tmp_path / "one", model.config, trained, frozen, "memory", {}, "float32")
    arguments = ["--adapter", tmp_path / "one", "--baseline", "--record", tmp_path / "recall.json"]
    result = evaluate(
        "--model", sources[1], *GRID, "--batch-size", 3, *arguments, "--output", tmp_path / "out"
    )
    assert result.code == 0, result.err
    found = records.read(tmp_path / "recall.json", Recall)
    assert {(r.model, r.rule) for r in found} == {
        ("random_tiny_gemma with adapter", "linear"),
        ("random_tiny_gemma with adapter", "off"),
    }
    off, plain = rows(tmp_path / "out", "off"), rows(whole)
    assert [row["answered"] for row in off] == [row["answered"] for row in plain]
    assert [row["answered"] for row in rows(tmp_path / "out")] != [row["answered"] for row in off]


def test_a_preset_has_random_weights_and_is_labelled_so(evaluate, tmp_path, monkeypatch):
    changes = {"vocab_size": 1000, "width": 16, "mlp_dim": 24, "num_heads": 2, "head_dim": 8}
    tiny = dataclasses.replace(PRESETS["gemma-2b"], layer_types=("global",), **changes)
    monkeypatch.setitem(PRESETS, "gemma-2b", tiny)
    arguments = ["--preset", "gemma-2b", "--memory", "gated_delta", "--dtype", "float32"]
    arguments += ["--task", "passkey", "--lengths", "900", "--shared", "--questions", "4"]
    arguments += ["--depths", "0,50", "--record", tmp_path / "recall.json"]
    result = evaluate(*arguments, *SMALL, "--output", tmp_path)
    assert (
        result.code == 0 and "passkey, gemma-2b (random weights), memory gated_delta" in result.out
    )
    found = records.read(tmp_path / "recall.json", Recall)
    (pooled,) = [record for record in found if record.depth is None]
    assert pooled.model == "gemma-2b (random weights)" and pooled.haystacks == 1
    assert (pooled.trials, pooled.accuracy) == (8, 0.0) and pooled.effective_trials < 8
    assert pooled.state_bytes > 0 and pooled.read_tokens_per_second > 0


@pytest.mark.skipif(not HAS_TORCH, reason="needs torch")
def test_the_peer_answers_as_our_model_does_where_attention_sees_all(
    sources, evaluate, tmp_path, monkeypatch
):
    """A haystack of its own for each question, a shared one, and a length that is not run."""
    monkeypatch.setattr(peer, "CHUNK_TOKENS", 200)
    monkeypatch.setattr(planning, "SHARED_FROM", 700)
    arguments = ["--model", sources[1], "--peer", "hf", "--peer-model", sources[0]]
    arguments += ["--task", "passkey", "--lengths", "500,700,800", "--depths", "0,100"]
    arguments += ["--trials", "1", "--questions", "2", "--peer-up-to", "750"]
    arguments += ["--segment-length", "512", "--output", tmp_path]
    result = evaluate(*arguments)
    assert result.code == 0 and "not run" in result.out
    ours, hf = rows(tmp_path), rows(tmp_path, "hf")
    assert len({row["haystack"] for row in hf}) == 2 + 1 + 1
    assert len({row["answered"] for row in hf[:6]}) > 2
    for name in ("answered", "text_sha256", "distance", "score"):
        assert [row[name] for row in hf[:6]] == [row[name] for row in ours[:6]]
    assert {row["failed"] for row in hf[6:]} == {"not run: longer than 750 tokens"}
    assert {row["score"] for row in hf[6:]} == {""} != {row["score"] for row in ours[6:]}


def test_what_does_not_fit_the_peer_is_not_run_and_nothing_longer_is_tried(sources, tmp_path):
    from gemma_jax.evaluate.journal import Journal
    from gemma_jax.inference.console import Console

    arguments = ["--model", str(sources[1]), "--task", "passkey", "--lengths", "400,500,600"]
    arguments += ["--depths", "50", "--trials", "2", "--output", str(tmp_path)]
    subject = command.check(command.parse(arguments))

    class Small:
        rows, device, out_of_memory, tried = 1, "a device", False, []

        def warm_up(self, shared):
            return 0.0

        def read(self, texts, rows, on_tokens):
            self.tried.append(sum(len(ids) for ids in texts[0]))
            if self.tried[-1] > 410:
                self.out_of_memory = True
                raise OutOfMemoryError("not run: out of memory")
            return False

        def answer(self, state, questions, limits):
            from gemma_jax.evaluate.answers import Answer

            return [Answer(" 12345", 6, True)]

        def peak_bytes(self):
            return 7

    journal = Journal(tmp_path, subject.settings)
    peer.run_peer(subject.grid, Small(), 10**9, journal, Console(quiet=True), 100)
    assert [trial.tokens for trial in journal.trials.values()] == [400, 400]
    assert [trial.tokens for trial in journal.failed.values()] == [500, 500, 600, 600]
    assert all(
        trial.failed.startswith("not run: out of memory") for trial in journal.failed.values()
    )
    assert max(Small.tried) < 500


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["--task", "passkeys"], 2, "there is no task 'passkeys': choose of passkey,"),
        (["--lengths", "4K,60"], 2, "--lengths 60 is too short"),
        (["--lengths", "0"], 2, "--lengths"),
        (["--lengths", "many"], 2, "--lengths"),
        (["--lengths", "4K,inf"], 2, "--lengths"),
        (["--depths", "0,101"], 2, "between 0 and 100"),
        (["--depths", "half"], 2, "--depths"),
        (["--trials", "0"], 2, "at least 1"),
        (["--haystacks", "9", "--questions", "3"], 2, "cannot share"),
        (["--memory", "no_such_rule"], 2, "no_such_rule"),
        (["--resume"], 2, "nothing to resume"),
        (["--peer", "hf"], 2, "--peer-model"),
        (["--haystack", "EMPTY"], 3, "empty.txt has no text"),
        (["--haystack", "no/such/file"], 3, "no/such/file"),
        (["--haystack", "BOOK"], 2, "passkey is hidden in grass: add --filler books"),
        (["--tokenizer", "DIR"], 2, "--preset"),
        (["--adapter", "no/adapter"], 3, "no/adapter"),
        (["--record", "no/such/directory/recall.json"], 3, "is not a directory"),
        (["--record", "EMPTY"], 3, "holds no records of this kind"),
        (["--model", "DIR"], 3, "DIR"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_read(
    sources, evaluate, tmp_path, monkeypatch, arguments, code, said
):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "book.txt").write_text("It was a dark and stormy night.")
    monkeypatch.setattr(command, "load_model", None)  # nothing is loaded
    files = {"EMPTY": tmp_path / "empty.txt", "BOOK": tmp_path / "book.txt"}
    words = [str(files.get(word, word)) for word in arguments]
    result = evaluate(
        "--model", sources[1], "--task", "passkey", "--output", tmp_path / "out", *words
    )
    assert (result.code, result.out) == (code, "")
    assert result.err.count("\n") == 1 and result.err.startswith("error: ") and said in result.err
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_is_refused(sources, evaluate, tmp_path):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(sources[1], bare)
    (bare / "tokenizer.json").unlink()
    result = evaluate("--model", bare, *GRID, "--output", tmp_path / "out")
    assert result.code == 3 and "tokenizer.json" in result.err and result.err.count("\n") == 1


def test_nothing_to_evaluate_is_refused(evaluate, tmp_path):
    result = evaluate(*GRID, "--output", tmp_path)
    assert result.code == 2 and "--model DIR" in result.err


def test_other_settings_need_another_directory(whole, sources, evaluate):
    result = evaluate("--model", sources[1], *GRID, *SMALL, "--seed", 5, "--output", whole)
    assert result.code == 2 and "seed was 0, now 5" in result.err
