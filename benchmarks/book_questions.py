"""Questions about a book that lies far back in what was read: `python -m benchmarks.book_questions`.

The book is read first and others behind it, once with memory and once with memory off. Each question is asked
of a copy of the State that this leaves. All answers are shown, whether they are right or not.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_jax import demo
from gemma_jax.benchmark.records import model_name, stamp
from gemma_jax.cache import keep_compiled_programs
from gemma_jax.checkpoint import store
from gemma_jax.checkpoint.files import write_file
from gemma_jax.checkpoint.memory_file import Memory, require_place
from gemma_jax.demo.command import show_progress
from gemma_jax.demo.table import RIGHT, WIDTH, WRONG
from gemma_jax.errors import InputError, UsageError
from gemma_jax.evaluate.haystack import as_bytes, reach
from gemma_jax.evaluate.running import without_memory
from gemma_jax.evaluate.statistics import Estimate, estimate
from gemma_jax.inference.console import ArgumentParser, Console, count, leave, run_command
from gemma_jax.inference.documents import read_text
from gemma_jax.inference.reader import generate, read
from gemma_jax.inference.remember import fork
from gemma_jax.tasks.haystacks import check, shipped
from gemma_jax.tasks.scoring import normal, one_of
from gemma_jax.text import Place, encode, encode_prompt, encode_stream

QUESTIONS = Path(__file__).parent / "questions" / "moby_dick.jsonl"
FORM = "\n\nQuestion: {}\nAnswer:"  # for a model that was not taught to converse
BETWEEN = "\n\n"  # two books
ANSWER_TOKENS = 24
PROBES, PROBE_WORDS = 8, 12  # by which a book is known again


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked, and the answers of which one is wanted."""

    question: str
    answers: tuple[str, ...]

    def is_right(self, answer: str) -> bool:
        """Whether an answer holds one of those wanted, as whole words, in capitals or not."""
        return re.search(one_of(map(normal, self.answers)), normal(answer)) is not None


@dataclasses.dataclass(frozen=True)
class Run:
    """What one model made of the text: its answers, and which of them are right."""

    answers: tuple[str, ...]
    right: tuple[bool, ...]

    @property
    def estimate(self) -> Estimate:
        """Of the share that is right; all questions are about one text."""
        return estimate((0, float(right)) for right in self.right)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = ArgumentParser(prog="python -m benchmarks.book_questions", description=__doc__)
    add = parser.add_argument
    add("--model", metavar="DIR", help="a checkpoint (default: the small one)")
    add("--adapter", metavar="DIR", help="what was trained for --model, alone")
    add("--book", metavar="FILE", help="what is asked about (default: Moby-Dick, of our books)")
    add("--behind", nargs="+", metavar="FILE", help="(default: our held-out books but for --book)")
    add("--tokens", type=count, default=count("1M"), metavar="N", help="in all (default: 1M)")
    add("--questions", type=Path, default=QUESTIONS, metavar="FILE", help="(default: on Moby-Dick)")
    add("--output", type=Path, metavar="FILE", help="writes everything to this JSON file")
    add("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(arguments)
    return run_command(lambda: compare(options), debug=options.debug)


def compare(options: argparse.Namespace) -> None:
    """Reads and asks, prints the answers, and writes them down where that is asked for."""
    if options.output:
        require_place(options.output)
    questions = read_questions(options.questions)
    held_out = shipped("held_out")
    book = options.book or next(file for file in held_out if QUESTIONS.stem in file)
    check([book, *(options.behind or ())])
    behind = options.behind or without(held_out, book)
    console, model = Console(debug=options.debug), load(options.model, options.adapter)
    ids, book_tokens = compose(model, book, behind, options.tokens)
    text = {
        "book": Path(book).name,
        "behind": [Path(file).name for file in behind],
        "tokens": len(ids),
        "book_tokens": book_tokens,
        "reach": reach(model.config),
        "text_sha256": hashlib.sha256(as_bytes(ids)).hexdigest(),
    }
    if len(ids) - book_tokens < text["reach"]:
        console.warning(
            f"only {len(ids) - book_tokens:,} tokens come behind the book, and local attention reaches"
            f" {text['reach']:,} back: it sees the book's end without memory."
        )
    runs = {
        name: ask_all(some, ids, questions, console, name)
        for name, some in (("with memory", model), ("memory off", without_memory(model)))
    }
    show(text, questions, runs)
    if options.output:
        record = {
            "model": model_name(model.config),
            "adapter": options.adapter,
            "rule": model.config.memory.rule,
            **text,
            **written_down(questions, runs),
            **stamp("benchmarks.book_questions"),
        }
        write_file(options.output, [json.dumps(record, indent=1, ensure_ascii=False).encode()])


def load(path: str | None, adapter: str | None) -> Any:
    """The model, with its adapter.

    Raises:
        UsageError: it has no memory, or there is an adapter for no model.
        InputError, CorruptError: there is none, or it is damaged.
    """
    if adapter and not path:
        raise UsageError("--adapter belongs to a checkpoint: name it with --model DIR.")
    directory = path or demo.checkpoint()
    if store.read_config(directory, adapter=adapter).memory.rule == "off":
        raise UsageError(
            f"{directory} has no memory (its rule is off): name a model that has one, or an --adapter."
        )
    keep_compiled_programs()
    return store.load(directory, adapter=adapter, dtype=None if path else demo.suitable_dtype())


def read_questions(path: Path) -> list[Question]:
    """The questions of a file, one a line: {"question": ..., "answers": [...]}.

    Raises:
        InputError: it cannot be read, has no questions, or has a line of another kind.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path} cannot be read ({reason}): name a file of questions.") from error
    found = [_question(path, i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(f"{path} has no questions: give it one a line.")
    return found


def _question(path: Path, number: int, line: str) -> Question:
    try:
        fields = json.loads(line)
        question, answers = fields["question"], fields["answers"]
        texts = [question, *answers]
        if not isinstance(answers, list) or not answers or not all(t.strip() for t in texts):
            raise ValueError("no text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f'{path}, line {number} is no question: write {{"question": "...", "answers": ["..."]}}.'
        ) from error
    return Question(question, tuple(answers))


def without(books: Sequence[str], book: str) -> list[str]:
    """Those of the books that do not hold this one.

    Raises:
        UsageError: none is left.
    """
    words = _words(book)
    starts = range(0, len(words) - PROBE_WORDS + 1, max(1, len(words) // PROBES))
    probes = [f" {' '.join(words[start : start + PROBE_WORDS])} " for start in starts]
    texts = {other: f" {' '.join(_words(other))} " for other in books}
    left = [other for other in books if not any(probe in texts[other] for probe in probes)]
    if not left:
        raise UsageError(f"All of our books are in {book}: name others with --behind.")
    return left


def _words(book: str) -> list[str]:
    return re.findall(r"\w+", "".join(read_text(book)).lower())


def compose(model: Any, book: str, behind: Sequence[str], tokens: int) -> tuple[np.ndarray, int]:
    """BOS, the book, and the others behind it, again and again: so many ids [tokens] int32, and how
    many of them are the book's, BOS included.

    Raises:
        UsageError: the book alone has more.
    """
    prompt = encode_prompt(model.tokenizer, read_text(book), bos_id=model.config.bos_id)
    ids = list(itertools.chain.from_iterable(prompt))
    if (book_tokens := len(ids)) > tokens:
        raise UsageError(
            f"--tokens {tokens} is fewer than {book} itself has: choose {book_tokens} or more, or a"
            " shorter --book."
        )

    def others() -> Iterator[Sequence[int]]:
        for file in itertools.cycle(behind):
            pieces = itertools.chain([BETWEEN], read_text(file))
            yield from encode_stream(model.tokenizer, pieces)

    some = others()
    while len(ids) < tokens:
        ids += next(some)
    return np.array(ids[:tokens], np.int32), book_tokens


def ask_all(
    model: Any, ids: np.ndarray, questions: Sequence[Question], console: Console, name: str
) -> Run:
    """Reads the text and asks all questions, each of a State that has read nothing else."""
    try:
        reading = read(
            model, [ids], share_read=lambda: 1.0, on_progress=show_progress(console, name)
        )
        memory, answers = Memory(reading.state, place=Place.TEXT), []
        for i, question in enumerate(questions):
            console.show(f"{name}: question {i + 1} of {len(questions)}", i, len(questions))
            answers.append(ask(model, memory, question.question))
    finally:
        console.end_progress()
    right = [q.is_right(answer) for q, answer in zip(questions, answers, strict=True)]
    return Run(tuple(answers), tuple(right))


def ask(model: Any, memory: Memory, question: str) -> str:
    """The greedy answer to a question, up to the end of its line; the memory is not consumed."""
    ids = encode(model.tokenizer, FORM.format(question))
    asked = dataclasses.replace(fork(memory), ids=tuple(ids))
    options = {"max_new_tokens": ANSWER_TOKENS, "temperature": 0, "stop": ["\n"]}
    return "".join(generate(model, None, memory=asked, **options)).strip()


def written_down(questions: Sequence[Question], runs: dict[str, Run]) -> dict[str, Any]:
    """Counts and answers, as they stand in the file."""
    names = {name: name.replace(" ", "_") for name in runs}
    return {
        "form": FORM,
        "counts": {
            names[name]: {"right": sum(run.right)} | dataclasses.asdict(run.estimate)
            for name, run in runs.items()
        },
        "questions": [
            dataclasses.asdict(question)
            | {
                names[name]: {"answer": run.answers[i], "right": run.right[i]}
                for name, run in runs.items()
            }
            for i, question in enumerate(questions)
        ],
    }


def show(text: dict[str, Any], questions: Sequence[Question], runs: dict[str, Run]) -> None:
    """Prints what was read, and a table of questions and answers."""
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("question", "expected", *runs):
        table.add_column(heading)
    for i, question in enumerate(questions):
        cells = [
            Text(
                f"{RIGHT if run.right[i] else WRONG} {run.answers[i] or '(nothing)'}",
                style="green" if run.right[i] else "red",
            )
            for run in runs.values()
        ]
        table.add_row(Text(question.question), Text(question.answers[0]), *cells)
    table.add_row()
    table.add_row("right", "", *(f"{sum(r.right)} of {len(r.right)}" for r in runs.values()))
    intervals = [f"{e.low:.3f} to {e.high:.3f}" for e in (r.estimate for r in runs.values())]
    table.add_row("95 % interval", "", *intervals)
    width = None if sys.stdout.isatty() else WIDTH
    console = RichConsole(file=sys.stdout, highlight=False, width=width)
    with console.capture() as capture:
        console.print(
            f"{text['book']}: {text['book_tokens']:,} tokens, and behind them"
            f" {text['tokens'] - text['book_tokens']:,} of {', '.join(text['behind'])}. Local attention"
            f" reaches {text['reach']:,} tokens back.\n",
            markup=False,
        )
        console.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


if __name__ == "__main__":
    leave(main())
