"""Text in, answer out: a stream of text is read into a State, and what the model writes comes out.

`generate` is what the command line prints. It is made of two halves that meet in a State, so that a
State can come from elsewhere or be kept in between: `read` takes a stream of ids into a State,
`write` continues from one.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax import text as text_lib
from gemma_jax.config import GemmaConfig
from gemma_jax.errors import GemmaError, InputError, UsageError
from gemma_jax.inference.decode import decode_block
from gemma_jax.inference.pieces import PIECES_AHEAD, PIECES_IN_FLIGHT, ahead, pieces_of
from gemma_jax.inference.prefill import default_chunk_tokens, prefill
from gemma_jax.inference.progress import Progress, Rate, Tokenized
from gemma_jax.inference.sampling import make_sampling
from gemma_jax.inference.streaming import StopTexts, StreamDecoder
from gemma_jax.model.state import State, init_state, state_bytes

BLOCKS_IN_FLIGHT = 2  # blocks of tokens given to the device before the host looks at the oldest
BLOCK_TOKENS = {"cpu": 1}  # tokens decoded between two looks at them: a CPU takes long for each
DEFAULT_BLOCK_TOKENS = 8
SEED_RANGE = 2**32


@dataclasses.dataclass(frozen=True)
class Reading:
    """What is left of a text that was read: everything needed to continue it."""

    logits: jax.Array  # [1, V] float32, for the token that comes next
    state: State
    tokens: int  # given to the model, BOS included
    tokens_per_second: float


def read(
    model: Any,
    ids: Iterable[Sequence[int]],
    state: State | None = None,
    *,
    chunk_tokens: int | None = None,
    share_read: Callable[[], float | None] = lambda: None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Reading:
    """Reads a stream of ids to its end, in memory that does not depend on its length.

    `ids` is run in a thread of its own, so that text is tokenised while the model reads. The model
    is always given pieces of the same shape, so texts of any length share one compiled program.

    Args:
        model: what `gemma_jax.load` gives.
        ids: lists of token ids of any lengths; together one text, or what follows the text already
            in `state`.
        state: where to start (batch size 1, consumed); a new text by default.
        chunk_tokens: size of the pieces, in tokens.
        share_read: tells which share of the text (0 to 1) has been tokenised, if that is known.
        on_progress: called after each piece that the device has finished.

    Raises:
        InputError: no ids, or an id that the model's vocabulary does not have.
    """
    config: GemmaConfig = model.config
    state = init_state(config, batch_size=1) if state is None else state
    chunk_tokens = chunk_tokens or default_chunk_tokens(config)
    tokenized = Tokenized(share_read)
    pieces = pieces_of(tokenized.count(ids), chunk_tokens, config.vocab_size)
    rate, given, logits = Rate(), 0, None
    in_flight: collections.deque[tuple[int, jax.Array]] = collections.deque()

    def wait_for_oldest() -> None:
        done, piece_logits = in_flight.popleft()
        piece_logits.block_until_ready()
        rate.update(done)
        if on_progress:
            on_progress(tokenized.progress(done, rate))

    for piece, count in ahead(pieces, PIECES_AHEAD):
        lengths = np.array([count], np.int32)
        logits, state = prefill(model.params, piece, state, config=config, lengths=lengths)
        given += count
        in_flight.append((given, logits))
        if len(in_flight) > PIECES_IN_FLIGHT:
            wait_for_oldest()
    while in_flight:
        wait_for_oldest()
    if logits is None:
        raise InputError("There is nothing to read: give some text.")
    return Reading(logits, state, given, rate.per_second or 0.0)


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
    block_tokens = block_tokens or BLOCK_TOKENS.get(jax.default_backend(), DEFAULT_BLOCK_TOKENS)
    logits, state, key = reading.logits, reading.state, jax.random.key(seed)
    if not _all_finite(logits):
        raise GemmaError(_not_finite(reading.tokens))
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
                stop_ids=tuple(stop_ids),
            )
            in_flight.append((tokens, counts, _all_finite(logits)))
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


class Answer(Iterator[str]):
    """The pieces of text of an answer, as they are written.

    The attributes tell about the answer so far; they are complete when the pieces have ended.

    Attributes:
        text: all pieces so far.
        tokens: the generated ids so far, with the stop token.
        prompt_tokens: what was read before, with BOS, by the State's own count; 0 until it was
            read.
        given_tokens: what the tokenizer made of the text, with BOS.
        finish_reason: "stop" (a stop token or stop text) or "length"; None until the end.
    """

    def __init__(
        self,
        model: Any,
        text: str | Iterable[str],
        *,
        max_new_tokens: int,
        sampling: Any,
        seed: int,
        stop: Sequence[str],
        template: bool,
        chunk_tokens: int | None,
        block_tokens: int | None,
        on_progress: Callable[[Progress], None] | None,
    ):
        self._model = model
        self._source = text
        self._sampling = sampling
        self._max_new_tokens = max_new_tokens
        self._stops = StopTexts(stop)
        self._template = template
        self._chunk_tokens, self._block_tokens = chunk_tokens, block_tokens
        self._on_progress = on_progress
        self._decode_rate: Rate | None = None
        self._reading_rate: float | None = None
        self._pieces = self._run()
        self.seed = seed
        self.text = ""
        self.tokens: list[int] = []
        self.prompt_tokens = self.given_tokens = 0
        self.finish_reason: str | None = None

    def __next__(self) -> str:
        return next(self._pieces)

    def report(self) -> dict[str, Any]:
        """What `--json` prints; rates are null where nothing was measured."""
        config = self._model.config
        return {
            "text": self.text,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "finish_reason": self.finish_reason,
            "seed": self.seed,
            "model": config.name,
            "memory_rule": config.memory.rule,
            "state_bytes": state_bytes(config),
            "peak_memory_bytes": peak_memory_bytes(),
            "prefill_tokens_per_second": self._reading_rate,
            "decode_tokens_per_second": self._decode_rate.per_second if self._decode_rate else None,
        }

    def _run(self) -> Iterator[str]:
        for piece in self._unrecorded():
            if piece:
                self.text += piece
                yield piece

    def _unrecorded(self) -> Iterator[str]:
        model, tokenizer, config = self._model, self._model.tokenizer, self._model.config
        pieces = [self._source] if isinstance(self._source, str) else self._source
        ids = text_lib.encode_prompt(
            tokenizer, pieces, bos_id=config.bos_id, template=self._template
        )
        reading = read(
            model,
            ids,
            chunk_tokens=self._chunk_tokens,
            share_read=lambda: _share_read(self._source),
            on_progress=self._on_progress,
        )
        self.given_tokens = reading.tokens
        self.prompt_tokens = int(reading.state.length[0])
        if self.prompt_tokens != self.given_tokens:
            raise GemmaError(
                f"Only {self.prompt_tokens} of {self.given_tokens} tokens were read: please report"
                " this."
            )
        self._reading_rate = reading.tokens_per_second
        self._decode_rate = Rate()
        stop_ids = stop_token_ids(model)
        written = write(
            model,
            reading,
            max_new_tokens=self._max_new_tokens,
            sampling=self._sampling,
            seed=self.seed,
            stop_ids=stop_ids,
            block_tokens=self._block_tokens,
            rate=self._decode_rate,
        )
        yield from self._texts(written, StreamDecoder(tokenizer), stop_ids)

    def _texts(
        self, ids: Iterable[int], decoder: StreamDecoder, stop_ids: Sequence[int]
    ) -> Iterator[str]:
        for token in ids:
            self.tokens.append(token)
            if token in stop_ids:
                self.finish_reason = "stop"
                break
            yield self._stops.push(decoder.push(token))
            if self._stops.found:
                break
        yield self._stops.push(decoder.finish())
        yield self._stops.finish()
        self.finish_reason = "stop" if self._stops.found else self.finish_reason or "length"


def generate(
    model: Any,
    text: str | Iterable[str],
    *,
    max_new_tokens: int = 256,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    template: bool = False,
    chunk_tokens: int | None = None,
    block_tokens: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Answer:
    """Reads a text of any length and continues it.

    Args:
        model: what `gemma_jax.load` gives.
        text: the text, whole or as pieces (such as `Documents`); BOS is set before it.
        max_new_tokens: where the answer ends at the latest.
        temperature: 0 takes the likeliest token; by default 1 where one of the next three is given,
            else 0.
        top_k: samples among the k likeliest tokens only.
        top_p: samples among the likeliest tokens that hold this share of the probability.
        min_p: samples among tokens at least this likely, relative to the likeliest.
        seed: of the sampling, 0 to 2^32 - 1; the same seed gives the same text.
        stop: texts that end the answer; they are not part of it.
        template: whether the text is one user turn of the model's chat template.
        chunk_tokens: see `read`.
        block_tokens: tokens decoded at once; they come out together.
        on_progress: see `read`.

    Returns:
        An iterator of pieces of text, never half a character; nothing is read before the first is
        asked for.

    Raises:
        UsageError: an option is out of range.
        InputError: the text is empty, or `template` is asked of a model that has none.
    """
    if max_new_tokens < 0:
        raise UsageError(f"max_new_tokens is {max_new_tokens}: it must be at least 0.")
    if not 0 <= seed < SEED_RANGE:
        raise UsageError(f"seed is {seed}: it must be between 0 and {SEED_RANGE - 1}.")
    if text == "":
        raise InputError("The text is empty: give some text.")
    if temperature is None:
        temperature = 0.0 if top_k is top_p is min_p is None else 1.0
    return Answer(
        model,
        text,
        max_new_tokens=max_new_tokens,
        sampling=make_sampling(temperature, top_k=top_k, top_p=top_p, min_p=min_p),
        seed=seed,
        stop=[stop] if isinstance(stop, str) else stop,
        template=template,
        chunk_tokens=chunk_tokens,
        block_tokens=block_tokens,
        on_progress=on_progress,
    )


def stop_token_ids(model: Any) -> tuple[int, ...]:
    """Ids that end an answer: the model's own list, and the end of turn of its chat template."""
    ends = text_lib.end_of_turn_ids(model.tokenizer, model.config.bos_id)
    return tuple(dict.fromkeys((*model.config.eos_ids, *ends)))


def peak_memory_bytes() -> int | None:
    """Most memory used on a device so far, by this process; None where the platform is silent."""
    peaks = [
        (device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()
    ]
    return max((peak for peak in peaks if peak is not None), default=None)


@jax.jit
def _all_finite(logits: jax.Array) -> jax.Array:
    return jnp.isfinite(logits).all()


def _not_finite(tokens: int) -> str:
    return (
        f"The model computed numbers that are not finite after {tokens} tokens: check the"
        " checkpoint, or convert it with --dtype float32."
    )


def _share_read(text: str | Iterable[str]) -> float | None:
    if isinstance(text, str):
        return None  # known when all of it is tokenised, which is soon
    total, read_bytes = getattr(text, "total_bytes", None), getattr(text, "bytes_read", None)
    return min(1.0, read_bytes / total) if total and read_bytes is not None else None
