"""Ids out of a State, block by block."""

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gemma_jax import text as text_lib
from gemma_jax.errors import GemmaError
from gemma_jax.inference.decode import decode_block
from gemma_jax.inference.progress import Rate
from gemma_jax.inference.reading import Reading, all_finite

BLOCKS_IN_FLIGHT = 2  # blocks of tokens given to the device before the host looks at the oldest
BLOCK_TOKENS = {"cpu": 1}  # tokens decoded between two looks at them: a CPU takes long for each
DEFAULT_BLOCK_TOKENS = 8
STOP_IDS = 8  # places for them, so that what is compiled does not depend on how many there are


def write(
    model: Any,
    reading: Reading,
    *,
    max_new_tokens: int,
    sampling: Any,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    block_tokens: int | None = None,
    rate: Rate | None = None,
) -> Iterator[int]:
    """Ids of the model's continuation, up to and including the first of `stop_ids`.

    The reading's State is consumed. The same seed gives the same ids, whatever `block_tokens` is.
    `rate` is kept up to date, block by block.

    Raises:
        GemmaError: the model computed numbers that are not finite.
    """
    block_tokens = block_tokens or default_block_tokens()
    logits, state, key = reading.logits, reading.state, jax.random.key(seed)
    stops = padded_stop_ids(stop_ids)
    require_finite(reading)
    written = given = 0
    in_flight: collections.deque[Any] = collections.deque()
    while written < max_new_tokens:
        # One block ahead: the device works on the next while the host turns this one into text.
        # What was computed beyond a stop or beyond `max_new_tokens` is thrown away, so that one
        # block size is all that is compiled.
        while given < max_new_tokens and len(in_flight) < BLOCKS_IN_FLIGHT:
            tokens, counts, logits, state = decode_block(
                model.params,
                logits,
                state,
                config=model.config,
                sampling=sampling,
                key=key,
                num_tokens=block_tokens,
                stop_ids=stops,
            )
            in_flight.append((tokens, counts, all_finite(logits)))
            given += block_tokens
        tokens, counts, finite = jax.device_get(in_flight.popleft())
        block = tokens[0, : min(int(counts[0]), max_new_tokens - written)].tolist()
        written += len(block)
        if rate:
            rate.update(written)
        yield from block
        if not block or block[-1] in stop_ids:
            return
        if not finite:
            raise GemmaError(_not_finite(reading.tokens + written))


def require_finite(reading: Reading) -> None:
    """Raises `GemmaError` when what comes next cannot be drawn."""
    if not all_finite(reading.logits):
        raise GemmaError(_not_finite(reading.tokens))


def default_block_tokens() -> int:
    """Tokens decoded at once that suit the device."""
    return BLOCK_TOKENS.get(jax.default_backend(), DEFAULT_BLOCK_TOKENS)


def stop_token_ids(model: Any) -> tuple[int, ...]:
    """Ids that end an answer: the model's own list, and the end of turn of its chat template."""
    ends = text_lib.end_of_turn_ids(model.tokenizer, model.config.bos_id)
    return tuple(dict.fromkeys((*model.config.eos_ids, *ends)))


def padded_stop_ids(stop_ids: Sequence[int] = ()) -> np.ndarray:
    """Stop tokens as `decode_block` is given them, int32, with -1 in the places that are free."""
    places = max(STOP_IDS, len(stop_ids))
    return np.array([*stop_ids, *[-1] * (places - len(stop_ids))], np.int32)


def _not_finite(tokens: int) -> str:
    return (
        f"The model computed numbers that are not finite after {tokens} tokens: check the"
        " checkpoint, or convert it with --dtype float32."
    )
