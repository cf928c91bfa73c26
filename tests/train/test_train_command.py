"""The command: it teaches, it ends as it says, and what was stopped goes on as if it had not been."""

import csv
import dataclasses
import json
import lzma
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from teaching import add_digits, equal_trees

import gemma_jax
from gemma_jax import demo
from gemma_jax.checkpoint import adapter as adapters
from gemma_jax.checkpoint import store
from gemma_jax.config import GemmaConfig
from gemma_jax.tasks.recall import VALUES
from gemma_jax.text import encode
from gemma_jax.train import command as train_command
from gemma_jax.train import loop, options, record, start
from gemma_jax.train.saving import Checkpoints
from gemma_jax.train.tokenizer import SMALLEST

SHORT = ("--steps", 8, "--log-steps", 2, "--checkpoint-steps", 3)


@pytest.fixture(scope="module")
def taught(tmp_path_factory, home, scratch):
    """A model from scratch that has learnt the task; its directory."""
    path = tmp_path_factory.mktemp("taught") / "taught"
    budget = ["--steps", 160, "--log-steps", 20, "--probe-lengths", 96, 512, "--carry", 0.2]
    arguments = map(str, [*scratch, *budget, "--output", path, "--quiet"])
    with pytest.MonkeyPatch.context() as patch:
        add_digits(patch)
        assert train_command.main(list(arguments)) == 0
    return path


def run_of(path):
    return path.with_name(f"{path.name}.training")


def rows(path):
    with open(run_of(path) / "log.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_memory_is_taught_to_recall(taught):
    table = rows(taught)
    first, last = float(table[0]["answer_loss"]), float(table[-1]["answer_loss"])
    assert first > 1.0 and last < 0.2
    # The digit is more than two segments away, so that only memory can know it; chance is 1/8.
    assert float(table[-1]["recall_digits_96"]) > 0.8
    assert float(table[-1]["recall_digits_512"]) > 0.6  # never trained beyond 64
    assert 0 < float(table[-1]["written_0"]) < 0.9 and float(table[-1]["read_0"]) > 0.01
    assert (run_of(taught) / "progress.png").read_bytes()[1:4] == b"PNG"


def test_what_was_taught_is_a_checkpoint_like_any_other(taught):
    model = gemma_jax.load(taught)
    assert model.config.name == "taught" and model.config.memory.rule == "gated_delta"
    assert "".join(gemma_jax.generate(model, "The people", max_new_tokens=3))
    assert json.loads((taught / "training.json").read_text())["steps"] == 160


def test_the_log_tells_every_measure_by_layer(taught):
    assert list(rows(taught)[0]) == [
        *record.COLUMNS,
        *("written_0", "read_0", "recall_digits_96", "recall_digits_512"),
    ]
    assert [int(row["step"]) for row in rows(taught)] == list(range(20, 161, 20))


@pytest.mark.parametrize("what", ["memory", "lora"])
def test_only_what_is_asked_for_is_trained(command, taught, home, tmp_path, what):
    given = ["--model", taught, "--train", what, "--data", "task:digits"]
    given += ["--rank", 2, "--update-scale", 0.5] if what == "lora" else []
    shape = ["--filler", home / "other.txt", "--segments", 4, "--tokens-per-step", 256]
    # Large enough to be seen: the base model already knows the task.
    rates = ["--steps", 3, "--learning-rate", 0.01, "--language-weight", 1, "--warmup", 0]
    files = ["--output", tmp_path / "adapter", "--data-workers", 0, "--density", 30]
    done = command(*given, *shape, *rates, *files)
    assert done.code == 0 and done.out == "", done.err
    base, found = gemma_jax.load(taught), gemma_jax.load(taught, adapter=tmp_path / "adapter")
    same = jax.tree.map(np.array_equal, base.params, found.params)
    layer = same["layers_0"]
    assert not any(layer["attention"]["memory"].values())
    assert layer["attention"]["qkv"] == layer["mlp"]["down"] == (what == "memory")
    assert same["embedder"]["embedding"] and same["final_norm"]["scale"]
    described = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    assert described["base"] == "taught" and described["trained"] == what
    assert str(home) not in json.dumps(described)


def test_a_model_between_the_one_before_and_the_tuned_one_is_written(
    command, taught, home, tmp_path
):
    given = ["--model", taught, "--train", "all", "--data", "task:digits", "--steps", 3]
    given += ["--filler", home / "other.txt", "--segments", 4, "--tokens-per-step", 256]
    given += ["--learning-rate", 0.01, "--warmup", 0, "--density", 30, "--data-workers", 0]
    given += ["--output", tmp_path / "tuned"]

    def made(*more):
        done = command(*given, *more)
        assert done.code == 0 and done.out == "" and "warning" not in done.err, done.err
        return gemma_jax.load(tmp_path / "tuned").params

    before, after = gemma_jax.load(taught).params, made()
    half = made("--resume", "--update-scale", 0.5)
    for one, two, found in zip(*map(jax.tree.leaves, (before, after, half)), strict=True):
        one, two, found = (np.asarray(leaf, np.float64) for leaf in (one, two, found))
        assert not np.array_equal(one, two)
        np.testing.assert_allclose(found, (one + two) / 2, rtol=1e-5, atol=1e-7)
    done = command(*given, "--overwrite", "--memory", "delta", "--update-scale", 0.5)
    assert done.code == 2 and "taught nothing" in done.err


@pytest.fixture(scope="module")
def carrying(scratch):
    return [*scratch, "--carry", 0.7, *SHORT]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, carrying):
    """A run that nothing disturbed."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        add_digits(patch)
        assert train_command.main([*map(str, carrying), "--output", str(path), "--quiet"]) == 0
    return path


class Killed(BaseException):
    pass


@pytest.fixture
def killed_at(monkeypatch):
    """Makes the run end as if it were killed before it takes one of these steps, once each."""

    def set_up(*steps):
        left, advance = list(steps), loop.Run._advance

        def advance_or_die(self, batch):
            if left and self.progress.step == left[0]:
                left.pop(0)
                raise Killed
            advance(self, batch)

        monkeypatch.setattr(loop.Run, "_advance", advance_or_die)

    return set_up


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of a finished run."""
    for path in (whole, run_of(whole)):
        shutil.copytree(path, tmp_path / path.name)
    return tmp_path / whole.name


def test_a_killed_run_ends_as_if_it_had_not_been(command, carrying, finished, tmp_path, killed_at):
    killed_at(2, 7)
    again = [*carrying, "--output", tmp_path / "killed", "--resume"]
    for saved in ([], [3, 6]):
        with pytest.raises(Killed):
            command(*again)
        assert Checkpoints(run_of(tmp_path / "killed") / "checkpoints").steps() == saved
    (run_of(tmp_path / "killed") / "checkpoints" / ".step-00000007.x.partial").mkdir()
    done = command(*again)
    assert done.code == 0 and "going on after step 6" in done.err
    models = [gemma_jax.load(tmp_path / name).params for name in ("whole", "killed")]
    assert equal_trees(*models)
    same = ("step", "tokens", "loss", "answer_accuracy", "written_0", "read_0", "learning_rate")
    tables = [
        [[row[name] for name in same] for row in rows(tmp_path / name)]
        for name in ("whole", "killed")
    ]
    assert tables[0] == tables[1]
    names = {path.name for path in (run_of(tmp_path / "killed") / "checkpoints").iterdir()}
    assert names == {"step-00000006", "step-00000008"}


def test_an_interrupted_run_is_saved_and_goes_on(command, carrying, tmp_path, monkeypatch):
    advance = loop.Run._advance

    def advance_and_signal(self, batch):
        advance(self, batch)
        if self.progress.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Run, "_advance", advance_and_signal)
    done = command(*carrying, "--output", tmp_path / "one")
    assert done.code == 130 and "interrupted" in done.err
    assert Checkpoints(run_of(tmp_path / "one") / "checkpoints").steps() == [3, 5]
    assert not (tmp_path / "one").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.setattr(loop.Run, "_advance", advance)
    assert command(*carrying, "--output", tmp_path / "one").code == 2
    assert command(*carrying, "--output", tmp_path / "one", "--resume").code == 0


def test_a_model_from_scratch_may_learn_its_tokenizer(command, scratch, home, tmp_path):
    one, size = tmp_path / "one", SMALLEST + 420
    config = GemmaConfig.from_json((home / "tiny.json").read_text())
    larger = dataclasses.replace(config, vocab_size=size)
    (tmp_path / "larger.json").write_text(larger.to_json())
    new = ("--config", tmp_path / "larger.json", "--tokenizer", f"new:{size}")
    data = ("--data", "task:digits", "task:mqar=0.01", "--segments", 8)
    done = command(*scratch, "--steps", 1, "--output", one, *new, *data)
    assert done.code == 0, done.err
    found = gemma_jax.load(one).tokenizer
    assert len(encode(found, " the")) == 1 and len(found) <= size
    assert [len(encode(found, f" {value}")) for value in VALUES] == [1] * len(VALUES)
    assert len(encode(found, " 123456")) == len(encode(found, " ")) + 2
    assert (one / "tokenizer.json").read_bytes() == (
        run_of(one) / "tokenizer" / "tokenizer.json"
    ).read_bytes()


def test_a_budget_of_minutes_ends_the_run(command, scratch, tmp_path):
    done = command(*scratch, "--minutes", 0.02, "--output", tmp_path / "one")
    assert done.code == 0, done.err
    described = json.loads((tmp_path / "one" / "training.json").read_text())
    assert described["seconds"] >= 1.2 and described["steps"] >= 1


def test_a_damaged_checkpoint_is_passed_over(command, carrying, finished):
    last = run_of(finished) / "checkpoints" / "step-00000008"
    file = next(path for path in sorted(last.rglob("d/*")))
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    done = command(*carrying, "--output", finished, "--resume")
    assert done.code == 0 and "going on after step 6" in done.err and "is damaged" in done.err


def test_what_was_stopped_goes_on_as_the_same_model_only(command, carrying, tmp_path):
    given = [*carrying, "--output", tmp_path / "one"]
    done = command(*given, "--stop-after", 1e-6)
    assert done.code == 0 and "continue with --resume" in done.err
    assert not (tmp_path / "one").exists()
    done = command(*given, "--resume", "--segment-length", 8)
    assert done.code == 2 and "--segment-length" in done.err
    done = command(*given, "--resume", "--final-rate", 0.5)
    assert done.code == 0 and "began with --final-rate 0.1" in done.err
    assert (tmp_path / "one").is_dir()


def test_numbers_that_are_not_finite_end_the_run(command, scratch, tmp_path):
    rates = ["--learning-rate", 1e30, "--memory-learning-rate", 3e30, "--warmup", 0, "--seed", 5]
    done = command(*scratch, *SHORT, *rates, "--output", tmp_path / "one")
    assert done.code == 1 and not (tmp_path / "one").exists()
    assert "of step 2 (seed 5, batch 1) is not finite" in done.err
    assert "layers_0" in done.err or "embedder" in done.err


@pytest.mark.parametrize(
    "change, code, said",
    [
        (["--steps", "8", "--minutes", "1"], 2, "--steps N or --minutes"),
        (["--data", "book.txt"], 2, "names no data"),
        (["--data", "task:nothing"], 2, "no task called"),
        (["--data", "text:missing.txt"], 3, "missing.txt does not exist"),
        (["--train", "lora"], 2, "needs a model"),
        (["--update-scale", "0.5"], 2, "towards the model that was there before"),
        (["--filler", "missing.txt"], 3, "missing.txt does not exist"),
        (["--segments", "8:4"], 2, "out of order"),
        (["--tokens-per-step", "8"], 2, "--tokens-per-step is 8"),
        (["--memory", "nothing"], 2, "no memory rule"),
        (["--config", "missing.json"], 3, "missing.json"),
        (["--tokenizer", "."], 3, "tokenizer.json"),
        (["--tokenizer", "new:many"], 2, "has no number of tokens"),
        (["--tokenizer", "new:100"], 2, "too small"),
        (["--recipe", "missing.toml"], 3, "missing.toml"),
        (["--resume", "--overwrite"], 2, "choose one of them"),
        (["--learning-rate", "0"], 2, "--learning-rate"),
        (["--output", ".", "--overwrite"], 2, "is not replaced"),
    ],
)
def test_bad_input_is_one_sentence(command, scratch, tmp_path, monkeypatch, change, code, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("precious")
    done = command(*scratch, "--steps", 1, "--output", tmp_path / "one", *change)
    assert done.code == code and said in done.err and done.out == ""
    assert done.err.startswith("error: ") and done.err.count("\n") == 1


def test_what_is_missing_is_asked_for(command, home, taught, tmp_path):
    budget = ["--steps", 1, "--output", tmp_path / "one"]
    data = ["--data", f"text:{home / 'book.txt'}"]
    for given, said in (
        ([*budget, *data], "--model DIR, --preset NAME or --config"),
        (["--preset", "gemma-2b", *budget, *data], "--tokenizer"),
        (["--model", taught, *budget], "--data"),
        (["--model", taught, *data, "--steps", 1], "--output"),
        (["--model", taught, *budget, *data, "--probe-lengths", "1K"], "recall of tasks"),
        (["--model", taught, *budget, *data, "--language-weight", 0], "nothing would be learnt"),
        (["--model", taught, *budget, *data, "--memory", "off"], "has no parameters to train"),
    ):
        done = command(*given)
        assert done.code == 2 and said in done.err, done.err


def test_a_recipe_is_overridden_by_the_command_line(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text('steps = 5\nlearning-rate = 0.5\ndata = ["text:a=2", "task:b"]\nquiet = true\n')
    found = options.parse(["--recipe", str(file), "--learning-rate", "0.25"])
    assert (found.steps, found.learning_rate, found.quiet) == (5, 0.25, True)
    assert found.data == [("text", "a", (2.0, 2.0)), ("task", "b", (1.0, 1.0))]
    file.write_text(
        'data = ["task:b=4:0.5", "text:x=y.txt"]\ndensity = "12:2"\nconfig = "shape.json"\n'
    )
    (tmp_path / "shape.json").write_text("{}")
    found = options.parse(["--recipe", str(file)])
    assert found.data == [("task", "b", (4.0, 0.5)), ("text", "x=y.txt", (1.0, 1.0))]
    assert found.density == (12.0, 2.0) and found.config == str(tmp_path / "shape.json")
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"steps": 7, "segments": "2:8", "resume": False}))
    found = options.parse(["--recipe", str(file)])
    assert (found.steps, found.segments, found.resume) == (7, (2, 8), False)


def test_recipes_that_come_with_the_package_are_known_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = options.parse(["--recipe", "demo"])
    assert found.data and Path(found.config).is_file()
    config = start.read_config(Path(found.config))
    assert int(found.tokenizer.removeprefix(start.NEW)) <= config.vocab_size
    second = options.parse(["--recipe", "demo_slots"])
    assert {what for _, what, _ in second.data} < {what for _, what, _ in found.data}
    assert (second.train, second.memory, second.slots) == ("all", "slots", 512)
    third = options.parse(["--recipe", "demo_needles"])
    assert {what for _, what, _ in third.data} == {what for _, what, _ in second.data}
    assert (third.slots, third.update_scale) == (512, 0.75)
    stories = options.parse(["--recipe", "demo_stories"])
    assert (stories.slots, stories.neighbours, stories.more_questions) == (2048, 4, 5)
    adapter = options.parse(["--recipe", "adapter"])
    assert (adapter.train, adapter.rank, adapter.update_scale) == ("lora", 16, 0.7)
    Path("demo").write_text("steps = 7\n")
    assert options.parse(["--recipe", "demo"]).steps == 7  # a file of one's own goes first


@pytest.mark.parametrize("recipe", ["demo_needles", "adapter"])
def test_what_is_shipped_was_made_by_its_recipe(recipe):
    if recipe == "adapter":
        shipped = Path(adapters.__file__).parents[1] / "adapters" / "gemma-3-270m"
        made_with = adapters.read(shipped, with_params=False).training["options"]
    else:
        made_with = json.loads((demo.MODEL / "training.json").read_text())["options"]
    found = vars(options.parse(["--recipe", recipe]))
    found = json.loads(json.dumps({name: found[name] for name in made_with}))
    given = {"model", "minutes"}  # on the command line
    assert {name for name in made_with if found[name] != made_with[name]} == given


@pytest.mark.parametrize(
    "content",
    [b"no xz", lzma.compress(b"It ends here. " * 999)[:-30], lzma.compress(b"caf\xe9. " * 99)],
)
def test_a_compressed_text_that_cannot_be_read_is_named(command, taught, tmp_path, content):
    (tmp_path / "bad.xz").write_bytes(content)
    given = ["--model", taught, "--data", f"text:{tmp_path / 'bad.xz'}", "--steps", 1]
    done = command(*given, "--output", tmp_path / "one")
    assert done.code == 3 and "bad.xz cannot be read" in done.err


def test_texts_of_every_kind_are_made_strange(home, tokenizer, tmp_path):
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "the people that it was for. " * 9}))
    given = [
        "--noise",
        0.4,
        "--segments",
        4,
        "--filler",
        home / "book.txt",
        "--data",
        "task:digits",
    ]
    texts = [f"text:{home / 'book.txt'}", f"jsonl:{tmp_path / 'texts.jsonl'}"]
    config = GemmaConfig.from_json((home / "tiny.json").read_text())
    found = options.parse([str(argument) for argument in (*given, *texts)])
    mixture, _ = train_command.make_data(found, config, tokenizer, tmp_path, lambda *_: None)
    assert [source.noise.share for source in mixture.sources] == [0.4] * 3


def test_the_recipe_of_adapters_gives_a_model_another_memory(command, taught, home, tmp_path):
    small = ["--segments", 4, "--tokens-per-step", 64, "--steps", 1, "--rank", 2]
    data = ["--data", f"text:{home / 'book.txt'}"]
    given = ["--recipe", "adapter", "--model", taught, "--output", tmp_path / "one"]
    done = command(*given, *small, *data)
    assert done.code == 2 and "leave out --write-loss" in done.err  # a text alone has no facts
    done = command(*given, *small, *data, "--write-loss", 0)
    assert done.code == 0, done.err
    adapter = adapters.read(tmp_path / "one")
    assert (adapter.memory.rule, adapter.memory.slots, adapter.trained) == ("slots", 1024, "lora")


@pytest.mark.parametrize(
    ("option", "what"),
    [
        ("--write-penalty", "does not count what it writes"),
        ("--write-margin", "has no parameter write_bias"),
        ("--write-loss", "chooses no tokens"),
    ],
)
def test_gates_are_pressed_shut_only_where_there_are_some(command, scratch, tmp_path, option, what):
    given = ["--steps", 1, "--output", tmp_path / "one", "--memory", "linear"]
    done = command(*scratch, *given, option, 0.1)
    assert done.code == 2 and f"linear {what}: leave out {option}." in done.err


def test_a_margin_raises_gates_when_the_longest_sequences_have_come(command, scratch, tmp_path):
    def written(margin):
        output = tmp_path / f"margin-{margin}"
        pressed = ["--growth", 0, "--write-margin", margin, "--memory", "gated_delta"]
        given = ["--steps", 4, "--log-steps", 1, "--warmup", 100, "--output", output]
        done = command(*scratch, *pressed, *given)
        assert done.code == 0, done.err
        return [float(row["written_0"]) for row in rows(output)]

    plain, pressed = written(0), written(1000)
    assert plain[0] == pressed[0] < 0.7, "of no budget nothing is spent yet"
    assert max(plain) < 0.7 and pressed[1:] == [1.0, 1.0, 1.0]


def test_a_memory_is_told_which_tokens_to_keep(command, scratch, tmp_path):
    def losses(output, *given):
        done = command(*scratch, "--memory", "slots", "--slots", 8, "--output", output, *given)
        assert done.code == 0, done.err
        return [float(row["write_loss"]) for row in rows(output)]

    told = losses(tmp_path / "told", "--steps", 30, "--log-steps", 1, "--write-loss", 1)
    assert told[0] == pytest.approx(np.log(2), rel=1e-4) and told[-1] < 0.5
    assert losses(tmp_path / "not", "--steps", 1, "--log-steps", 1) == [0.0]
    given = ["--memory", "slots", "--steps", 1, "--write-loss", 1, "--output", tmp_path / "copies"]
    done = command(*scratch, *given, "--segments", 8, "--data", "task:copy")
    assert done.code == 2 and "Nothing in --data tells what to keep" in done.err


def test_loose_wordings_and_strange_texts_are_named_and_kept(command, scratch, home, tmp_path):
    given = ["--steps", 1, "--data", "task:passkey", "--segments", 16, "--output", tmp_path / "one"]
    other = ["--loose", 1, "--language-weight", "0.1:0.01", "--noise-text", home / "book.txt"]
    done = command(*scratch, *given, *other)
    assert done.code == 2 and "say by --noise how many" in done.err
    done = command(*scratch, *given, *other, "--noise", 1)
    assert done.code == 0, done.err
    kept = json.loads((tmp_path / "one" / "training.json").read_text())["options"]
    assert (kept["loose"], kept["noise_text"]) == (1.0, ["book.txt"])
    assert kept["language_weight"] == [0.1, 0.01]


def test_a_quantised_model_has_its_memory_trained_alone(command, taught, tmp_path):
    config = store.read_config(taught)
    quantised = tmp_path / "int8"
    quantised.mkdir()
    text = config.to_json().replace('"quantization": null', '"quantization": "int8"')
    (quantised / store.CONFIG).write_text(text)
    store.write_manifest(quantised)
    given = ["--model", quantised, "--steps", 1, "--output", tmp_path / "one"]
    done = command(*given, "--train", "lora", "--data", f"text:{taught / 'training.json'}")
    assert done.code == 2 and "quantised" in done.err
