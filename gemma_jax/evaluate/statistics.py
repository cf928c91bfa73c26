"""How sure an accuracy is.

Questions about one haystack share its filler and its State, so they say less than as many
independent ones. n trials in clusters of m_i count as n / deff, with Kish's design effect

    deff = 1 + (sum m_i^2 / n - 1) rho,

where rho, the correlation of two scores of one haystack, is estimated by one-way analysis of variance
over haystacks where there are several, and is never taken to be below `LEAST_CORRELATION`: from a
single haystack, or from answers that are all right or all wrong, it cannot be estimated.
"""

import dataclasses
import math
from collections.abc import Hashable, Iterable, Sequence

Z = 1.959963984540054  # of a 95 % interval
LEAST_CORRELATION = 0.01


@dataclasses.dataclass(frozen=True)
class Estimate:
    """An accuracy with its 95 % interval."""

    trials: int
    haystacks: int
    accuracy: float
    low: float
    high: float
    effective: float  # as many independent trials would say as much


def estimate(scores: Iterable[tuple[Hashable, float]]) -> Estimate | None:
    """Mean and Wilson's interval of scores (0 to 1), each given with its haystack; None of none."""
    clusters: dict[Hashable, list[float]] = {}
    for haystack, score in scores:
        clusters.setdefault(haystack, []).append(score)
    groups = list(clusters.values())
    trials = sum(map(len, groups))
    if not trials:
        return None
    accuracy = math.fsum(map(math.fsum, groups)) / trials
    rho = max(LEAST_CORRELATION, correlation(groups) or 0.0)
    effective = effective_size([len(group) for group in groups], rho)
    low, high = wilson(accuracy, effective)
    return Estimate(trials, len(groups), accuracy, low, high, effective)


def wilson(share: float, trials: float, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval of a share found in `trials` independent trials."""
    weight = z * z / trials
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / trials + weight / (4 * trials))
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def effective_size(sizes: Sequence[int], rho: float) -> float:
    """How many independent trials clusters of such sizes count for."""
    trials = sum(sizes)
    return trials / (1 + (sum(size * size for size in sizes) / trials - 1) * rho)


def correlation(groups: Sequence[Sequence[float]]) -> float | None:
    """Within clusters, the ANOVA estimate (0 to 1); None where it cannot be estimated."""
    groups = [group for group in groups if group]
    trials, clusters = sum(map(len, groups)), len(groups)
    if clusters < 2 or trials == clusters:
        return None
    means = [math.fsum(group) / len(group) for group in groups]
    whole = math.fsum(map(math.fsum, groups)) / trials
    between = math.fsum(
        len(group) * (mean - whole) ** 2 for group, mean in zip(groups, means, strict=True)
    )
    within = math.fsum(
        (score - mean) ** 2 for group, mean in zip(groups, means, strict=True) for score in group
    )
    between, within = between / (clusters - 1), within / (trials - clusters)
    size = (trials - sum(len(group) ** 2 for group in groups) / trials) / (clusters - 1)
    total = between + (size - 1) * within
    return None if total == 0 else min(1.0, max(0.0, (between - within) / total))
