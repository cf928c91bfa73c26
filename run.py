#!/usr/bin/env python3
"""Asks a Gemma model about a text of any length: `python run.py --context book.txt --prompt "Who is
Ishmael?"`.

Standard output carries the answer only; everything else goes to standard error.
"""

import argparse
import json
import os
from collections.abc import Sequence
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = parse(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # only its tokenizers are used here
    from gemma_jax.inference.console import run_command

    return run_command(lambda: answer(options), debug=options.debug)


def answer(options: argparse.Namespace) -> None:
    """Reads the text, prints the answer, and says on standard error what is going on."""
    from gemma_jax.inference import notices
    from gemma_jax.inference.console import Console
    from gemma_jax.inference.documents import Documents

    console = Console(quiet=options.quiet)
    documents = Documents(options.context, options.prompt, errors=options.encoding_errors)
    model = load(options, console)

    from gemma_jax.inference.reader import generate

    def show(progress: Any) -> None:
        console.progress(progress)
        console.warning(notices.forgotten(model.config, progress.tokens))

    answer = generate(
        model,
        documents,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        seed=options.seed,
        stop=options.stop,
        template=options.template,
        on_progress=show,
    )
    try:
        for piece in answer:
            console.end_progress()
            if not options.json:
                print(piece, end="", flush=True)
    finally:
        console.end_progress()
    report = answer.report()
    print(json.dumps(report, ensure_ascii=False) if options.json else "", flush=True)
    console.warning(notices.replaced(documents.replaced))
    console.line(notices.summary(report, answer.given_tokens))


def load(options: argparse.Namespace, console: Any) -> Any:
    """Loads the model, and says before what that will take."""
    from gemma_jax import cache, demo
    from gemma_jax.checkpoint import store
    from gemma_jax.inference import notices

    cache.keep_compiled_programs()
    if options.model is None:
        console.warning(notices.RANDOM_MODEL)
    path = options.model or demo.checkpoint()
    recorded = store.read_config(path, memory=options.memory, adapter=options.adapter)
    changes = {"rule": options.memory, "segment_length": options.segment_length}
    config = recorded.with_memory(
        **{name: value for name, value in changes.items() if value is not None}
    )
    console.line(notices.memory_needed(config))
    console.warning(notices.untrained(recorded, options.memory))
    return store.load(
        path,
        memory=options.memory,
        segment_length=options.segment_length,
        verify=not options.no_verify,
        adapter=options.adapter,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line; what is out of range ends the program with exit code 2."""
    from gemma_jax.inference.console import ArgumentParser, number

    parser = ArgumentParser(
        prog="run.py",
        description="Reads a text of any length in constant memory, and continues or answers it.",
        epilog="What is read is the files, then the prompt, joined by newlines.",
    )
    whole, real = number(int), number(float)
    group = parser.add_argument_group("what is read")
    group.add_argument(
        "--model", metavar="DIR", help="a checkpoint of convert_weights.py (default: a random one)"
    )
    group.add_argument(
        "--context",
        metavar="FILE",
        action="append",
        default=[],
        help="read before the prompt; '-': stdin",
    )
    group.add_argument("--prompt", metavar="TEXT", help="read last; '-': from standard input")
    group.add_argument(
        "--template", action="store_true", help="make it one user turn of the chat template"
    )
    group.add_argument(
        "--encoding-errors", choices=("strict", "replace"), default="strict", help="bytes not UTF-8"
    )

    group = parser.add_argument_group("what is written")
    group.add_argument(
        "--max-new-tokens", metavar="N", type=whole(0), default=256, help="default: 256"
    )
    group.add_argument(
        "--temperature",
        metavar="T",
        type=real(0),
        help="0 is greedy (default; 1 with --top-k/-p, --min-p)",
    )
    group.add_argument(
        "--top-k", metavar="K", type=whole(1), help="sample among the K likeliest tokens"
    )
    group.add_argument(
        "--top-p",
        metavar="P",
        type=real(0, 1, above=True),
        help="sample among the likeliest with share P",
    )
    group.add_argument(
        "--min-p",
        metavar="P",
        type=real(0, 1),
        help="sample among those P times as likely as the first",
    )
    group.add_argument(
        "--seed",
        metavar="S",
        type=whole(0, 2**32 - 1),
        default=0,
        help="of the sampling (default: 0)",
    )
    group.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        type=some_text,
        help="ends the answer",
    )

    group = parser.add_argument_group("how the model remembers")
    group.add_argument(
        "--memory", metavar="RULE", help="off, linear, delta, gated_delta, or FILE.py:CLASS"
    )
    group.add_argument("--segment-length", metavar="S", type=whole(1), help="tokens per segment")
    group.add_argument(
        "--adapter", metavar="DIR", help="what `python -m gemma_jax.train` taught this --model"
    )

    group = parser.add_argument_group("what is said about it")
    group.add_argument(
        "--no-verify", action="store_true", help="do not check the checkpoint's hashes"
    )
    group.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    group.add_argument(
        "--quiet", action="store_true", help="only warnings and errors on standard error"
    )
    group.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(arguments)
    if not options.context and options.prompt is None:
        parser.error("there is nothing to read: give --prompt TEXT, --context FILE, or both")
    return options


def some_text(text: str) -> str:
    """The argument type of stop texts."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: give at least one character")
    return text


if __name__ == "__main__":
    from gemma_jax.inference.console import leave

    leave(main())
