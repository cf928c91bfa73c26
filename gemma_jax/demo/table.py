"""What was planted, asked and answered, as a table for people."""

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_jax.demo.planting import Planted
from gemma_jax.demo.running import Run
from gemma_jax.evaluate.haystack import Asked, Text
from gemma_jax.inference.console import size

WIDTH = 120  # where standard output is no terminal
ANSWER_CHARACTERS = 12  # shown of an answer
RIGHT, WRONG = "✓", "✗"


def show(planted: Planted, runs: Mapping[str, Run], *, seed: int) -> None:
    """Prints the table; `runs` are its last columns."""
    from rich.console import Console

    text = next(iter(runs.values())).text
    width = None if sys.stdout.isatty() else WIDTH
    console = Console(file=sys.stdout, highlight=False, width=width)
    with console.capture() as capture:
        console.print(_plain(_heading(planted, text, seed)), "")
        console.print(_table(planted, runs, [text.trial(a)["distance"] for a in planted.asked]))
        console.print(
            f"\nLocal attention reaches {planted.reach:,} tokens back: what stands before is known from"
            f" memory, or not at all. Other texts, facts and questions: --seed {seed + 1}."
        )
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _table(planted: Planted, runs: Mapping[str, Run], distances: Sequence[int]) -> Any:
    """Questions in the order of the text, and the totals."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("tokens back", justify="right", no_wrap=True)
    table.add_column("planted, and asked")
    for name in runs:
        table.add_column(name, no_wrap=True)
    for index in sorted(range(len(distances)), key=lambda index: -distances[index]):
        asked = planted.asked[index]
        table.add_row(f"{distances[index]:,}", _plain(" ... ".join(planted.facts(asked))))
        cells = [_answer(run.answers[index], run.scores[index]) for run in runs.values()]
        table.add_row("", _plain(_question(asked)), *cells)
        table.add_row()
    for name, cells in _totals(runs).items():
        table.add_row("", name, *cells)
    return table


def _heading(planted: Planted, text: Text, seed: int) -> str:
    repeated = text.trial(planted.asked[0])["repeated_share"]
    how = f"{repeated:.0%} of it repeated" if repeated else "none of it repeated"
    return (
        f"{text.tokens:,} tokens from the books held out of training (Moby-Dick, Shakespeare), {how}, with"
        f" facts in between (seed {seed}). Questions about them: {len(planted.asked)}; facts that none of"
        f" these needs: {planted.others}."
    )


def _totals(runs: Mapping[str, Run]) -> dict[str, list[str]]:
    all_runs = runs.values()
    return {
        "right": [f"{sum(run.scores):g} of {len(run.scores)}" for run in all_runs],
        "tokens read": [f"{run.text.tokens:,}" for run in all_runs],
        "seconds": [f"{run.seconds:.1f}" for run in all_runs],
        "size of the State": [size(run.state_bytes) for run in all_runs],
    }


def _question(asked: Asked) -> str:
    """As it is asked, without the words that lead to the answer."""
    text = asked.question.text.strip()
    return text[: text.index("?") + 1] if "?" in text else text


def _answer(answer: str, score: float) -> Any:
    """What the model wrote, up to the end of its first sentence."""
    from rich.text import Text

    said = re.split(r"(?<=\S)(?:[.!?]+\s|\n)", answer + "\n")[0]
    said = " ".join(said.split()).rstrip(".") or "(nothing)"
    if len(said) > ANSWER_CHARACTERS:
        said = said[: ANSWER_CHARACTERS - 1] + "…"
    right = score == 1
    return Text(f"{RIGHT if right else WRONG} {said}", style="green" if right else "red")


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)
