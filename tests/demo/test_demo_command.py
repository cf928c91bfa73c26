"""The command: what is shown of a model with its memory and without, and where it is printed."""

import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import gemma_jax
import run
from gemma_jax.demo import command, running, table
from gemma_jax.demo.planting import make_tasks
from gemma_jax.evaluate.answers import to_text
from gemma_jax.evaluate.haystack import reach
from gemma_jax.evaluate.running import without_memory
from gemma_jax.inference import console as console_module

OPTIONS = ("--tokens", "6K", "--task", "passkey,niah_multikey_1=2,babilong_qa1")
STOPS = (1, 5)


@dataclasses.dataclass
class Finished:
    code: int
    out: str
    err: str


@pytest.fixture
def demo(capsys, small_model, monkeypatch, tmp_path):
    """Runs the command in this process, with the small model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*arguments) -> Finished:
        arguments = ["--model", str(small_model), *OPTIONS, *map(str, arguments)]
        try:
            code = command.main(arguments)
        except SystemExit as exit_:
            code = exit_.code
        return Finished(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def planted(small_model):
    options = command.parse(["--model", str(small_model), *OPTIONS])
    model = command.load(str(small_model))
    return model, command.plant_for(model, make_tasks(options.task), options)


def greedy(model, ids, limit):
    """The ids that follow, of one reading of all of the text."""
    tokens = np.array([ids], np.int32)
    state = gemma_jax.init_state(model.config)
    logits, state = gemma_jax.prefill(model.params, tokens, state, config=model.config)
    written = []
    while len(written) < limit:
        token, _, logits, state = gemma_jax.decode_block(
            model.params,
            logits,
            state,
            config=model.config,
            sampling=gemma_jax.Greedy(),
            key=jax.random.key(0),
            num_tokens=1,
            stop_ids=STOPS,
        )
        written.append(int(token[0, 0]))
        if written[-1] in STOPS:
            return written[:-1]
    return written


def test_answers_are_those_of_the_model_with_its_memory_and_with_memory_off(planted):
    model, text = planted
    ids = [i for some in text.text() for i in some]
    asked = text.asked[1]
    found = []
    for some in (model, without_memory(model)):
        result = running.read_and_ask(text, some, lambda progress: None)
        expected = greedy(some, [*ids, *asked.ids], asked.limit)
        assert result.answers[1] == to_text(model.tokenizer, expected, ())
        assert result.text.tokens == len(ids)
        found.append(result.answers)
    assert found[0] != found[1]


def test_the_reach_is_that_of_the_model(planted):
    model, text = planted
    assert text.reach == reach(model.config)


def test_cpus_compute_in_float32_whatever_was_recorded(planted, small_model):
    from gemma_jax.checkpoint import store

    assert store.read_config(small_model).dtype == "bfloat16"
    assert planted[0].config.dtype == "float32"


def test_a_table_tells_what_was_planted_asked_and_answered(planted, capsys):
    """Marks and totals are those of the scores: here the first run has one wrong answer."""
    _, planted = planted
    text = planted.text()
    for _ in text:
        pass
    right = [asked.question.reply for asked in planted.asked]
    scores = (1.0,) * len(right)
    runs = {
        "with memory": running.Run(text, 2.5, ("  None.", *right[1:]), (0.0, *scores[1:]), 3000),
        "memory off": running.Run(text, 1.5, ("",) * len(right), (0.0,) * len(right), 2000),
    }
    table.show(planted, runs, seed=0)
    out = capsys.readouterr().out
    assert out.count(table.RIGHT) == 3 and out.count(table.WRONG) == 5
    assert out.count(f"{table.WRONG} (nothing)") == 4 and f"{table.WRONG} None" in out
    assert re.search(r"right +3 of 4 +0 of 4\n", out)
    assert re.search(r"seconds +2\.5 +1\.5\n", out)
    assert out.startswith(f"{text.tokens:,} tokens") and "none of it repeated" in out
    for asked, reply in zip(planted.asked[1:], right[1:], strict=True):
        assert f"{table.RIGHT} {reply.strip(' .')}" in out
        assert all(fact in out for fact in planted.facts(asked))
        assert f"{text.trial(asked)['distance']:,}  " in out
    distances = [int(found.replace(",", "")) for found in re.findall(r"^ *([\d,]+)  ", out, re.M)]
    assert distances == sorted(distances, reverse=True) and len(distances) == 4


def test_answers_are_on_standard_output_and_the_rest_on_standard_error(demo, monkeypatch):
    monkeypatch.setattr(console_module, "PLAIN_INTERVAL_SECONDS", 0.0)
    found = demo()
    assert found.code == 0
    assert "with memory" in found.out and re.search(r"right +\d of 4 +\d of 4\n", found.out)
    assert "reading" not in found.out and "reading" in found.err and "tokens/s" in found.err
    assert "memory off: " in found.err and "with memory: " in found.err


def test_the_same_seed_gives_the_same_answers_and_quiet_says_nothing_else(demo):
    first, again, other = (demo("--quiet", "--seed", seed) for seed in (1, 1, 2))
    assert first.err == again.err == ""

    def timeless(out):
        return re.sub(r"seconds.*", "", out)

    assert timeless(first.out) == timeless(again.out) != timeless(other.out)


def test_the_text_can_be_kept_and_asked_with_run_py(demo, planted, tmp_path, capsys):
    model, planted = planted
    file = tmp_path / "a text.txt"
    found = demo("--write", file, "--quiet")
    assert found.code == 0
    ids = [i for some in planted.text() for i in some]
    asked = [*ids[1:], *planted.asked[1].ids]  # without BOS
    prompts = [asked.question.text.strip() for asked in planted.asked]
    assert f"{file.read_text()}\n{prompts[1]}" == model.tokenizer.decode(asked)
    (line,) = [line for line in found.out.splitlines() if line.startswith("python run.py")]
    arguments = shlex.split(line)[2:]
    assert run.main([*arguments, "--quiet"]) == 0 and capsys.readouterr().out.strip()
    assert arguments[arguments.index("--prompt") + 1] == prompts[0]
    assert all(shlex.quote(prompt) in found.out for prompt in prompts)


@pytest.mark.parametrize(
    "arguments, code, word",
    [
        (("--tokens", "1K"), 2, "--tokens"),
        (("--tokens", "0"), 2, "--tokens"),
        (("--seed", "-1"), 2, "--seed"),
        (("--task", "passkey=0"), 2, "--task"),
        (("--task", "passkey,passkey"), 2, "twice"),
        (("--task", "perfection"), 2, "perfection"),
        (("--model", "nowhere"), 3, "nowhere"),
        (("--write", "/nowhere/file"), 3, "/nowhere/file"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_said_in_a_sentence(demo, arguments, code, word):
    found = demo(*arguments)
    assert (found.code, found.out) == (code, "")
    last = found.err.strip().splitlines()[-1]
    assert "error: " in last and word in last and "Traceback" not in found.err


def test_a_model_without_a_memory_is_refused(demo, random_checkpoint):
    found = demo("--model", random_checkpoint)
    assert (found.code, found.out) == (2, "") and "no memory" in found.err


def test_ctrl_c_ends_quietly_with_130(small_model):
    process = subprocess.Popen(
        [sys.executable, "-m", "gemma_jax.demo", "--model", str(small_model), "--tokens", "10M"],
        cwd=Path(run.__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    with process:
        for line in process.stderr:  # the model is there, and the text is begun
            if "does not grow" in line:
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == "" and "Traceback" not in err and "Fatal" not in err
