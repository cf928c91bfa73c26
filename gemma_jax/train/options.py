"""The command line of training, and recipes: files that hold options."""

import argparse
import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_jax.config import DTYPES, LOCAL_ATTENTION_FORMS, PRESETS
from gemma_jax.errors import InputError
from gemma_jax.inference.console import ArgumentParser, count, number
from gemma_jax.tasks.forms import FORMS
from gemma_jax.train.plan import SCHEDULES

RECIPES = Path(__file__).parent / "recipes"
KINDS = ("text", "jsonl", "task")
_NUMBERS = re.compile(r"[-+\d.:e]+", re.IGNORECASE)  # behind `=`; anything else is a file's name
PER_RUN = (  # options that do not change what is learnt
    "recipe",
    "output",
    "run_dir",
    "resume",
    "overwrite",
    "stop_after",
    "keep",
    "checkpoint_minutes",
    "checkpoint_steps",
    "log_steps",
    "probe_steps",
    "probe_lengths",
    "probe_questions",
    "data_workers",
    "adapter_dtype",
    "quiet",
    "debug",
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of a recipe, where one is named, and of the command line, which has the last word.

    Raises:
        InputError: the recipe cannot be read.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    recipe = first.parse_known_args(arguments)[0].recipe
    parser = make_parser()
    if arguments is None:
        import sys

        arguments = sys.argv[1:]
    return parser.parse_args([*(read_recipe(find_recipe(recipe)) if recipe else []), *arguments])


def find_recipe(name: str) -> Path:
    """The file of that name, or else the recipe that comes with the package."""
    shipped = RECIPES / f"{name}.toml"
    return shipped if shipped.is_file() and not Path(name).exists() else Path(name)


def read_recipe(path: Path) -> list[str]:
    """The options of a TOML or JSON file, as the command line has them.

    Names are those of the options, `learning-rate` or `learning_rate`; `true` stands for an option
    without a value, a list for one with several. A `config` that stands beside the recipe is found.

    Raises:
        InputError: the file is missing, or says something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        if not isinstance(content, dict):
            raise ValueError("it holds no options")
    except (OSError, ValueError) as error:
        raise InputError(
            f"The recipe {path} cannot be read ({error}): correct the file."
        ) from error
    found: list[str] = []
    for name, value in content.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, dict):
            raise InputError(f"The recipe {path} has a table, {name}: options stand alone.")
        if value is False:
            continue
        if name == "config" and not Path(value).exists() and (path.parent / value).is_file():
            value = path.parent / value
        values = value if isinstance(value, list) else [] if value is True else [value]
        if option == "--recipe":
            raise InputError(
                f"The recipe {path} names another recipe: put all options into one file."
            )
        found += [option, *map(str, values)] if len(values) != 1 else [f"{option}={values[0]}"]
    return found


def source(text: str) -> tuple[str, str, tuple[float, float]]:
    """`KIND:WHAT=WEIGHT`, where a weight is as `ramp` has it; it is 1 where none is given."""
    kind, colon, rest = text.partition(":")
    if not colon or kind not in KINDS or not rest:
        raise argparse.ArgumentTypeError(
            f"{text!r} names no data: write text:FILE, jsonl:FILE or task:NAME, with =WEIGHT behind it"
        )
    what, equals, weight = rest.rpartition("=")
    if not equals or not _NUMBERS.fullmatch(weight):
        return kind, rest, (1.0, 1.0)
    if not what:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing before its weight")
    return kind, what, ramp(weight)


def ramp(text: str) -> tuple[float, float]:
    """`A:B`, a number for the shortest and one for the longest sequences, or one for both."""
    found = _pair(text)
    if not all(0 < value < float("inf") for value in found):
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return found


def ramp_or_none(text: str) -> tuple[float, float]:
    """The same, or 0 for both."""
    return found if (found := _pair(text)) == (0.0, 0.0) else ramp(text)


def _pair(text: str) -> tuple[float, float]:
    first, _, last = text.partition(":")
    try:
        return float(first), float(last or first)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, nor A:B") from None


def segments(text: str) -> tuple[int, int]:
    """`LOW:HIGH`, or one number for both."""
    low, _, high = text.partition(":")
    try:
        found = int(low), int(high or low)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not LOW:HIGH") from None
    if not 1 <= found[0] <= found[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is out of order: write LOW:HIGH, from 1 on")
    return found


def make_parser() -> ArgumentParser:
    """The options, in groups."""
    whole, real = number(int), number(float)
    positive = real(0, float("inf"), above=True)
    parser = ArgumentParser(
        prog="python -m gemma_jax.train",
        description="Teaches a model, or its memory alone, to recall what it read long ago.",
        epilog="docs/training.md explains all of it.",
    )

    def add(group: Any, name: str, default: Any = None, **options: Any) -> None:
        if default is not None:
            shown = default
            if isinstance(default, tuple):  # A:B, where these differ
                shown = ":".join(str(value) for value in dict.fromkeys(default))
            options["help"] = f"{options.get('help', '')} (default: {shown})".strip()
        group.add_argument(name, default=default, **options)

    group = parser.add_argument_group("what is trained")
    add(
        group,
        "--recipe",
        metavar="FILE",
        help="options in TOML or JSON, or the name of a shipped one; the command line goes first",
    )
    which = group.add_mutually_exclusive_group()
    add(which, "--model", metavar="DIR", help="a checkpoint to start from")
    which.add_argument("--preset", choices=tuple(PRESETS), help="a published shape, from scratch")
    add(which, "--config", metavar="FILE", help="a GemmaConfig in JSON, from scratch")
    add(
        group,
        "--tokenizer",
        metavar="DIR",
        help="of a model from scratch; new:SIZE learns one from the texts",
    )
    group.add_argument(
        "--train",
        choices=("memory", "lora", "all"),
        help="the memory's parameters, low-rank updates too, or everything (from scratch)",
    )
    add(group, "--rank", 8, metavar="R", type=whole(1), help="of the low-rank updates")
    add(
        group,
        "--update-scale",
        1.0,
        metavar="F",
        type=positive,
        help="what training changed (with lora the low-rank updates alone) is written times this: below 1"
        " more of the model stays as it was",
    )
    add(
        group,
        "--memory",
        metavar="RULE",
        help="the memory rule (default: recorded, or selective_delta)",
    )
    add(group, "--segment-length", metavar="S", type=whole(1), help="tokens per segment")
    group.add_argument("--local-attention", choices=LOCAL_ATTENTION_FORMS)
    group.add_argument("--write-gate", choices=("hard_sigmoid", "sigmoid"))
    add(group, "--slots", metavar="N", type=whole(1), help="tokens a KV head keeps, of rule slots")
    add(
        group,
        "--neighbours",
        metavar="N",
        type=whole(0),
        help="on each side of a token with a high score, kept for its sake (default: recorded, or 4)",
    )
    group.add_argument("--dtype", choices=DTYPES, help="of activations, and of what is not trained")

    group = parser.add_argument_group("what it learns from")
    group.add_argument(
        "--data",
        metavar="SOURCE",
        nargs="+",
        type=source,
        help="text:FILE,..., jsonl:FILE or task:NAME, each with =WEIGHT (or =A:B, as --density has it);"
        " FILE may have * in it",
    )
    add(
        group,
        "--filler",
        metavar="FILE",
        nargs="+",
        help="hides the tasks' facts (default: the texts)",
    )
    add(
        group,
        "--language-weight",
        (0.1, 0.1),
        metavar="W",
        type=ramp_or_none,
        help="of tokens of no answer: 0, or as --density has it",
    )
    add(
        group,
        "--density",
        (1.0, 1.0),
        metavar="Q",
        type=ramp,
        help="questions in 1,000 tokens; A:B in the shortest and in the longest sequences",
    )
    group.add_argument(
        "--forms",
        nargs="+",
        choices=FORMS,
        default=["train"],
        help="wordings of the tasks (default: train)",
    )
    add(
        group,
        "--loose",
        0.0,
        metavar="P",
        type=real(0, 1),
        help="share of the passkeys and needles that are worded more freely than any form",
    )
    add(
        group,
        "--packed",
        (0.0, 0.0),
        metavar="P",
        type=ramp_or_none,
        help="share of the tasks' sequences that are full of facts and questions: 0, or as --density has it",
    )
    add(
        group,
        "--more-questions",
        0,
        metavar="N",
        type=whole(0),
        help="up to so many about each of BABILong's stories, besides the one it is told for",
    )
    add(
        group,
        "--noise",
        0.0,
        metavar="P",
        type=real(0, 1),
        help="share of the sequences whose text is strange: full of signs, numbers, random tokens",
    )
    add(
        group,
        "--noise-text",
        metavar="FILE",
        nargs="+",
        help="some of the strange texts are stretches of these; python: its standard library's sources",
    )
    add(group, "--segments", (4, 32), metavar="LOW:HIGH", type=segments, help="of a sequence")
    add(
        group,
        "--growth",
        0.6,
        metavar="P",
        type=real(0, 1),
        help="of the budget until all are HIGH",
    )
    add(group, "--short-share", 0.3, metavar="P", type=real(0, 1), help="of batches of any length")
    add(
        group,
        "--carry",
        0.2,
        metavar="P",
        type=real(0, 1),
        help="of texts begun with a used memory",
    )
    add(group, "--tokens-per-step", 65_536, metavar="N", type=count, help="read in a step")
    add(group, "--seed", 0, metavar="S", type=whole(0, 2**32 - 1), help="of all that is random")

    group = parser.add_argument_group("how it learns")
    add(group, "--steps", metavar="N", type=count, help="the budget")
    add(group, "--minutes", metavar="M", type=positive, help="the budget, in time")
    add(group, "--learning-rate", 1e-3, metavar="R", type=positive)
    add(
        group,
        "--memory-learning-rate",
        metavar="R",
        type=positive,
        help="of the memory's parameters",
    )
    add(group, "--warmup", 50, metavar="N", type=whole(0), help="steps until they are reached")
    add(
        group,
        "--schedule",
        "cosine",
        choices=SCHEDULES,
        help="of their fall",
    )
    add(group, "--final-rate", 0.1, metavar="P", type=real(0, 1), help="share of them at the end")
    add(group, "--weight-decay", 0.0, metavar="D", type=real(0), help="of matrices, not of memory")
    add(
        group,
        "--write-penalty",
        0.0,
        metavar="P",
        type=real(0),
        help="times the logarithm of how many tokens are written, rising to P from --growth on",
    )
    add(
        group,
        "--write-margin",
        0.0,
        metavar="M",
        type=real(0),
        help="write gates' logits are raised by up to M, likewise: so closed gates stay closed",
    )
    add(
        group,
        "--write-loss",
        0.0,
        metavar="P",
        type=real(0),
        help="weight of the loss that teaches scores to keep tasks' facts, and nothing else",
    )
    add(group, "--clip-norm", 1.0, metavar="N", type=positive, help="of the gradient")
    add(group, "--b1", 0.9, metavar="B", type=real(0, 1), help="of AdamW")
    add(group, "--b2", 0.95, metavar="B", type=real(0, 1), help="of AdamW")
    add(group, "--moment-dtype", choices=DTYPES, help="of AdamW's first moment")
    add(
        group,
        "--accumulate",
        1,
        metavar="N",
        type=whole(1),
        help="parts of a step, one after another",
    )
    add(
        group,
        "--chunk-tokens",
        metavar="N",
        type=count,
        help="of a sequence at once (default: all)",
    )
    add(group, "--remat", "layers", choices=("layers", "steps", "nothing"), help="computed twice")
    group.add_argument(
        "--deterministic", action="store_true", help="on a GPU too: the same numbers every time"
    )

    group = parser.add_argument_group("the run")
    add(group, "--output", metavar="DIR", help="the checkpoint or adapter to write")
    add(group, "--run-dir", metavar="DIR", help="log, checkpoints, ids (default: OUTPUT.training)")
    group.add_argument(
        "--resume", action="store_true", help="go on where the run was ended or killed"
    )
    group.add_argument(
        "--overwrite", action="store_true", help="begin again, replace what is there"
    )
    add(group, "--stop-after", metavar="M", type=positive, help="minutes; to be resumed")
    add(group, "--checkpoint-minutes", 10.0, metavar="M", type=positive)
    add(group, "--checkpoint-steps", metavar="N", type=whole(1))
    add(group, "--keep", 2, metavar="K", type=whole(1), help="checkpoints")
    add(group, "--log-steps", 10, metavar="N", type=whole(1), help="of a row of the log")
    add(
        group,
        "--probe-steps",
        0,
        metavar="N",
        type=whole(0),
        help="between probes; 0: at the end only",
    )
    add(group, "--probe-lengths", metavar="N", nargs="+", type=count, help="in tokens, e.g. 2K 64K")
    add(group, "--probe-questions", 32, metavar="N", type=whole(1), help="at each length")
    add(group, "--data-workers", metavar="N", type=whole(0), help="processes (default: by cores)")
    group.add_argument("--adapter-dtype", choices=DTYPES, default="float32", help="on disk")
    group.add_argument("--quiet", action="store_true", help="only warnings and errors")
    group.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser
