"""What reads and writes is compiled while the weights are loaded: it depends on shapes alone."""

import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp

from gemma_jax.config import GemmaConfig
from gemma_jax.inference.decode import decode_block
from gemma_jax.inference.prefill import piece_sizes, prefill
from gemma_jax.inference.sampling import Sampling
from gemma_jax.inference.writing import default_block_tokens, padded_stop_ids
from gemma_jax.model.device import default_device
from gemma_jax.model.state import init_state
from gemma_jax.model.transformer import abstract_params


class Compiling:
    """The programs of one answer, compiled in threads of their own, as `generate` will call them.

    A program that is called before it is ready would be compiled twice: `wait` first.
    """

    def __init__(
        self, config: GemmaConfig, sampling: Sampling | None, *, block_tokens: int | None = None
    ):
        """Nothing is waited for.

        Args:
            sampling: as of `decode_block`; None where nothing will be written.
            block_tokens: as of `generate`.
        """
        place = jax.sharding.SingleDeviceSharding(default_device())

        def on_device(tree: Any) -> Any:
            return jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree
            )

        params = on_device(abstract_params(config))
        state = on_device(jax.eval_shape(functools.partial(init_state, config)))
        logits = on_device(jax.ShapeDtypeStruct((1, config.vocab_size), jnp.float32))
        sizes = piece_sizes(config)
        count = jax.ShapeDtypeStruct((1,), jnp.int32)

        def reading(size: int) -> jax.stages.Lowered:
            piece = jax.ShapeDtypeStruct((1, size), jnp.int32)
            options = {"config": config, "chunk_tokens": max(sizes), "fits": True}
            return prefill.lower(params, piece, state, lengths=count, **options)

        def writing() -> jax.stages.Lowered:
            return decode_block.lower(
                params,
                logits,
                state,
                config=config,
                sampling=sampling,
                key=jax.eval_shape(jax.random.key, 0),
                num_tokens=block_tokens or default_block_tokens(),
                stop_ids=padded_stop_ids(),
            )

        def compile_all() -> None:
            # Traced one after the other: what two threads trace at once they may trace in different
            # ways from start to start, and the programs kept from the last one are not found.
            programs = [functools.partial(reading, size) for size in sorted({*sizes})]
            programs += [] if sampling is None else [writing]
            for done in [_in_background(program().compile) for program in programs]:
                done.result()

        self._done = _in_background(compile_all)

    def wait(self) -> None:
        """Returns when all is compiled; what went wrong is raised here."""
        self._done.result()


def _in_background(work: Callable[[], Any]) -> Future[Any]:
    """Runs in a thread that does not keep the process from ending."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="gemma_jax compiler", daemon=True).start()
    return future
