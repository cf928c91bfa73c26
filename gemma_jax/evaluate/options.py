"""The options of the command line."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from gemma_jax.config import DTYPES, LOCAL_ATTENTION_FORMS, PRESETS
from gemma_jax.evaluate.plan import SHARED, SHARED_FROM
from gemma_jax.inference.console import ArgumentParser, count, number

DEPTHS = "0,25,50,75,100"
PEER_UP_TO = "128K"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    from gemma_jax import tasks
    from gemma_jax.tasks.forms import FORMS
    from gemma_jax.tasks.words import KEYS

    whole = number(int)
    parser = ArgumentParser(
        prog="python -m gemma_jax.evaluate",
        description="Asks what a model remembers of long texts, by length and depth.",
        epilog="With --text FILE instead of --task: perplexity by position (--text FILE --help).",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="DIR", help="a checkpoint")
    which.add_argument(
        "--preset", choices=tuple(PRESETS), help="random weights of this shape: time and memory"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="of --preset (default: a tiny one)")
    what = parser.add_argument_group("what is asked")
    what.add_argument(
        "--task",
        metavar="A,B",
        required=True,
        type=names(tasks.names()),
        help="of: " + ", ".join(tasks.names()),
    )
    what.add_argument(
        "--lengths", metavar="L,...", type=several(count), default="4K", help="e.g. 4K,128K,10M"
    )
    what.add_argument(
        "--depths",
        metavar="D,...",
        type=several(number(float)(0, 100)),
        default=DEPTHS,
        help="of facts, in percent (default: %(default)s)",
    )
    what.add_argument(
        "--trials", metavar="N", type=whole(1), default=20, help="per cell (default: 20)"
    )
    what.add_argument(
        "--shared",
        nargs="?",
        choices=SHARED,
        default="auto",
        const="always",
        help=f"read a haystack once for many questions (auto: from {SHARED_FROM:,} tokens on)",
    )
    what.add_argument(
        "--questions",
        metavar="N",
        type=whole(1),
        help="per cell where haystacks are shared (default: --trials)",
    )
    what.add_argument(
        "--haystacks",
        metavar="N",
        type=whole(1),
        default=1,
        help="shared ones per task and length (default: 1)",
    )
    what.add_argument("--seed", metavar="S", type=whole(0), default=0)
    what.add_argument(
        "--filler",
        choices=("grass", "books", "needles"),
        help="what facts are hidden in (default: the task's own)",
    )
    what.add_argument(
        "--haystack", metavar="FILE", nargs="+", help="the books (default: those held out)"
    )
    what.add_argument("--forms", choices=FORMS, default="classic", help="(default: classic)")
    what.add_argument(
        "--keys",
        choices=KEYS,
        default="held_out",
        help="names: those that training has, or like them, others (default: held_out), or all",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--adapter", metavar="DIR", help="what was trained for --model, alone")
    how.add_argument("--memory", metavar="RULE", help="a rule other than the recorded one")
    how.add_argument("--segment-length", metavar="S", type=whole(1))
    how.add_argument("--local-attention", choices=LOCAL_ATTENTION_FORMS)
    how.add_argument("--dtype", choices=DTYPES, help="(default: as recorded)")
    how.add_argument(
        "--batch-size", metavar="B", type=whole(1), default=16, help="rows (default: 16)"
    )
    how.add_argument("--baseline", action="store_true", help="the same with memory off beside it")
    how.add_argument(
        "--peer", choices=("hf",), help="the same with transformers, full attention (needs torch)"
    )
    how.add_argument("--peer-model", metavar="HF_DIR")
    how.add_argument(
        "--peer-up-to",
        metavar="L",
        type=count,
        default=PEER_UP_TO,
        help="longer texts are not given to it (default: %(default)s)",
    )
    where = parser.add_argument_group("where the answers go")
    where.add_argument("--output", metavar="DIR", default="evaluation")
    where.add_argument(
        "--resume", action="store_true", help="only if --output holds an interrupted run"
    )
    where.add_argument("--record", metavar="FILE", help="adds records to this JSON file")
    where.add_argument("--quiet", action="store_true", help="no progress")
    where.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(arguments)


def several(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """An argument type: values separated by commas, in order and each once."""

    def convert(text: str) -> tuple[Any, ...]:
        try:
            return tuple(sorted({kind(part.strip()) for part in text.split(",")}))
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers") from None

    return convert


def names(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """An argument type: names of tasks separated by commas."""

    def convert(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(
                f"there is no task {unknown[0]!r}: choose of {', '.join(known)}"
            )
        return found

    return convert
