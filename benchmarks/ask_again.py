"""A text read once and asked many times, or read anew for each question: `python -m benchmarks.ask_again`.

Both ways read the same ids in the same pieces; composing them, loading the model and compiling are not timed.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from gemma_jax.benchmark.records import stamp
from gemma_jax.checkpoint.files import write_file
from gemma_jax.checkpoint.memory_file import Memory, require_place, save
from gemma_jax.demo.command import load
from gemma_jax.demo.planting import Planted, make_tasks, plant
from gemma_jax.evaluate.haystack import reach
from gemma_jax.inference.console import ArgumentParser, Console, count, leave, number, run_command
from gemma_jax.inference.prefill import piece_sizes
from gemma_jax.inference.reader import generate, read
from gemma_jax.inference.remember import fork, new_memory
from gemma_jax.inference.saving import load_reading
from gemma_jax.tasks.haystacks import shipped
from gemma_jax.text import Place, batch_encoder


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = ArgumentParser(prog="python -m benchmarks.ask_again", description=__doc__)
    add, whole = parser.add_argument, number(int)
    add("--model", metavar="DIR", help="a checkpoint with a memory (default: the small one)")
    add("--tokens", type=count, default=count("1M"), metavar="N", help="of the text (default: 1M)")
    add("--questions", type=whole(1), default=50, metavar="N", help="(default: 50)")
    add("--text", nargs="+", metavar="FILE", help="what facts are planted in (default: our books)")
    add("--seed", type=whole(0, 2**32 - 1), default=0, metavar="S")
    add("--output", type=Path, metavar="FILE", help="writes the figures to this JSON file")
    add("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(arguments)
    return run_command(lambda: compare(options), debug=options.debug)


def compare(options: argparse.Namespace) -> None:
    """Measures, prints the figures, and writes them down where that is asked for."""
    if options.output:
        require_place(options.output)
    model = load(options.model)
    planted = plant(
        make_tasks({"niah_multikey_1": options.questions}),
        tokens=options.tokens,
        seed=options.seed,
        reach=reach(model.config),
        books=options.text or shipped("held_out"),
        encode_batch=batch_encoder(model.tokenizer),
        bos_id=model.config.bos_id,
    )
    figures = measure(model, planted, Console().line)
    for name, value in figures.items():
        print(f"{name:<24} {value:>12,{'.3f' if isinstance(value, float) else ''}}")
    if options.output:
        record = {"model": model.config.name} | figures | stamp("benchmarks.ask_again")
        write_file(options.output, [json.dumps(record, indent=1).encode()])


def measure(model: Any, planted: Planted, say: Callable[[str], None]) -> dict[str, int | float]:
    """Asks from a memory file of the text and after a reading for each; seconds, bytes and counts."""
    ids = tuple(token for some in planted.text() for token in some)
    few, questions = ids[: piece_sizes(model.config)[1] + 1], [a.ids for a in planted.asked]
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "text.mem"
        for some in (few, ids):  # the first compiles everything
            memory, read_seconds = timed(read_once, model, some)
            save(file, memory, model)
            memory, load_seconds = timed(load_reading, str(file), model)
            for begun in (memory, unread(model, few)):
                ask(model, begun, questions[0])
        file_bytes = file.stat().st_size
    again = [timed(ask, model, memory, question) for question in questions]
    anew = []
    for question in questions:
        anew.append(timed(ask, model, unread(model, ids), question))
        say(f"full read {len(anew)} of {len(questions)}: {anew[-1][1]:.1f} s")
    trials = list(zip(planted.tasks, planted.asked, again, anew, strict=True))
    return {
        "tokens": len(ids),
        "questions": len(questions),
        "read_once_seconds": read_seconds,
        "memory_file_bytes": file_bytes,
        "load_seconds": load_seconds,
        "median_answer_seconds": statistics.median(seconds for _, seconds in again),
        "median_full_read_seconds": statistics.median(seconds for _, seconds in anew),
        "identical_answers": sum(one[0] == other[0] for *_, one, other in trials),
        "right_from_memory": sum(t.score(a.question, one[0]) == 1 for t, a, one, _ in trials),
        "right_by_full_read": sum(t.score(a.question, one[0]) == 1 for t, a, _, one in trials),
    }


def read_once(model: Any, ids: Sequence[int]) -> Memory:
    """A text's memory as `remember` leaves it: whole pieces are read, what is left is kept as ids."""
    whole = len(ids) - len(ids) % piece_sizes(model.config)[1]
    rest = unread(model, ids[whole:])
    return dataclasses.replace(rest, state=read(model, [ids[:whole]]).state) if whole else rest


def unread(model: Any, ids: Sequence[int]) -> Memory:
    """The memory of a text, in ids with BOS, nothing of which was read yet."""
    return dataclasses.replace(new_memory(model), ids=tuple(ids), place=Place.TEXT)


def ask(model: Any, memory: Memory, question: Sequence[int]) -> str:
    """The greedy answer, at most 24 tokens, to a question in ids; the memory is not consumed."""
    asked = dataclasses.replace(fork(memory), ids=(*memory.ids, *question))
    return "".join(generate(model, None, memory=asked, max_new_tokens=24, temperature=0))


def timed(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What a call gives, and its seconds; a State is on the device by then."""
    start = time.perf_counter()
    result = call(*arguments)
    jax.block_until_ready(getattr(result, "state", None))
    return result, time.perf_counter() - start


if __name__ == "__main__":
    leave(main())
