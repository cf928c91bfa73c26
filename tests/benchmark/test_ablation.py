"""One command trains, asks and shows; what was interrupted goes on, and nothing is done twice."""

import argparse
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from reference import tiny_config

import gemma_jax
from benchmarks import ablation, ablation_page, jobs
from benchmarks.ablation_page import Figure
from benchmarks.learners import START, VARIANTS, Learner, Start, common_options, shape, waves
from gemma_jax import random_model
from gemma_jax.benchmark import records
from gemma_jax.checkpoint import store
from gemma_jax.config import GemmaConfig
from gemma_jax.train import options as train_options
from gemma_jax.train.result import write_model

ROOT = Path(gemma_jax.__file__).parent.parent
START_STEPS, STEPS = 6, 12
WORDS = "the of and to in that it is was for on are with as his they be at one have this".split()
FIGURE = Figure(
    name="ablation_linear_mqar_4k",
    value=0.5,
    unit="1",
    command="python -m benchmarks.ablation --start-minutes 1 --minutes 3",
    device="NVIDIA H100",
    versions={"jax": "0.11.2"},
    date="2026-11-25",
    repeats=[0.25, 0.75, 0.5],
    rule="linear",
    seeds=[0, 1, 2],
    recipe="--data task:mqar",
    task="mqar",
    length=4096,
    questions=64,
    chance=1 / 64,
)


def changed(**changes):
    return dataclasses.replace(FIGURE, **changes)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with recipes for the tiniest of models."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = random_model.make_tokenizer()
    tokenizer.save(str(home / "tokenizer.json"))
    (home / "tokenizer_config.json").write_text("{}")
    config = tiny_config(
        vocab_size=tokenizer.get_vocab_size(),
        width=16,
        num_heads=1,
        num_kv_heads=1,
        head_dim=16,
        layer_types=("global",),
        segment_length=16,
    )
    (home / "tiny.json").write_text(config.to_json())
    rng = random.Random(0)
    text = (" ".join(rng.choices(WORDS, k=rng.randint(4, 9))) for _ in range(300))
    (home / "book.txt").write_text(" ".join(f"{words.capitalize()}." for words in text))
    recipe = {
        "data": "task:mqar",
        "filler": str(home / "book.txt"),
        "segments": 8,
        "tokens-per-step": 256,
        "density": 10,
        "carry": 0,
        "log-steps": 5,
        "checkpoint-steps": 3,
    }
    start = {"config": str(home / "tiny.json"), "tokenizer": str(home)}
    (home / "start.json").write_text(json.dumps(recipe | start))
    (home / "recipe.json").write_text(json.dumps(recipe | {"write-penalty": 0.01}))
    return home


@pytest.fixture
def recipes(home):
    return ["--start-recipe", str(home / "start.json"), "--recipe", str(home / "recipe.json")]


@pytest.fixture
def arguments(recipes, tmp_path):
    """A comparison that takes seconds."""
    return [
        *(*recipes, "--start-steps", str(START_STEPS), "--steps", str(STEPS)),
        *("--only", "off", "gated_delta", "--seeds", "0", "1"),
        *("--task", "mqar", "--lengths", "256,512", "--depths", "0,50", "--questions", "2"),
        *("--haystacks", "1", "--data-workers", "0", "--jobs", "2"),
        *("--work", str(tmp_path / "work"), "--record", str(tmp_path / "ablation.json")),
    ]


def options(*arguments):
    return ablation.parse(arguments)


def learners(rules, seeds):
    nothing = argparse.Namespace()
    return [Learner(nothing, rule, seed) for seed in range(seeds) for rule in rules]


# --- the whole ------------------------------------------------------------------------------------


def kill_with_children(process):
    """All at once, as when a machine goes away."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    process.communicate()


def test_a_killed_ablation_goes_on_and_shows_every_rule(arguments, tmp_path, monkeypatch, capsys):
    environment = os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
    }
    arguments = [*arguments, "--seeds", "1", "--jobs", "1"]
    command = [sys.executable, "-m", "benchmarks.ablation", *arguments]

    def start():
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    models, logs = tmp_path / "work" / "models", tmp_path / "work" / "logs"

    def finished():
        return {path: path.stat().st_mtime_ns for path in models.glob("*/training.json")}

    for trained, is_killed in ((0, "start"), (2, "gated_delta-1")):
        process = start()
        while not list(models.glob(f"{is_killed}.training/checkpoints/step-*/step.json")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        kill_with_children(process)
        first = finished()
        assert len(first) == trained and not (models / is_killed / "training.json").exists()
    assert "going on after step" in (logs / "start.train.log").read_text()

    again = start()
    printed, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert first.items() <= finished().items()
    assert "going on after step" in (logs / "gated_delta-1.train.log").read_text()

    found = {figure.name: figure for figure in records.read(tmp_path / "ablation.json", Figure)}
    for rule in ("off", "gated_delta"):
        recall = found[f"ablation_{rule}_mqar_512"]
        assert recall.seeds == [1] and len(recall.repeats) == 1 and recall.questions == 4
        assert 0 <= recall.value <= 1 and recall.device
        assert found[f"ablation_{rule}_steps"].repeats == [STEPS]
        assert found[f"ablation_{rule}_tokens_read"].repeats == [256 * STEPS]
    assert 0 < found["ablation_gated_delta_written"].value <= 1
    assert "ablation_off_written" not in found
    assert found["ablation_start_tokens_read"].repeats == [256 * START_STEPS]
    assert 0 <= found["ablation_start_answers"].value <= 1
    assert "| gated_delta | 1 |" in printed
    page = (tmp_path / "ablation.md").read_text()
    assert f"--steps {STEPS}" in page and "--work" not in page and "--only" not in page
    assert re.search(rf"\| start \| `--memory off` \| 0 \| {START_STEPS} \| 0.0 \|", page)
    assert (tmp_path / "ablation.svg").exists()

    def refuse(*_, **__):
        raise AssertionError("it was done again")

    monkeypatch.setattr(jobs.Machine, "_start", refuse)
    monkeypatch.setattr(sys, "argv", ["ablation", *arguments])
    before = (tmp_path / "ablation.json").read_text()
    assert ablation.main() == 0 and "| gated_delta | 1 |" in capsys.readouterr().out
    assert (tmp_path / "ablation.json").read_text() == before
    # Other questions are no other training; a smaller part does not forget the rest.
    assert ablation.main([*arguments, "--only", "off"]) == 0
    assert (tmp_path / "ablation.json").read_text() == before
    assert ablation.main([*arguments, "--steps", "21"]) == 2
    assert f"(steps was {STEPS}, now 21)" in capsys.readouterr().err
    assert ablation.main([*arguments, "--start-steps", "21"]) == 2
    assert f"(start_steps was {START_STEPS}, now 21)" in capsys.readouterr().err


# --- its parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rules, seeds, slots, size",
    [(6, 3, 18, 18), (6, 3, 16, 6), (6, 3, 6, 6), (6, 3, 5, 3), (6, 3, 1, 1), (5, 4, 12, 10)],
)
def test_all_rules_of_a_seed_share_the_cards_with_as_many_others(rules, seeds, slots, size):
    every = learners([f"rule.py:R{i}" for i in range(rules)], seeds)
    found = waves(every, slots)
    assert {len(wave) for wave in found} == {size}
    assert sorted(sum(found, []), key=every.index) == every
    for wave in found if size >= rules else []:
        assert {sum(one.rule == other.rule for other in wave) for one in wave} == {size // rules}


def test_a_rule_is_on_other_cards_with_other_seeds():
    (wave,) = waves(learners(list(VARIANTS), 2), 12)
    cards = {(learner.rule, learner.seed): i % 2 for i, learner in enumerate(wave)}
    assert all(cards[rule, 0] != cards[rule, 1] for rule in VARIANTS)


def test_the_recorded_command_is_that_of_the_whole():
    given = ["--start-minutes", "1.5", "--minutes", "3", "--jobs", "9", "--devices", "0,1"]
    assert ablation.command_of(options(*given, "--only", "off", "--seeds", "5")) == (
        "python -m benchmarks.ablation --recipe benchmarks/ablation.toml --start-minutes 1.5"
        " --minutes 3 --jobs 9 --devices 0,1"
    )


def test_other_questions_have_a_place_of_their_own():
    one, same, other = (
        Learner(options(*given), "off", 0) for given in (["--jobs", "2"], [], ["--lengths", "8K"])
    )
    assert one.answers == same.answers != other.answers and same.model == other.model


def test_the_recipes_that_are_shipped_fit_every_rule(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    place = ["--work", str(tmp_path), "--record", str(tmp_path / "ablation.json")]
    given = options("--start-minutes", "1", "--minutes", "3", *place)
    ablation.check(given, Start(given), [Learner(given, rule, 0) for rule in VARIANTS])
    start, rules = (
        train_options.parse(["--recipe", f"benchmarks/{name}.toml"])
        for name in ("ablation.start", "ablation")
    )
    config = shape(given)
    assert max(start.segments) * config.memory.segment_length <= config.memory.reach
    # Memory is first read in the third segment.
    assert config.memory.local_attention == "transformer_xl" and min(rules.segments) > 2
    assert int(start.tokenizer.removeprefix("new:")) <= config.vocab_size


def test_a_rule_of_ones_own_is_named_to_every_command(home, recipes):
    (home / "mine.py").write_text("from gemma_jax.model.memory import Delta as MyOwn\n")
    rule = f"{home / 'mine.py'}:MyOwn"
    found = Learner(options(*recipes), rule, 3)
    assert found.name == "myown-3"
    for job in (found.training, found.evaluation):
        assert job.arguments[job.arguments.index("--memory") + 1] == rule


@pytest.mark.parametrize(
    "rule, penalised",
    [("off", False), ("linear", False), ("gated_delta_sigmoid", True), ("selective_delta", True)],
)
def test_only_rules_that_count_what_they_write_pay_for_it(recipes, rule, penalised):
    found = Learner(options(*recipes), rule, 0)
    told = train_options.parse(found.training_options)
    assert told.write_penalty == (0.01 if penalised else 0)
    assert told.memory == rule.removesuffix("_sigmoid")


@pytest.mark.parametrize(
    "wrong, said",
    [
        (["--only", "nothing"], "there is no rule 'nothing'"),
        (["--only", "mine.py:Start"], "would be called start"),
        (["--lengths", "4K,long"], "no list of numbers"),
        (["--lengths", "32"], "within the reach of local attention"),
        (["--task", "nothing"], "no task called 'nothing'"),
        (["--minutes", "1"], "not allowed with argument"),
        (["--start", "checkpoint"], "not allowed with argument"),
        (["--record", "nowhere/ablation.json"], "has no directory"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(arguments, tmp_path, capsys, wrong, said):
    try:
        code = ablation.main([*arguments, *wrong])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


@pytest.fixture
def failing(monkeypatch):
    """Jobs that leave what a training or an evaluation does, but for those whose name has it in it.

    Returns how to say what fails, and the names of the jobs that were begun.
    """
    begun, fails = [], []
    answers = {"off-0": 0.25, "off-1": 0.75, "gated_delta-0": 1.0, "gated_delta-1": 1.0}

    def start(self, job, device):
        begun.append(job.name)
        code = int(any(name in job.name for name in fails))
        if not code and "evaluation" in job.name:
            place = Path(job.arguments[job.arguments.index("--record") + 1])
            place.write_text(json.dumps([recall(accuracy=answers[job.name.split()[-1]])]))
        elif not code:
            model = Path(job.arguments[job.arguments.index("--output") + 1])
            model.mkdir(parents=True)
            told = {"steps": STEPS, "tokens": 1000, "seconds": 1.5}
            (model / "training.json").write_text(json.dumps(told))
            run = model.with_name(f"{model.name}.training")
            run.mkdir()
            (run / "log.csv").write_text("step,loss,written_0,written_1\n20,1.5,0.25,0.75\n")
        return subprocess.Popen([sys.executable, "-c", f"exit({code})"])

    monkeypatch.setattr(jobs.Machine, "_start", start)
    return fails, begun


@pytest.mark.parametrize(
    "option, recipe, said",
    [("--recipe", "start", "has a model of its own"), ("--start-recipe", "recipe", "from scratch")],
)
def test_the_shape_is_in_the_recipe_of_the_start_alone(
    arguments, home, capsys, option, recipe, said
):
    assert ablation.main([*arguments, option, str(home / f"{recipe}.json")]) == 2
    assert said in capsys.readouterr().err


def test_a_rule_that_fails_is_named_and_the_others_are_shown(arguments, tmp_path, failing, capsys):
    fails, _ = failing
    fails.append("gated_delta-1")
    assert ablation.main(arguments) == 1
    said = capsys.readouterr()
    assert "1 jobs failed (training of gated_delta-1: see" in said.err
    assert "| off | 0, 1 | 0.50 (0.25 to 0.75) |" in said.out
    assert "| gated_delta | 0 | 1.00 |" in said.out
    found = {figure.name: figure for figure in records.read(tmp_path / "ablation.json", Figure)}
    assert found["ablation_gated_delta_written"].repeats == [0.5]


def test_without_a_start_nothing_is_tried_until_there_is_one(arguments, tmp_path, failing, capsys):
    fails, begun = failing
    fails.append("training of start")
    assert ablation.main(arguments) == 1 and begun == ["training of start"]
    log = tmp_path / "work" / "logs" / "start.train.log"
    assert f"(training of start: see {log})" in capsys.readouterr().err
    assert not (tmp_path / "ablation.json").exists()
    fails.clear()
    assert ablation.main(arguments) == 0
    assert begun[:2] == ["training of start"] * 2 and begun.count("training of start") == 2


@pytest.fixture
def given(home, tmp_path):
    """Two models without memory, and the configuration of one with."""
    config = GemmaConfig.from_json((home / "tiny.json").read_text()).with_memory(rule="off")
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), gemma_jax.abstract_params(config))
    write_model(tmp_path / "zeros", config, params, home, {})
    write_model(tmp_path / "ones", config, jax.tree.map(jnp.ones_like, params), home, {})
    (tmp_path / "linear").mkdir()
    (tmp_path / "linear" / store.CONFIG).write_text(config.with_memory(rule="linear").to_json())
    store.write_manifest(tmp_path / "linear")
    return tmp_path


def test_a_model_that_is_given_is_what_all_go_on_from(
    arguments, given, failing, capsys, monkeypatch
):
    def compare(start):
        return ablation.main([*arguments, "--start", str(start)])

    at = arguments.index("--start-steps")
    del arguments[at : at + 2]
    monkeypatch.chdir(given)
    assert ablation.main(arguments) == 2 and "nothing to go on from" in capsys.readouterr().err
    assert compare("zeros") == 0 and not any("start" in name for name in failing[1])
    rules = {figure.rule for figure in records.read(given / "ablation.json", Figure)}
    assert rules == {"off", "gated_delta"}
    assert "--start zeros" in (given / "ablation.md").read_text()
    told = common_options(options("--start", "zeros"))
    assert told[told.index("--model") + 1] == str(given / "zeros")
    assert compare(given / "zeros") == 0
    assert compare("ones") == 2 and "(start was" in capsys.readouterr().err
    assert compare("linear") == 2
    assert "linear has a memory of rule linear" in capsys.readouterr().err
    assert compare("nowhere") == 3


def test_the_start_has_a_card_for_itself(arguments, monkeypatch, failing):
    running = {}
    run = jobs.Machine.run

    def note(machine, jobs, ended):
        running.update({job.name: (machine.slots, len(jobs)) for job in jobs})
        run(machine, jobs, ended)

    monkeypatch.setattr(jobs.Machine, "run", note)
    assert ablation.main([*arguments, "--devices", "0,1"]) == 0
    assert running["training of start"] == (1, 1) and running["training of off-0"] == (4, 4)


def recall(**changes):
    """A pooled record of an evaluation."""
    numbers = dict.fromkeys(("trials", "effective_trials", "haystacks"), 4)
    numbers |= dict.fromkeys(("low", "high", "chance", "repeated_share", "failed", "seed"), 0)
    nothing = ("baseline", "trials_sha256", "read_tokens_per_second", "peak_bytes", "state_bytes")
    words = {"model": "m", "rule": "off", "task": "mqar", "forms": "classic", "command": "c"}
    stamp = {"device": "d", "versions": {"jax": "1"}, "date": "2026-11-25"}
    place = {"tokens": 512, "depth": None, "within_reach": False}
    return numbers | dict.fromkeys(nothing) | words | stamp | place | changes


# --- the page -------------------------------------------------------------------------------------


def test_page_and_plot_of_made_up_records(tmp_path):
    file = tmp_path / "made_up.json"
    start = {"rule": START, "task": None, "seeds": [0], "repeats": [0], "recipe": "--config a.json"}
    content = [
        changed(),
        changed(name="ablation_linear_mqar_262k", length=262_144, value=0.1, repeats=[0.1] * 3),
        changed(name="ablation_off_mqar_4k", rule="off", value=0.01, repeats=[0.01], seeds=[0]),
        changed(name="ablation_mine_mqar_4k", rule="mine", value=1.0, repeats=[1.0] * 3),
        changed(name="ablation_linear_steps", task=None, value=1500.0, repeats=[1400, 1600]),
        changed(name="ablation_linear_mqar_8k", command="another", length=8192),
        *(
            changed(name=f"ablation_start_{end}", value=value, **start)
            for end, value in (("tokens_read", 16e6), ("seconds", 90.0), ("answers", 0.97))
        ),
    ]
    records.append(file, content)
    ablation_page.main([str(file)])
    text = (tmp_path / "made_up.md").read_text()
    first, second = text.split("another")
    assert "| rule | seeds | 4K | 256K |" in first and "| rule | seeds | 8K |" in second
    rows = [line for line in first.splitlines() if line.startswith("| ")]
    assert rows[1:4] == [
        "| off | 0 | 0.01 | – |",
        "| linear | 0, 1, 2 | 0.50 (0.25 to 0.75) | 0.10 |",
        "| mine | 0, 1, 2 | 1.00 | – |",
    ]
    assert "| linear | `--memory linear` | 0, 1, 2 | 1,500 (1,400 to 1,600) | – |" in first
    assert "| start | `--memory off` | 0 | – | 16.0 | 90 | 0.97 | – |" in first
    assert FIGURE.command in first and "python -m gemma_jax.train --data task:mqar" in first
    assert "The start's recipe:\n\n```\npython -m gemma_jax.train --config a.json" in first
    assert "chance 0.016" in first and "NVIDIA H100, 2026-11-25, jax 0.11.2" in first
    for name in ("made_up.svg", "made_up_2.svg"):
        assert f"({name})" in text and 1000 < (tmp_path / name).stat().st_size < 100_000


def test_a_plot_has_a_line_for_each_rule_and_a_panel_for_each_task(tmp_path):
    figures = [
        changed(rule=rule, task=task, length=length)
        for rule in VARIANTS
        for task in ("mqar", "passkey")
        for length in (4096, 32_768)
    ]
    ablation_page.plot(figures, tmp_path / "one.svg")
    ablation_page.plot(figures, tmp_path / "two.svg")
    drawn = (tmp_path / "one.svg").read_text()
    assert drawn == (tmp_path / "two.svg").read_text()
    # Words are drawn as paths, and named in a comment.
    assert all(f"<!-- {word} -->" in drawn for word in (*VARIANTS, "mqar", "passkey", "32K"))
