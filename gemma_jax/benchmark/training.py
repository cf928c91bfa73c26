"""A step of training: all parameters, AdamW, the loss through the memory of a whole sequence."""

import argparse
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from gemma_jax.benchmark import profile
from gemma_jax.benchmark.device import peak_bytes, seconds
from gemma_jax.benchmark.records import Figure, figure_name
from gemma_jax.benchmark.running import random_params, read_config
from gemma_jax.cache import keep_compiled_programs

PEAK_FLOPS = 989e12  # of an H100 or H200 in bfloat16, dense: what MFU is a share of
SEQUENCE = 32_768  # tokens; a sequence of another length has its length in the figures' names
MEMORY_SHARE = "0.94"  # of the device for JAX, which takes three quarters of it by itself
LEARNING_RATE, MEMORY_LEARNING_RATE = 1e-5, 1e-3


def train_step(options: argparse.Namespace) -> Iterator[Figure]:
    """Steps with random tokens: `tokens` a sequence, `batch_size` sequences."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_SHARE)
    import jax
    import jax.numpy as jnp

    from gemma_jax.train.step import Batch, make_optimizer, make_train_step

    if options.profile:
        profile.check()
    keep_compiled_programs()
    config, batch, length = read_config(options), options.batch_size, options.tokens
    params = random_params(config)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    optimizer = make_optimizer(LEARNING_RATE, MEMORY_LEARNING_RATE)
    state: Any = jax.jit(optimizer.init)(params)
    text = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length + 1))
    text = jnp.asarray(text, jnp.int32)
    data = Batch(text[:, :-1], text[:, 1:], jnp.ones((batch, length), jnp.float32))
    step = make_train_step(config, optimizer, step_tokens=options.chunk_tokens or length)
    start = time.perf_counter()
    program = step.lower(params, state, data).compile()
    compiled = time.perf_counter() - start

    def run() -> None:
        nonlocal params, state
        params, state, metrics = program(params, state, data)
        assert np.isfinite(float(metrics["loss"]))

    times = seconds(run, options.repeats)
    name = figure_name(
        "train_step",
        config,
        tokens=None if length == SEQUENCE else length,
        batch_size=batch,
        chunk_tokens=options.chunk_tokens,
    )
    yield f"{name}_compile_seconds", "s", [compiled]
    yield f"{name}_tokens_per_second", "tokens/s", [batch * length / s for s in times]
    work = [6 * count * batch * length / s for s in times]
    yield f"{name}_flops", "TFLOP/s", [w / 1e12 for w in work]
    yield f"{name}_mfu", "1", [w / PEAK_FLOPS for w in work]
    if peak := peak_bytes():
        yield f"{name}_peak_bytes", "bytes", [peak]
    if options.profile:
        profile.save(options.profile, name, run, program.as_text)
