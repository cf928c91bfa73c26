"""The command: plants facts, has a model read the text with and without memory, and shows its answers."""

import argparse
import os
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gemma_jax.demo.planting import Planted
from gemma_jax.inference.console import (
    ArgumentParser,
    Console,
    count,
    describe,
    number,
    run_command,
)
from gemma_jax.inference.progress import Progress
from gemma_jax.tasks.base import Task

# Questions by task.
DEFAULT_TASKS = {"passkey": 1, "niah_multikey_1": 5}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = parse(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return run_command(lambda: demonstrate(options), debug=options.debug)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line as options; what is wrong with it ends the process with exit code 2."""
    parser = ArgumentParser(
        prog="python -m gemma_jax.demo",
        description="Plants facts in a long text, has a model read it, and asks for them: with memory,"
        " and with memory off.",
    )
    parser.add_argument(
        "--tokens", type=count, default=count("100K"), metavar="N", help="100K (default), 1M, 10M"
    )
    parser.add_argument(
        "--seed",
        type=number(int)(0, 2**32 - 1),
        default=0,
        metavar="S",
        help="another seed gives another text, other facts and questions (default: 0)",
    )
    parser.add_argument(
        "--task",
        type=task_list,
        default=DEFAULT_TASKS,
        metavar="NAME=N,...",
        help="what is planted, and how many questions are asked about it"
        f" (default: {','.join(f'{name}={asked}' for name, asked in DEFAULT_TASKS.items())})",
    )
    parser.add_argument("--write", metavar="FILE", help="keep the text, to be read with run.py")
    parser.add_argument(
        "--model", metavar="DIR", help="a checkpoint (default: the small one of gemma_jax)"
    )
    parser.add_argument("--quiet", action="store_true", help="only the answers, no progress")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(arguments)


def task_list(text: str) -> dict[str, int]:
    """`NAME=N,NAME=N`: questions by task, one where no number is given."""
    pairs = [part.partition("=") for part in text.split(",")]
    names = [name.strip() for name, _, _ in pairs]
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} names a task twice: name it once")
    questions = number(int)(1)
    return {
        name: questions(many if equals else "1")
        for name, (_, equals, many) in zip(names, pairs, strict=True)
    }


def demonstrate(options: argparse.Namespace) -> None:
    """Plants, reads and asks; the answers go to standard output, everything else to standard error.

    Raises:
        UsageError: the model has no memory, or the tasks and the length do not go together.
        GemmaError: the model's numbers are not finite.
    """
    from gemma_jax.demo.planting import make_tasks
    from gemma_jax.inference import notices

    made = make_tasks(options.task)
    began = time.perf_counter()
    console = Console(quiet=options.quiet, debug=options.debug)
    model = load(options.model)
    console.line(notices.memory_needed(model.config))
    planted = plant_for(model, made, options)
    if options.write:
        write_text(planted, model.tokenizer, Path(options.write))
        console.line(f"the text is in {options.write}")

    from gemma_jax.demo import table
    from gemma_jax.demo.running import read_and_ask
    from gemma_jax.evaluate.running import without_memory

    runs = {}
    for name, some in (("with memory", model), ("memory off", without_memory(model))):
        try:
            runs[name] = read_and_ask(planted, some, show_progress(console, name))
        finally:
            console.end_progress()
    table.show(planted, runs, seed=options.seed)
    if options.write:
        print_questions(planted, options)
    console.line(f"all of it took {time.perf_counter() - began:.0f} s")


def load(path: str | None) -> Any:
    """The model that is shown.

    Raises:
        UsageError: it has no memory.
        InputError, CorruptError: there is none, or it is damaged.
    """
    from gemma_jax import demo
    from gemma_jax.cache import keep_compiled_programs
    from gemma_jax.checkpoint import store
    from gemma_jax.errors import UsageError

    path = path or demo.checkpoint()
    if store.read_config(path).memory.rule == "off":
        raise UsageError(f"{path} has no memory (its rule is off): name a model that has one.")
    keep_compiled_programs()
    return store.load(path, dtype=demo.suitable_dtype())


def plant_for(model: Any, made: Sequence[tuple[Task, int]], options: argparse.Namespace) -> Planted:
    """What the options ask for, in the books that no model of ours was trained on."""
    from gemma_jax.demo.planting import plant
    from gemma_jax.evaluate.haystack import reach
    from gemma_jax.tasks import haystacks
    from gemma_jax.text import batch_encoder

    return plant(
        made,
        tokens=options.tokens,
        seed=options.seed,
        reach=reach(model.config),
        books=haystacks.shipped("held_out"),
        encode_batch=batch_encoder(model.tokenizer),
        bos_id=model.config.bos_id,
    )


def write_text(planted: Planted, tokenizer: Any, path: Path) -> None:
    """Writes what is read, as text; the line's end and the one that `run.py` puts before a prompt make
    the empty line that questions are asked after here.

    Raises:
        OSError: the file cannot be written.
    """
    pieces = iter(planted.text())
    next(pieces)  # BOS
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(tokenizer.decode(ids) for ids in pieces)
        file.write("\n")


def print_questions(planted: Planted, options: argparse.Namespace) -> None:
    """Prints how to ask the questions with `run.py` about the text that was written."""
    model = ["--model", options.model] if options.model else []
    command = ["python", "run.py", *model, "--context", options.write]
    prompts = [asked.question.text.strip() for asked in planted.asked]
    first = [*command, "--prompt", prompts[0], "--max-new-tokens", "16"]
    print(f"\nAsk yourself:\n\n{shlex.join(first)}")
    if prompts[1:]:
        print("\nThe other questions:\n")
        print("\n".join(shlex.quote(prompt) for prompt in prompts[1:]))


def show_progress(console: Console, name: str) -> Callable[[Progress | None], None]:
    """Shows how far the reading of one of the models is."""

    def show(progress: Progress | None) -> None:
        if progress is None:
            console.show(f"{name}: compiling (kept for the next time)", 0, None)
        else:
            what = f"{name}: {describe(progress)}"
            console.show(what, progress.tokens, progress.total_tokens)

    return show
