"""What the device does at best, and clocks."""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from gemma_jax.benchmark.records import Figure, Record

# Rows, inner dimension, columns; the likeliest first, before the device slows down.
MATMULS = (
    (8192, 8192, 8192),
    (6144, 6144, 6144),
    (4096, 4096, 4096),
    (12_288, 12_288, 12_288),
    (8192, 2048, 32_768),
)
COPY_BYTES = 2**30  # long enough that starting it does not count
CALLS = 10  # in a row, so that the device never waits for the host
ROUNDS = 10
# What a figure's own rate is compared with.
CEILINGS = {
    "_dense": "matmul_ceiling",
    "_flops": "matmul_ceiling",
    "_weights_read": "copy_ceiling",
}


def ceilings() -> Iterator[Figure]:
    """The fastest of some matrix products, and a copy; nothing on a CPU."""
    import jax
    import jax.numpy as jnp

    if jax.default_backend() == "cpu":
        return
    rates, product = [], jax.jit(jnp.matmul)
    for m, k, n in MATMULS:
        # Random numbers: a GPU multiplies equal ones faster than any that a model holds.
        keys = jax.random.split(jax.random.key(m + n))
        x = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
        y = jax.random.normal(keys[1], (k, n), jnp.bfloat16)
        work = CALLS * 2 * m * k * n / 1e12
        rates.append([work / s for s in seconds(lambda x=x, y=y: product(x, y), ROUNDS, CALLS)])
    yield "matmul_ceiling", "TFLOP/s", max(rates, key=statistics.median)
    x = jnp.zeros(COPY_BYTES // 4, jnp.float32)
    copy, work = jax.jit(lambda x: x + 1), CALLS * 2 * COPY_BYTES / 1e9
    yield "copy_ceiling", "GB/s", [work / s for s in seconds(lambda: copy(x), ROUNDS, CALLS)]


def shares(records: dict[str, Record]) -> list[Record]:
    """What was reached, over what the device did at best in the same run."""
    found = []
    for suffix, ceiling in CEILINGS.items():
        for record in records.values():
            if record.name.endswith(suffix) and ceiling in records:
                best = records[ceiling].value
                found.append(
                    dataclasses.replace(
                        record,
                        name=f"{record.name.removesuffix(suffix)}_ceiling_share",
                        value=record.value / best,
                        unit="1",
                        repeats=[repeat / best for repeat in record.repeats],
                    )
                )
    return found


def seconds(call: Callable[[], Any], repeats: int, calls: int = 1) -> list[float]:
    """Seconds of each round of `calls` calls, after one round and one call that are not counted."""
    import jax

    jax.block_until_ready([call() for _ in range(calls + 1)])
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([call() for _ in range(calls)])
        found.append(time.perf_counter() - start)
    return found


def peak_bytes() -> int | None:
    """Most memory in use on the device so far; None where the platform does not tell."""
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def is_cpu_by_choice() -> bool:
    """Whether the environment asks for the CPU: known without starting JAX."""
    return os.environ.get("JAX_PLATFORMS", "") == "cpu"
