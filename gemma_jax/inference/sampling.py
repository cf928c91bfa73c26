"""Sampling strategies: frozen dataclasses, so that they are static arguments of jitted functions.

Each maps logits to logits, with -inf for tokens that are out; `Chain` applies several in order. A
token is then drawn from what is left; `Greedy` leaves one.
"""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_jax.errors import UsageError

LOWEST_TEMPERATURE = 1e-6  # below it float32 may divide to nothing but infinities


class Sampling(Protocol):
    """What a strategy provides; it must be hashable."""

    def __call__(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]: ...


@dataclasses.dataclass(frozen=True)
class Greedy:
    """The most likely token; of equal ones, the first."""

    def __call__(self, logits):
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(logits.shape[-1]) == best, logits, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Temperature:
    """Logits divided by the temperature."""

    temperature: float = 1.0

    def __post_init__(self):
        holds = LOWEST_TEMPERATURE <= self.temperature < math.inf
        _require(holds, "temperature", self.temperature, f"0, or at least {LOWEST_TEMPERATURE}")

    def __call__(self, logits):
        # Relative to the best, so that a tiny temperature does not overflow.
        return (logits - jnp.max(logits, axis=-1, keepdims=True)) / self.temperature


@dataclasses.dataclass(frozen=True)
class TopK:
    """Keeps the k most likely tokens (and those equal to the last of them)."""

    k: int

    def __post_init__(self):
        _require(self.k >= 1, "top_k", self.k, "at least 1")

    def __call__(self, logits):
        last = jax.lax.top_k(logits, min(self.k, logits.shape[-1]))[0][..., -1:]
        return jnp.where(logits >= last, logits, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class TopP:
    """Keeps the fewest tokens that together have probability p (Holtzman et al. 2020).

    Those equal to the last of them are kept too.
    """

    p: float

    def __post_init__(self):
        _require(0 < self.p <= 1, "top_p", self.p, "above 0 and at most 1")

    def __call__(self, logits):
        if self.p == 1:  # a sum of rounded probabilities may reach 1 before the last token
            return logits
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        last = jnp.min(jnp.where(before < self.p, ordered, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits >= last, logits, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class MinP:
    """Keeps tokens at least p times as likely as the likeliest."""

    p: float

    def __post_init__(self):
        _require(0 <= self.p <= 1, "min_p", self.p, "between 0 and 1")

    def __call__(self, logits):
        if self.p == 0:
            return logits
        least = jnp.max(logits, axis=-1, keepdims=True) + math.log(self.p)
        return jnp.where(logits >= least, logits, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Chain:
    """Applies strategies in order; an empty chain samples from the model's own distribution."""

    steps: tuple[Sampling, ...] = ()

    def __call__(self, logits):
        for step in self.steps:
            logits = step(logits)
        return logits


def make_sampling(
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Sampling:
    """The strategy that a command line's options describe; temperature 0 is greedy. Without one it
    is 1 where another option is given, else 0.

    Top-k, top-p and min-p apply to the distribution at temperature 1, in this order; temperature
    comes last.

    Raises:
        UsageError: an option out of its range.
    """
    if temperature is None:
        temperature = 0.0 if top_k is top_p is min_p is None else 1.0
    steps: list[Sampling] = []
    steps += [TopK(top_k)] if top_k is not None else []
    steps += [TopP(top_p)] if top_p is not None else []
    steps += [MinP(min_p)] if min_p is not None else []
    if temperature == 0:
        return Greedy()
    return Chain((*steps, Temperature(temperature)))


def draw(sampling: Sampling, logits: Float[Array, "B V"], keys: Array) -> Int[Array, " B"]:
    """One token per row, each row with its own key."""
    if isinstance(sampling, Greedy):  # the one token that it leaves
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, sampling(logits)).astype(jnp.int32)


def _require(holds: bool, name: str, value: float, rule: str) -> None:
    if not holds:
        raise UsageError(f"{name} is {value}: it must be {rule}.")
