"""The command line: what goes where, exit codes, and one sentence for what goes wrong."""

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import run
from gemma_jax import random_model
from gemma_jax.inference import console as console_module
from gemma_jax.inference import reader
from gemma_jax.inference.progress import Progress

ROOT = Path(run.__file__).parent
PROMPT = "the people called him"


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def environment(monkeypatch, cache):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


@dataclasses.dataclass
class Finished:
    code: int
    out: str
    err: str


def with_model(arguments, model) -> list[str]:
    """The arguments, with the random model where they name none."""
    named = () if "--model" in arguments else ("--model", model)
    return [str(argument) for argument in (*arguments, *named)]


@pytest.fixture
def command(capsys, random_checkpoint):
    """Runs the command in this process."""

    def call(*arguments) -> Finished:
        try:
            code = run.main(with_model(arguments, random_checkpoint))
        except SystemExit as exit_:
            code = exit_.code
        return Finished(code, *capsys.readouterr())

    return call


@pytest.fixture
def start(random_checkpoint):
    """Starts the command as a process of its own, away from the repository."""

    def call(*arguments, **options) -> subprocess.Popen:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | options
        command = [sys.executable, str(ROOT / "run.py"), *with_model(arguments, random_checkpoint)]
        return subprocess.Popen(command, text=True, cwd="/", **pipes)

    return call


def finish(process: subprocess.Popen, given: str | None = None) -> Finished:
    out, err = process.communicate(given, timeout=120)
    return Finished(process.returncode, out, err)


def assert_refused(result: Finished, code: int, *words: str):
    """One sentence on standard error, nothing else anywhere."""
    assert (result.code, result.out) == (code, "")
    last = result.err.strip().splitlines()[-1]
    assert "error: " in last
    assert "Traceback" not in result.err
    for word in words:
        assert word in last


# --- as a process ---


def test_what_was_compiled_is_there_at_the_next_start(start, tmp_path):
    """A longer text compiles nothing new either; a cache that cannot be written does no harm."""
    kept = tmp_path / "compiled"
    environment = os.environ | {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(kept),
    }

    def programs(prompt, environment=environment):
        result = finish(start("--prompt", prompt, "--max-new-tokens", 3, env=environment))
        assert result.code == 0
        return result.out, {path.name for path in kept.glob("*-cache")}

    answer, first = programs(PROMPT)
    assert len(first) > 3
    assert programs(PROMPT) == (answer, first)
    assert programs(PROMPT * 100)[1] == first
    kept.rename(tmp_path / "elsewhere")
    kept.write_text("not a directory")
    assert programs(PROMPT)[0] == answer


def test_the_answer_alone_is_on_standard_output_and_the_rest_on_standard_error(start):
    result = finish(start("--prompt", PROMPT, "--max-new-tokens", 8))
    assert result.code == 0
    assert result.out.endswith("\n") and len(result.out) > 1
    assert "random-tiny-gemma" in result.err
    assert "does not grow" in result.err
    assert re.search(r"loaded in \d+\.\d s", result.err)
    assert re.search(
        r"read (\d+) of \1 tokens.*, wrote 8.*, the first after \d+\.\d\d s", result.err
    )
    again = finish(start("--prompt", "-", "--max-new-tokens", 8, "--json", "--quiet"), PROMPT)
    assert json.loads(again.out)["text"] + "\n" == result.out
    assert again.err == ""


def test_a_failure_while_programs_are_compiled_ends_the_process(start, tmp_path):
    """With the error's own exit code, and without a word of the threads."""
    memory = tmp_path / "one.mem"
    assert finish(start("--prompt", PROMPT, "--save-memory", memory)).code == 0
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    changed = ("--segment-length", 7, "--memory", "selective_delta")
    result = finish(start("--load-memory", memory, *changed, "--prompt", "x", env=environment))
    assert (result.code, result.out) == (2, "")
    assert "was read by another model" in result.err.splitlines()[-1]


def test_a_closed_output_pipe_ends_quietly(start):
    process = start("--prompt", PROMPT, "--max-new-tokens", 100_000, "--quiet", "--temperature", 1)
    assert process.stdout.read(3)
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert "error" not in process.stderr.read()
    process.stdin.close()
    process.stderr.close()


def test_ctrl_c_ends_with_130(start):
    process = start("--context", "-")
    for line in process.stderr:  # the last line before it waits for standard input
        if "does not grow" in line:
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 130
    assert "Traceback" not in rest and "Fatal" not in rest
    process.stdin.close(), process.stdout.close(), process.stderr.close()


def test_wrong_options_and_missing_files_are_told_before_anything_heavy_is_imported(tmp_path):
    code = (
        "import sys, run\n"
        f"try: code = run.main({['--context', str(tmp_path / 'no')]!r})\n"
        "except SystemExit as error: code = error.code\n"
        "print(code, sorted({'jax', 'transformers', 'torch'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.stdout == "3 []\n"


# --- what is printed ---


def test_json_is_one_object_with_the_keys_of_the_contract(command):
    result = command(
        "--prompt", PROMPT, "--max-new-tokens", 6, "--json", "--seed", 7, "--temperature", 1
    )
    report = json.loads(result.out)
    assert set(report) == {
        "text",
        "tokens",
        "prompt_tokens",
        "finish_reason",
        "seed",
        "model",
        "memory_rule",
        "state_bytes",
        "peak_memory_bytes",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
    }
    assert (result.code, report["seed"], len(report["tokens"])) == (0, 7, 6)
    assert (report["finish_reason"], report["memory_rule"]) == ("length", "off")
    assert "random" in report["model"]


def test_quiet_leaves_warnings_only(command):
    options = ("--prompt", PROMPT, "--max-new-tokens", 2, "--quiet")
    assert command(*options).err == ""
    lines = command(*options, "--memory", "delta").err.splitlines()
    assert lines and all(line.startswith("warning: ") for line in lines)


def test_the_same_seed_gives_the_same_text(command):
    options = ("--prompt", PROMPT, "--max-new-tokens", 12, "--temperature", 1, "--quiet")
    texts = [command(*options, "--seed", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_stop_texts_end_the_answer_and_are_not_printed(command):
    options = ("--prompt", PROMPT, "--max-new-tokens", 12, "--quiet")
    whole = command(*options).out
    stop = whole[6:9]
    assert (
        command(*options, "--stop", stop, "--stop", "never written").out
        == whole[: whole.index(stop)] + "\n"
    )


def test_context_files_are_read_before_the_prompt(command, tmp_path, monkeypatch):
    book = tmp_path / "book.txt"
    book.write_text("the people")
    joined = command("--prompt", "the people\nwater\nwho", "--max-new-tokens", 6, "--json")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"water")))
    parts = command(
        "--context", book, "--context", "-", "--prompt", "who", "--max-new-tokens", 6, "--json"
    )
    keys = ("text", "tokens", "prompt_tokens")
    assert [json.loads(joined.out)[key] for key in keys] == [
        json.loads(parts.out)[key] for key in keys
    ]


def test_context_alone_is_continued(command, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text(PROMPT)
    options = ("--max-new-tokens", 6, "--quiet")
    assert command("--context", book, *options).out == command("--prompt", PROMPT, *options).out


def test_no_new_tokens_reads_and_says_nothing(command):
    result = command("--prompt", PROMPT, "--max-new-tokens", 0)
    assert (result.code, result.out) == (0, "\n")
    assert re.search(r"read (\d+) of \1 tokens", result.err)


def test_a_template_makes_one_user_turn(command):
    plain, turn = (
        json.loads(command("--prompt", PROMPT, "--max-new-tokens", 1, "--json", *extra).out)[
            "prompt_tokens"
        ]
        for extra in ((), ("--template",))
    )
    assert turn > plain


def test_a_text_beyond_local_attention_is_read_whole_with_a_warning(command, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("the people " * 200)
    result = command("--context", book, "--max-new-tokens", 1, "--segment-length", 32, "--json")
    assert json.loads(result.out)["prompt_tokens"] > 200
    assert result.err.count("memory is off") == 1
    assert "64 tokens" in result.err
    assert "memory is off" not in command("--prompt", PROMPT, "--max-new-tokens", 1).err


@pytest.mark.parametrize("rule", ["linear", "delta", "gated_delta"])
def test_an_untrained_memory_is_said_to_be_untrained(command, rule):
    result = command("--prompt", PROMPT, "--max-new-tokens", 2, "--memory", rule, "--json")
    assert json.loads(result.out)["memory_rule"] == rule
    assert "not trained" in result.err


def test_bytes_that_are_not_utf8_are_counted_when_replaced(command, tmp_path):
    book = tmp_path / "book.txt"
    book.write_bytes(b"the \xff people \xfe")
    result = command("--context", book, "--max-new-tokens", 1, "--encoding-errors", "replace")
    assert result.code == 0
    assert "2 places were not UTF-8" in result.err


# --- what is refused ---


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--top-p", "2"], "--top-p"),
        (["--top-p", "nan"], "--top-p"),
        (["--top-k", "0"], "--top-k"),
        (["--min-p", "-0.1"], "--min-p"),
        (["--max-new-tokens", "-1"], "--max-new-tokens"),
        (["--max-new-tokens", "1.5"], "--max-new-tokens"),
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "inf"], "--temperature"),
        (["--seed", "-1"], "--seed"),
        (["--segment-length", "0"], "--segment-length"),
        (["--stop", ""], "--stop"),
        (["--encoding-errors", "ignore"], "--encoding-errors"),
        (["--unknown"], "--unknown"),
    ],
    ids=" ".join,
)
def test_options_out_of_range_are_usage_errors(command, arguments, word):
    assert_refused(command("--prompt", PROMPT, *arguments), 2, word)


def test_nothing_to_read_is_a_usage_error(command):
    assert_refused(command(), 2, "--prompt", "--context")
    assert_refused(command("--context", "-", "--prompt", "-"), 2, "more than once")


def test_an_unknown_memory_rule_is_a_usage_error(command):
    assert_refused(command("--prompt", PROMPT, "--memory", "perfect"), 2, "perfect")


def test_missing_and_empty_inputs_are_input_errors(command, tmp_path):
    (tmp_path / "empty").touch()
    assert_refused(command("--prompt", ""), 3, "empty")
    assert_refused(command("--context", tmp_path / "empty"), 3, "empty")
    assert_refused(command("--context", tmp_path / "no"), 3, "No such file")
    assert_refused(command("--context", tmp_path), 3, "directory")
    assert_refused(command("--prompt", PROMPT, "--model", tmp_path / "no"), 3, "no")
    assert_refused(command("--prompt", PROMPT, "--model", tmp_path), 3)


def test_bytes_that_are_not_utf8_are_an_input_error(command, tmp_path):
    (tmp_path / "book").write_bytes(b"the \xff")
    assert_refused(
        command("--context", tmp_path / "book"), 3, "byte 4", "--encoding-errors replace"
    )


def test_a_model_that_was_not_converted_is_an_input_error(command, tmp_path):
    source = random_model.write_hugging_face(tmp_path / "source")
    assert_refused(command("--prompt", PROMPT, "--model", source), 3, "convert_weights.py")


# --- what breaks inside ---


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), 5, ["memory"]),
        (MemoryError(), 5, ["memory"]),
        (ValueError("odd\nlines"), 1, ["ValueError: odd", "--debug"]),
    ],
    ids=repr,
)
def test_errors_inside_become_a_sentence_and_an_exit_code(command, monkeypatch, error, code, words):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(reader, "remember", fail)
    result = command("--prompt", PROMPT)
    assert_refused(result, code, *words)
    assert "Traceback" in command("--prompt", PROMPT, "--debug").err


# --- the terminal ---


def test_plain_progress_is_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(console_module, "PLAIN_INTERVAL_SECONDS", 0.0)
    console_module.Console().progress(Progress(4096, 290_000, 7100.0, 40.3))
    assert (
        capsys.readouterr().err == "reading 4096 of about 290000 tokens, 7100 tokens/s, 40 s left\n"
    )
    console_module.Console(quiet=True).progress(Progress(4096, None, 7100.0, None))
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    console = console_module.Console()
    console.progress(Progress(4096, 290_000, 7100.0, 40.3))
    console.warning("careful [bold]")
    console.end_progress()
    out, err = capsys.readouterr()
    assert out == ""
    assert "careful [bold]" in err


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0 bytes"), (1500, "1.5 kB"), (536_223_056, "536 MB"), (5.01e9, "5.01 GB")],
)
def test_sizes_are_said_as_people_say_them(number, shown):
    assert console_module.size(int(number)) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations_are_said_as_people_say_them(seconds, shown):
    assert console_module.duration(seconds) == shown


# --- streams that are full, closed or gone ---


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_behind_the_output_is_one_sentence(start):
    with open("/dev/full", "w") as full:
        done = finish(start("--prompt", PROMPT, "--max-new-tokens", "4", stdout=full))
    assert done.code == 3
    assert "error: A file cannot be read or written (No space left on device)." in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("redirection", ["2>&-", "2> >(exec true)"], ids=["closed", "gone"])
def test_the_answer_comes_without_a_standard_error(redirection, random_checkpoint):
    run_py = f"'{sys.executable}' run.py --model '{random_checkpoint}'"
    command = f"{run_py} --prompt '{PROMPT}' --max-new-tokens 4 {redirection}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip()
    assert "of State will be held" not in done.stdout
