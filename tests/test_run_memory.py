"""The command line with memory files: asked again, interrupted, gone on with."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import run

ROOT = Path(run.__file__).parent
BOOK = "".join(f"the people called him {i}\n" for i in range(7000))


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def options(random_checkpoint):
    return "--model", str(random_checkpoint), "--max-new-tokens", "8", "--segment-length", "16"


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(BOOK)
    return path


@pytest.fixture
def command(capsys, options):
    """Runs the command in this process; gives its exit code, output and errors."""

    def call(*arguments):
        try:
            code = run.main([*map(str, arguments), *options])
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def start(tmp_path, options):
    """Starts the command as a process; it does not outlive the test."""
    processes = []

    def call(*arguments):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), *map(str, arguments), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "true"},
        )
        processes.append(process)
        return process

    yield call
    for process in processes:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            pipe.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


@pytest.fixture(scope="module")
def answer_of_the_book(environment, options, tmp_path_factory):
    """What is answered when nothing interrupts."""
    path = tmp_path_factory.mktemp("answer") / "book.txt"
    path.write_text(BOOK)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run.main(["--context", str(path), "--prompt", "who", *options]) == 0
    return out.getvalue()


def wait_for(path, process):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


def test_a_book_is_read_once_and_asked_again(command, book, tmp_path, answer_of_the_book):
    memory = tmp_path / "book.mem"
    code, _, err = command("--context", book, "--save-memory", memory)
    assert code == 0 and f"--load-memory {memory}" in err
    for _ in range(2):
        code, out, err = command("--load-memory", memory, "--prompt", "who")
        assert (code, out) == (0, answer_of_the_book)
        assert "tokens were read before" in err and re.search(r"read (\d+) of \1 tokens", err)
    assert sorted(os.listdir(tmp_path)) == ["book.mem", "book.txt"]


def test_a_loaded_memory_alone_is_continued(command, book, tmp_path):
    first = command("--context", book, "--save-memory", tmp_path / "book.mem", "--json")
    again = command("--load-memory", tmp_path / "book.mem", "--json")
    keys = ("text", "tokens", "prompt_tokens")
    first, again = json.loads(first[1]), json.loads(again[1])
    assert [first[key] for key in keys] == [again[key] for key in keys]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--load-memory", "no.mem", "--prompt", "a"], 3, "no.mem"),
        (["--load-memory", "book.txt", "--prompt", "a"], 4, "book.txt"),
        (["--load-memory", "a", "--resume", "b", "--prompt", "a"], 2, "--load-memory"),
        (["--resume", "a"], 2, "--resume"),
        (["--context", "book.txt", "--autosave", "0"], 2, "--autosave"),
        (["--context", "book.txt", "--save-memory", "."], 3, "cannot be written"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(
    command, book, monkeypatch, arguments, code, words
):
    monkeypatch.chdir(book.parent)
    found, out, err = command(*arguments)
    assert (found, out) == (code, "")
    assert words in err.splitlines()[-1] and "Traceback" not in err


def test_another_model_is_refused(command, book, tmp_path):
    command("--context", book, "--save-memory", tmp_path / "book.mem")
    code, _, err = command(
        "--load-memory", tmp_path / "book.mem", "--prompt", "a", "--memory", "delta"
    )
    assert code == 2 and "rule was off (--memory off), and is delta here" in err


@pytest.mark.parametrize(
    "how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name
)
def test_an_interrupted_reading_goes_on_to_the_same_answer(
    start, tmp_path, how, answer_of_the_book
):
    """The text comes through a pipe, so that the reading is under way when the signal comes."""
    arguments = ["--context", "-", "--prompt", "who", "--autosave", "0.2"]
    process = start(*arguments)
    process.stdin.write(BOOK[: len(BOOK) * 3 // 4])
    process.stdin.flush()
    partial = tmp_path / "reading.partial.mem"
    wait_for(partial, process)
    process.send_signal(how)
    code = process.wait(timeout=60)
    err = process.stderr.read()
    if how != signal.SIGKILL:
        assert code == 130
        assert re.search(r"interrupted: \d+ tokens are kept", err)
        assert "--resume reading.partial.mem" in err
    process = start(*arguments, "--resume", partial)
    out, err = process.communicate(BOOK, timeout=60)
    assert (process.returncode, out) == (0, answer_of_the_book), err
    assert re.search(r"[1-9]\d* tokens were read before", err)
    assert os.listdir(tmp_path) == []


def test_a_second_ctrl_c_leaves_at_once(tmp_path):
    code = (
        "import os, signal, sys, time\n"
        "from gemma_jax.inference.saving import Autosave\n"
        "with Autosave('x', None, say=print) as saving:\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130


def test_going_on_with_other_files_is_refused(command, start, book, tmp_path):
    partial = tmp_path / "book.partial.mem"
    process = start("--context", book, "--context", "-", "--autosave", "0.2")
    wait_for(partial, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    book.write_text(book.read_text().replace("him 1\n", "him 2\n"))
    code, out, err = command("--context", book, "--prompt", "x", "--resume", partial)
    assert (code, out) == (3, "")
    assert "does not begin with what was read before" in err
    assert partial.exists()


# --- a conversation and many prompts ---


def test_prompts_are_answered_in_lines_of_json_about_one_memory(command, tmp_path):
    (tmp_path / "book.txt").write_text("the people called him\n" * 20)
    (tmp_path / "prompts").write_text('"who"\n\n{"prompt": 3}\n{"prompt": "how", "id": "x"}\n')
    memory = tmp_path / "book.mem"
    context = ("--context", tmp_path / "book.txt")
    code, out, err = command(*context, "--save-memory", memory, "--prompts", tmp_path / "prompts")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and "2 prompts answered, 1 could not be" in err
    assert [line["line"] for line in lines] == [1, 3, 4] and lines[2]["id"] == "x"
    assert "error" in lines[1]
    for line, prompt in ((lines[0], "who"), (lines[2], "how")):
        alone = command("--load-memory", memory, "--prompt", prompt, "--quiet")
        assert line["text"] + "\n" == alone[1]
    again = command("--load-memory", memory, "--prompts", tmp_path / "prompts")
    timeless = [[line.get(key) for key in ("line", "tokens", "error")] for line in lines]
    assert timeless == [
        [json.loads(line).get(key) for key in ("line", "tokens", "error")]
        for line in again[1].splitlines()
    ]


def test_a_conversation_about_a_context_is_one_user_turn_that_begins_with_it(
    command, tmp_path, monkeypatch
):
    (tmp_path / "book.txt").write_text("the people called him")
    monkeypatch.setattr("sys.stdin", io.StringIO("who\n"))
    code, out, err = command("--chat", "--context", tmp_path / "book.txt")
    assert code == 0 and "/help lists" in err
    prompt = "the people called him\nwho"
    assert out == command("--template", "--prompt", prompt, "--quiet")[1]


def test_a_closed_standard_input_ends_a_conversation(command, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert command("--chat")[:2] == (0, "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--chat", "--prompt", "a"], "do not go together"),
        (["--prompts", "a", "--prompt", "a"], "do not go together"),
        (["--chat", "--json"], "--json"),
        (["--chat", "--save-memory", "a.mem"], "--context"),
        (["--prompts", "-", "--context", "-"], "more than once"),
    ],
)
def test_modes_that_exclude_each_other_are_usage_errors(command, arguments, words):
    code, out, err = command(*arguments)
    assert (code, out) == (2, "") and words in err


def test_a_model_without_a_template_cannot_talk(command, monkeypatch):
    monkeypatch.setattr("gemma_jax.text._GEMMA_TURN", ("", "", ""))
    code, _, err = command("--chat")
    assert code == 3 and "instruction-tuned" in err
