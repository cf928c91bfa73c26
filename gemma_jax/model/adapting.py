"""What of a model is trained and what is not: a tree of parameters split in two, and joined again.

A low-rank update is kept where the matrix is that it changes, under the matrix's name and `_lora`:
{"a": [R, in], "b": [out, R]}. Joined, the matrix is W + b a (Hu et al. 2021, section 4.1, without a
factor of its own). Training joins in every step, so it sees the very matrices, rounding included, that
a model has which was joined for good.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gemma_jax.model.transformer import Params

WHAT = ("memory", "lora", "all")
MATRICES = ("qkv", "out", "gate_up", "down")
MEMORY = "memory"
UPDATE = "_lora"


def is_memory(path: tuple[Any, ...]) -> bool:
    """Whether a parameter is one of the memory rule's own, by its path in the tree."""
    return any(part.key == MEMORY for part in path)


def split(params: Params, what: str, *, rank: int = 8, key: Array | None = None) -> tuple:
    """Parts a model into what is trained (float32) and what is left as it is.

    Args:
        what: "memory" (the rule's own parameters), "lora" (these, and new low-rank updates of the
            layers' matrices) or "all".
        rank: R of the updates.
        key: of the updates' random halves; the other halves are zero, so they start as no change.

    Returns:
        Two trees, for `join`.
    """
    if what == "all":
        return _float32(params), {}
    memory, frozen = _part(params)
    if what == "lora":
        memory = _merge(memory, _updates(frozen, rank, key))
    return _float32(memory), frozen


def join(frozen: Params, trained: Params) -> Params:
    """The model of both parts, with low-rank updates added to their matrices."""
    joined = dict(frozen)
    for name, part in trained.items():
        if name.endswith(UPDATE):
            matrix = name.removesuffix(UPDATE)
            joined[matrix] = updated(joined[matrix], part)
        elif isinstance(part, dict):
            joined[name] = join(frozen.get(name, {}), part)
        else:
            joined[name] = part
    return joined


def updated(matrix: Array, update: dict[str, Array]) -> Array:
    """W + b a, in the dtype of W."""
    change = jnp.einsum("NR,RK->NK", update["b"], update["a"], precision="highest")
    return (matrix.astype(jnp.float32) + change).astype(matrix.dtype)


def scaled(trained: Params, factor: float) -> Params:
    """What was trained, its low-rank updates times a factor: a point on the line between a model as it
    was and as it was tuned (Wortsman et al. 2022, equation 1). The memory is as it was trained.
    """
    return {
        name: {**part, "b": part["b"] * factor}
        if name.endswith(UPDATE)
        else scaled(part, factor)
        if isinstance(part, dict)
        else part
        for name, part in trained.items()
    }


def between(before: Params, after: Params, factor: float) -> Params:
    """before + factor (after - before), in float32: `scaled` where everything was trained."""
    before, after = _float32(before), _float32(after)
    return jax.tree.map(lambda one, other: one + factor * (other - one), before, after)


def without_memory(params: Params) -> Params:
    """A model without its memory rule's parameters."""
    return _part(params)[1]


def _float32(params: Params) -> Params:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)


def _part(params: Params) -> tuple[Params, Params]:
    """The memory's parameters, and all others."""
    memory: Params = {}
    rest: Params = {}
    for name, part in params.items():
        if name == MEMORY:
            memory[name] = part
        elif isinstance(part, dict):
            inner, rest[name] = _part(part)
            if inner:
                memory[name] = inner
        else:
            rest[name] = part
    return memory, rest


def _merge(one: Params, other: Params) -> Params:
    merged = dict(one)
    for name, part in other.items():
        merged[name] = _merge(merged[name], part) if name in merged else part
    return merged


def _updates(params: Params, rank: int, key: Array) -> Params:
    found: Params = {}
    for i, (name, part) in enumerate(sorted(params.items())):
        inner = jax.random.fold_in(key, i)
        if isinstance(part, dict):
            if updates := _updates(part, rank, inner):
                found[name] = updates
        elif name in MATRICES:
            rows, columns = part.shape
            a = jax.random.normal(inner, (rank, columns)) * columns**-0.5
            found[name + UPDATE] = {"a": a, "b": jnp.zeros((rows, rank))}
    return found
