"""`python -m gemma_jax.tasks TASK --length 4K`: the text of an episode, and what is asked about it.

Without `--model` a token is a word with the space before it.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence

from gemma_jax import tasks
from gemma_jax.inference.console import ArgumentParser, count, leave, number, run_command
from gemma_jax.tasks import haystacks
from gemma_jax.tasks.base import Composition, EncodeBatch
from gemma_jax.tasks.forms import FORMS
from gemma_jax.tasks.words import KEYS

Decode = Callable[[list[int]], str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = parse(arguments)
    return run_command(lambda: show(options), debug=options.debug)


def show(options: argparse.Namespace) -> None:
    """Prints the text; on standard error the questions, their answers, and how much was repeated."""
    task = tasks.make(
        options.task, forms=options.forms, keys=options.keys, haystack=options.haystack
    )
    depths = [depth / 100 for depth in options.depths]
    episode = task.episode(options.seed, depths, options.questions)
    books = options.books or haystacks.shipped(options.split)
    haystacks.check(books)
    encode, decode = _tokenizer(options.model)
    text = Composition(episode, task.filler(episode, books), options.length, encode)
    for ids in text:
        sys.stdout.write(decode(ids))
    sys.stdout.write("\n")
    for question in episode.questions:
        last = max(text.ends[fact] for fact in question.facts)
        print(
            f"[depth {question.depth:.0%}, the last fact ends at token {last}]{question.text}"
            f"\n=> {', '.join(question.answers)}\n",
            file=sys.stderr,
        )
    print(
        f"{text.tokens} tokens, {text.repeated_tokens / max(text.tokens, 1):.1%} repeated;"
        f" chance {task.chance:.3g}",
        file=sys.stderr,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line as options; what is wrong with it ends the process with exit code 2."""
    parser = ArgumentParser(
        prog="python -m gemma_jax.tasks", description="Shows the text and questions of a task."
    )
    parser.add_argument("task", help=", ".join(tasks.names()))
    parser.add_argument("--length", type=count, default=1000, metavar="N", help="4000, 4K, 1M")
    parser.add_argument("--model", metavar="DIR", help="whose tokenizer counts the tokens")
    depth = number(float)(0, 100)
    parser.add_argument("--depths", type=depth, nargs="+", default=[50.0], metavar="PERCENT")
    parser.add_argument("--questions", type=number(int)(1), default=1, help="per depth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forms", choices=FORMS, default="classic")
    parser.add_argument("--keys", choices=KEYS, default="held_out")
    parser.add_argument("--haystack", help="grass, books or needles; default: the task's own")
    parser.add_argument("--split", choices=haystacks.SPLITS, default="held_out", help="of books")
    parser.add_argument("--books", nargs="+", metavar="FILE", help="text files of your own")
    parser.add_argument("--debug", action="store_true", help="tracebacks of errors")
    return parser.parse_args(arguments)


def _tokenizer(model: str | None) -> tuple[EncodeBatch, Decode]:
    if model is None:
        return _words()
    from gemma_jax.text import encode_batch, load_tokenizer

    tokenizer = load_tokenizer(model)
    return lambda texts: encode_batch(tokenizer, texts), tokenizer.decode


def _words() -> tuple[EncodeBatch, Decode]:
    ids: dict[str, int] = {}
    words: list[str] = []

    def identify(word: str) -> int:
        if word not in ids:
            ids[word] = len(words)
            words.append(word)
        return ids[word]

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [[identify(word) for word in re.findall(r"\s*\S+|\s+$", text)] for text in texts]

    return encode, lambda some: "".join(words[index] for index in some)


if __name__ == "__main__":
    leave(main())
