"""The options of `run.py`."""

import argparse
from collections.abc import Sequence

from gemma_jax.inference.console import ArgumentParser, number

WHOLE, REAL = number(int), number(float)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line; what is out of range ends the program with exit code 2."""
    parser = ArgumentParser(
        prog="run.py",
        description="Reads a text of any length in constant memory, and continues or answers it.",
        epilog="What is read is the files, then the prompt, joined by newlines.",
    )
    _reading(parser.add_argument_group("what is read"))
    _writing(parser.add_argument_group("what is written"))
    _remembering(parser.add_argument_group("how the model remembers"))
    _keeping(parser.add_argument_group("what is kept of it"))
    _saying(parser.add_argument_group("what is said about it"))
    options = parser.parse_args(arguments)
    if problem := _conflict(options):
        parser.error(problem)
    return options


def _reading(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        metavar="DIR",
        help="a checkpoint of convert_weights.py (default: the small one of gemma_jax)",
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
    group.add_argument("--chat", action="store_true", help="a conversation in the terminal")
    group.add_argument(
        "--prompts",
        metavar="FILE",
        help="many prompts, a JSON string or object a line; '-': from standard input",
    )
    group.add_argument(
        "--encoding-errors", choices=("strict", "replace"), default="strict", help="bytes not UTF-8"
    )


def _writing(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-new-tokens", metavar="N", type=WHOLE(0), default=256, help="default: 256"
    )
    group.add_argument(
        "--temperature",
        metavar="T",
        type=REAL(0),
        help="0 is greedy (default; 1 with --top-k/-p, --min-p)",
    )
    group.add_argument(
        "--top-k", metavar="K", type=WHOLE(1), help="sample among the K likeliest tokens"
    )
    group.add_argument(
        "--top-p",
        metavar="P",
        type=REAL(0, 1, above=True),
        help="sample among the likeliest with share P",
    )
    group.add_argument(
        "--min-p",
        metavar="P",
        type=REAL(0, 1),
        help="sample among those P times as likely as the first",
    )
    group.add_argument(
        "--seed",
        metavar="S",
        type=WHOLE(0, 2**32 - 1),
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


def _remembering(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--memory",
        metavar="RULE",
        help="off, linear, delta, gated_delta, selective_delta, slots, or FILE.py:CLASS",
    )
    group.add_argument("--segment-length", metavar="S", type=WHOLE(1), help="tokens per segment")
    group.add_argument(
        "--adapter", metavar="DIR", help="what `python -m gemma_jax.train` taught this --model"
    )


def _keeping(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--save-memory", metavar="FILE", help="keep what was read, to be asked again"
    )
    group.add_argument(
        "--load-memory", metavar="FILE", help="what was read before; what is given now follows it"
    )
    group.add_argument(
        "--autosave",
        metavar="SECONDS",
        type=REAL(0, above=True),
        help="save a long reading so often (default with --save-memory: 300)",
    )
    group.add_argument(
        "--resume", metavar="FILE", help="go on with a reading that was interrupted, same files"
    )


def _saying(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--no-verify", action="store_true", help="do not check the hashes of what is loaded"
    )
    group.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    group.add_argument(
        "--quiet", action="store_true", help="only warnings and errors on standard error"
    )
    group.add_argument("--debug", action="store_true", help="show tracebacks")


def _conflict(options: argparse.Namespace) -> str | None:
    """What is wrong with the options taken together."""
    asked = [
        name
        for name, given in (
            ("--prompt", options.prompt is not None),
            ("--prompts", options.prompts is not None),
            ("--chat", options.chat),
        )
        if given
    ]
    if len(asked) > 1:
        return f"{' and '.join(asked)} do not go together: choose one"
    if options.chat and (options.json or options.template or "-" in options.context):
        return "--chat does not go with --json, --template or --context -"
    if options.prompts == "-" and "-" in options.context:
        return "standard input ('-') is named more than once: it can be read only once"
    if options.resume is not None and options.load_memory is not None:
        return "--resume holds the memory that was loaded: leave --load-memory out"
    if options.resume is not None and not options.context and options.prompt is None:
        return "--resume needs the same --context and --prompt again, of which it reads the rest"
    if (options.chat or options.prompts) and not options.context:
        if options.save_memory or options.autosave:
            return "--save-memory and --autosave keep what --context reads: name one"
        return None
    if not (options.context or asked or options.load_memory):
        return "there is nothing to read: give --prompt TEXT, --context FILE, or both"
    return None


def some_text(text: str) -> str:
    """The argument type of stop texts."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: give at least one character")
    return text
