"""Accuracy by length and depth as a picture."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

MAP = "cividis"  # perceptually uniform, and the same to the colour-blind
DARK = 0.55  # below it numbers are white


@dataclasses.dataclass(frozen=True)
class Square:
    """One cell of a heatmap; without an accuracy it was not run."""

    tokens: int
    depth: float
    accuracy: float | None
    within_reach: bool


def draw(file: Path, title: str, chance: float, squares: Sequence[Square]) -> None:
    """Writes a PNG, lengths across and depths down; hatched squares are within reach.

    `title` may have two lines.
    """
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import patches, pyplot

    lengths = sorted({square.tokens for square in squares})
    depths = sorted({square.depth for square in squares})
    grid = np.full((len(depths), len(lengths)), np.nan)
    size = (max(5.0, 2.6 + 0.95 * len(lengths)), 1.9 + 0.62 * len(depths))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    for square in squares:
        row, column = depths.index(square.depth), lengths.index(square.tokens)
        if square.accuracy is not None:
            grid[row, column] = square.accuracy
        text = "not\nrun" if square.accuracy is None else f"{100 * square.accuracy:.0f}"
        dark = square.accuracy is not None and square.accuracy < DARK
        axes.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            fontsize=8 if square.accuracy is None else 11,
            color="white" if dark else "black",
            zorder=3,
        )
        if square.within_reach:
            axes.add_patch(
                patches.Rectangle(
                    (column - 0.5, row - 0.5),
                    1,
                    1,
                    fill=False,
                    hatch="//",
                    edgecolor="white" if dark else "black",
                    alpha=0.2,
                    linewidth=0,
                )
            )
    colours = matplotlib.colormaps[MAP].with_extremes(bad="#e6e6e6")
    image = axes.imshow(grid, cmap=colours, vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(lengths)), [short(tokens) for tokens in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:g}%" for depth in depths])
    axes.set_xticks(np.arange(len(lengths) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(depths) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="tokens read", ylabel="depth of the fact")
    note = (
        "; hatched: within reach of local attention" if any(s.within_reach for s in squares) else ""
    )
    axes.set_title(f"accuracy in %, chance {100 * chance:.2g}%{note}", fontsize=8, color="0.35")
    figure.suptitle(title, fontsize=11)
    bar = figure.colorbar(image, ax=axes, ticks=[0, 0.25, 0.5, 0.75, 1], pad=0.02)
    bar.ax.set_yticklabels(["0", "25", "50", "75", "100"])
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    figure.savefig(file, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def short(tokens: int) -> str:
    """`8K` is 8,192 and `10M` ten million, as on the command line; other numbers are rounded."""
    if tokens >= 1_000_000:
        return f"{tokens / 1e6:.3g}M"
    if tokens >= 1024 and tokens % 1024 == 0:
        return f"{tokens // 1024}K"
    return f"{tokens:,}"
