"""Compares memory rules: all go on from one model without memory, each with the same recipe and budget
and several seeds, and are asked what they recall.

    python -m benchmarks.ablation --start-minutes 1.5 --minutes 2.5 --jobs 9 --devices 0,1

One training from scratch, then one for each rule and seed (`gemma_jax.train`), an evaluation of each
model (`gemma_jax.evaluate`), then records, a page and a plot. `--work` keeps all of it: the same
command goes on where it was interrupted, and does nothing that is finished again.
"""

import argparse
import dataclasses
import hashlib
import json
import shlex
import signal
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ablation_page
from benchmarks.ablation_page import Figure
from benchmarks.jobs import Job, Machine, alone
from benchmarks.learners import (
    START,
    VARIANTS,
    Learner,
    Start,
    Trained,
    common_options,
    label,
    shape,
    waves,
)
from gemma_jax.benchmark import records
from gemma_jax.errors import GemmaError, UsageError
from gemma_jax.evaluate.options import several
from gemma_jax.evaluate.report import Recall
from gemma_jax.inference.console import ArgumentParser, Console, count, leave, number, run_command

# Options on which no figure depends.
NOT_RECORDED = ("only", "seeds", "work", "record", "quiet", "debug")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    whole = number(int)
    parser = ArgumentParser(
        prog="python -m benchmarks.ablation",
        description="Trains each memory rule with the same budget, and measures what it recalls.",
    )
    what = parser.add_argument_group("what is compared")
    what.add_argument(
        "--only",
        metavar="RULE",
        nargs="+",
        default=list(VARIANTS),
        type=variant,
        help=f"of: {', '.join(VARIANTS)}; or your own, as FILE.py:CLASS (default: all of ours)",
    )
    what.add_argument(
        "--seeds", metavar="S", nargs="+", default=[0, 1, 2], type=whole(0), help="(default: 0 1 2)"
    )
    group = parser.add_argument_group("what all go on from, a model without memory")
    start = add_training(group, "start-", "benchmarks/ablation.start.toml")
    start.add_argument("--start", metavar="DIR", help="a model that was trained with --memory off")
    group = parser.add_argument_group("the training of each")
    add_training(group, "", "benchmarks/ablation.toml")
    group = parser.add_argument_group("what is asked")
    group.add_argument(
        "--task", metavar="A,B", default="mqar,passkey", help="(default: %(default)s)"
    )
    group.add_argument(
        "--lengths",
        metavar="L,...",
        default="4K,32K,256K",
        type=listed(count),
        help="(default: %(default)s)",
    )
    group.add_argument(
        "--depths",
        metavar="D,...",
        default="0,25,50,75",
        type=listed(number(float)(0, 100)),
        help="in percent (default: %(default)s)",
    )
    group.add_argument(
        "--questions", metavar="N", default=16, type=whole(1), help="at each depth (default: 16)"
    )
    group.add_argument(
        "--haystacks", metavar="N", default=4, type=whole(1), help="spread them (default: 4)"
    )
    group.add_argument("--filler", default="books", help="(default: %(default)s)")
    group.add_argument("--forms", default="classic", help="(default: %(default)s)")
    group = parser.add_argument_group("the run")
    group.add_argument(
        "--jobs", metavar="N", default=6, type=whole(1), help="at once on a card (default: 6)"
    )
    group.add_argument(
        "--devices",
        metavar="I,...",
        default="",
        help="cards, as CUDA_VISIBLE_DEVICES names them (default: as it is)",
    )
    group.add_argument(
        "--data-workers",
        metavar="N",
        type=whole(0),
        help="processes that make the batches of a training (default: by cores)",
    )
    group.add_argument(
        "--work",
        metavar="DIR",
        default="checkpoints/ablation",
        help="models, logs and trials (default: %(default)s)",
    )
    group.add_argument(
        "--record",
        metavar="FILE",
        default="benchmarks/ablation.json",
        help="records; page and plot are written beside it (default: %(default)s)",
    )
    group.add_argument("--quiet", action="store_true", help="only warnings and errors")
    group.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(arguments)


def add_training(group: Any, prefix: str, recipe: str) -> Any:
    """Adds options of a training; returns the group of which one may be given."""
    group.add_argument(
        f"--{prefix}recipe",
        metavar="FILE",
        default=recipe,
        help="options of gemma_jax.train (default: %(default)s)",
    )
    budget, positive = group.add_mutually_exclusive_group(), number(float)(0, above=True)
    budget.add_argument(f"--{prefix}minutes", metavar="M", type=positive, help="the budget")
    budget.add_argument(f"--{prefix}steps", metavar="N", type=count, help="the same in steps")
    return budget


def variant(text: str) -> str:
    """An argument type: a name of `VARIANTS`, or a rule of one's own."""
    if text in VARIANTS:
        return text
    if ":" not in text:
        known = ", ".join(VARIANTS)
        raise argparse.ArgumentTypeError(f"there is no rule {text!r}: choose of {known}")
    if label(text) in (START, *VARIANTS):
        raise argparse.ArgumentTypeError(
            f"{text} would be called {label(text)}, as another is here: rename the class"
        )
    return text


def listed(kind: Callable[[str], Any]) -> Callable[[str], str]:
    """An argument type: text that holds values separated by commas, for `gemma_jax.evaluate`."""

    def convert(text: str) -> str:
        several(kind)(text)
        return text

    return convert


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = parse(arguments)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run_command(lambda: compare(options), debug=options.debug)
    finally:
        signal.signal(signal.SIGTERM, before)


def compare(options: argparse.Namespace) -> None:
    """Trains and evaluates what is not finished; prints what came of it, and writes it down.

    Raises:
        GemmaError: some of it failed; everything else is written all the same.
    """
    console = Console(quiet=options.quiet, debug=options.debug)
    start = Start(options)
    learners = [Learner(options, rule, seed) for seed in options.seeds for rule in options.only]
    check(options, start, learners)
    work = Path(options.work)
    for name in ("models", "recall", "logs"):
        (work / name).mkdir(parents=True, exist_ok=True)

    def wait() -> None:
        console.line(f"{work} is in use: waiting until what an earlier command began has ended.")

    with alone(work, wait) as lock:
        keep_settings(work / "settings.json", options)
        machine = Machine(tuple(options.devices.split(",")), options.jobs, lock)
        failed = run_all(start, learners, machine, console)
        figures = list(measured(start, list(finished(options)), command_of(options)))
        if figures:
            file = Path(options.record)
            records.append(file, figures)
            ablation_page.write(file)
            for task in dict.fromkeys(figure.task for figure in figures if figure.task):
                own = [figure for figure in figures if figure.task == task]
                print("\n".join(ablation_page.recall_table(task, own)), flush=True)
            console.line(f"records are in {file}, the page and the plot beside it.")
    if failed:
        raise GemmaError(
            f"{len(failed)} jobs failed ({failed[0].name}: see {failed[0].log}): the same command tries"
            " them again."
        )


# --- before anything is run -----------------------------------------------------------------------


def check(options: argparse.Namespace, start: Start, learners: Sequence[Learner]) -> None:
    """Raises what is wrong with the options before anything long begins."""
    from gemma_jax import tasks
    from gemma_jax.train import command
    from gemma_jax.train import options as train_options

    for name in options.task.split(","):
        tasks.make(name, forms=options.forms, haystack=options.filler)
    if not Path(options.record).absolute().parent.is_dir():
        raise UsageError(f"{options.record} has no directory: choose another --record.")
    if not (options.start or options.start_minutes or options.start_steps):
        raise UsageError(
            "There is nothing to go on from: give --start-minutes M, --start-steps N or --start DIR."
        )
    require_distance(options)
    for model in [*([] if start.is_given else [start]), *learners]:
        command.check(train_options.parse(model.training_options))


def require_distance(options: argparse.Namespace) -> None:
    """Raises `UsageError` when local attention may know the answers at some length."""
    from gemma_jax.evaluate.haystack import reach

    within = reach(shape(options))
    shortest, depth = several(count)(options.lengths)[0], several(float)(options.depths)[0]
    if shortest * (1 - depth / 100) <= within:
        raise UsageError(
            f"At {shortest} tokens all facts are within the reach of local attention ({within} tokens):"
            " choose longer --lengths."
        )


def keep_settings(file: Path, options: argparse.Namespace) -> None:
    """Notes what the trainings depend on, or compares it with what was noted.

    Raises:
        UsageError: the models that are there were trained otherwise.
    """
    settings = json.loads(json.dumps(settings_of(options)))
    if not file.exists() or not any((file.parent / "models").iterdir()):
        file.write_text(json.dumps(settings, indent=1) + "\n")
        return
    before = json.loads(file.read_text())
    for name in {**before, **settings}:
        if before.get(name) != settings.get(name):
            raise UsageError(
                f"{file.parent} holds models of another training ({name} was {before.get(name)}, now"
                f" {settings.get(name)}): choose another --work."
            )


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """All that the trainings depend on but rule and seed; files by their hashes."""
    from gemma_jax.checkpoint import store
    from gemma_jax.train import options as train_options

    start = Start(options)
    told = {"": train_options.parse(common_options(options))}
    if not start.is_given:
        told["start_"] = train_options.parse(start.training_options)
    left_out = {*train_options.PER_RUN, "seed", "memory", "write_gate", "model"}
    settings = {
        prefix + name: value
        for prefix, some in told.items()
        for name, value in vars(some).items()
        if name not in left_out
    }
    if config := settings.get("start_config"):
        settings["start_config"] = hashlib.sha256(Path(config).read_bytes()).hexdigest()
    given = store.part_hashes(start.model)["weights"] if start.is_given else None
    return {"start": given, **settings}


def command_of(options: argparse.Namespace) -> str:
    """The command of the whole comparison, whichever parts of it this one does."""
    default = vars(parse([]))
    told = ["--recipe", options.recipe]
    for name, value in vars(options).items():
        if name not in (*NOT_RECORDED, "recipe") and value != default[name]:
            told += [
                f"--{name.replace('_', '-')}",
                f"{value:g}" if isinstance(value, float) else str(value),
            ]
    return shlex.join(["python", "-m", "benchmarks.ablation", *told])


# --- running --------------------------------------------------------------------------------------


def run_all(
    start: Start, learners: Sequence[Learner], machine: Machine, console: Console
) -> list[Job]:
    """Trains, then evaluates; returns the jobs that failed. Without a start nothing else is tried."""
    failed: list[Job] = []

    def ended(job: Job, code: int) -> None:
        console.line(f"{job.name}: " + ("done" if code == 0 else f"failed ({code}), see {job.log}"))
        if code:
            failed.append(job)

    is_there = start.is_given or start.is_trained
    if not is_there and not all(learner.is_trained for learner in learners):
        console.line("training what all go on from")
        whole = dataclasses.replace(machine, devices=machine.devices[:1], jobs=1)
        whole.run([start.training], ended)
        if failed:
            return failed
    for wave in waves(learners, machine.slots):
        jobs = [learner.training for learner in wave if not learner.is_trained]
        if jobs:
            console.line(f"training {len(jobs)} at once: {', '.join(job.name for job in jobs)}")
            machine.run(jobs, ended)
    todo = [learner for learner in learners if learner.is_trained and not learner.recalled()]
    for learner in todo:
        learner.answers.mkdir(exist_ok=True)
    if todo:
        console.line(f"evaluating {len(todo)} models")
        machine.run([learner.evaluation for learner in todo], ended)
    return failed


# --- what came of it ------------------------------------------------------------------------------


def finished(options: argparse.Namespace) -> Iterator[Learner]:
    """All models of `--work` that were asked the same, whichever command trained them."""
    names = {path.name for path in (Path(options.work) / "models").iterdir()}
    seeds = {name.rpartition("-")[2] for name in names}
    for rule in dict.fromkeys([*VARIANTS, *options.only]):
        for seed in sorted(int(seed) for seed in seeds if seed.isdigit()):
            learner = Learner(options, rule, seed)
            if learner.recalled():
                yield learner


def measured(start: Start, learners: Sequence[Learner], command: str) -> Iterator[Figure]:
    """Figures of the start, and of each rule over the seeds of its finished learners."""
    if learners and start.is_trained and not start.is_given:
        everything = [recall for learner in learners for recall in learner.recalled()]
        yield from _of_training([start], _about([start], command, everything))
    for rule in dict.fromkeys(learner.label for learner in learners):
        own = [learner for learner in learners if learner.label == rule]
        answered = [recall for learner in own for recall in learner.recalled()]
        about = _about(own, command, answered)
        yield from _of_training(own, about)
        for task, length in dict.fromkeys((recall.task, recall.tokens) for recall in answered):
            cells = [r for r in answered if (r.task, r.tokens) == (task, length)]
            asked = {"task": task, "length": length, "chance": cells[0].chance}
            asked["questions"] = min(cell.trials for cell in cells)
            name = f"{rule}_{task}_{records.label(length)}"
            yield _figure(name, "1", [cell.accuracy for cell in cells], about | asked)


def _of_training(models: Sequence[Trained], about: dict[str, Any]) -> Iterator[Figure]:
    told = [model.trained() for model in models]
    for end in ablation_page.TRAINED:
        if all(end in one for one in told):
            unit = "s" if end == "seconds" else "1"
            yield _figure(f"{about['rule']}_{end}", unit, [one[end] for one in told], about)


def _about(models: Sequence[Trained], command: str, recalled: Sequence[Recall]) -> dict[str, Any]:
    """What all figures of some models have in common.

    Where they come from is as the evaluations tell it: this process leaves the cards alone.
    """
    from gemma_jax.train.options import find_recipe, read_recipe

    last = max(recalled, key=lambda recall: recall.date)
    return {
        "rule": models[0].label,
        "seeds": [model.seed for model in models],
        "recipe": shlex.join(read_recipe(find_recipe(models[0].recipe))),
        "command": command,
        "device": ", ".join(dict.fromkeys(recall.device for recall in recalled)),
        "versions": last.versions,
        "date": last.date,
    }


def _figure(name: str, unit: str, repeats: list[float], fields: dict[str, Any]) -> Figure:
    value = statistics.mean(repeats)
    return Figure(name=f"ablation_{name}", value=value, unit=unit, repeats=repeats, **fields)


if __name__ == "__main__":
    leave(main())
