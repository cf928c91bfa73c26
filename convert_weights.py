#!/usr/bin/env python3
"""Converts Hugging Face weights once: `python convert_weights.py SOURCE DEST`.

SOURCE is a directory or the id of a model on the hub; DEST is the checkpoint for `run.py --model`.
"""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = parse(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from gemma_jax.inference.console import run_command

    return run_command(lambda: convert(options), debug=options.debug)


def convert(options: argparse.Namespace) -> None:
    """Converts in the direction that was asked for, and says what came of it."""
    from gemma_jax.checkpoint import convert as conversion
    from gemma_jax.inference.console import Console
    from gemma_jax.inference.notices import converted

    console = Console()
    with progress_bar("writing") as show:
        if options.to_hf:
            done = conversion.to_huggingface(
                options.source,
                options.dest,
                dtype=options.dtype,
                overwrite=options.overwrite,
                on_progress=show,
            )
        else:
            done = conversion.convert(
                options.source,
                options.dest,
                dtype=options.dtype or "bfloat16",
                quantize=options.quantize,
                revision=options.revision,
                overwrite=options.overwrite,
                verify=options.verify,
                on_progress=show,
            )
    for line in converted(done, options.dest):
        console.line(line)


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows parameters done of all, in a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    terminal = Console(stderr=True)
    with Progress(console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    from gemma_jax.inference.console import ArgumentParser

    parser = ArgumentParser(
        prog="convert_weights.py",
        description="Converts Gemma's Hugging Face weights into a checkpoint, or back.",
    )
    parser.add_argument("source", metavar="SOURCE", help="a directory, or a hub id (owner/name)")
    parser.add_argument("dest", metavar="DEST", help="the directory to write")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of weights and activations (default: bfloat16; with --to-hf, the checkpoint's)",
    )
    parser.add_argument(
        "--quantize",
        choices=("int8",),
        help="keep matrices in int8, with a scale per output: half of bfloat16's memory",
    )
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit on the hub")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare logits with Hugging Face transformers (needs torch)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is at DEST")
    parser.add_argument(
        "--to-hf",
        action="store_true",
        help="SOURCE is a checkpoint; write a Hugging Face directory",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(arguments)
    if options.to_hf and (options.verify or options.revision or options.quantize):
        parser.error("--verify, --revision and --quantize do not go with --to-hf")
    return options


if __name__ == "__main__":
    from gemma_jax.inference.console import leave

    leave(main())
