"""Text in, answer out: a stream of text is read into a State, and what the model writes comes out.

`generate` is what the command line prints. It is made of parts that meet in a State, so that a State
can come from elsewhere or be kept in between: `remember` and `recall` (or `read`, for ids) take text
into a State, `write` continues from one.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from gemma_jax.checkpoint.memory_file import Memory
from gemma_jax.errors import InputError, UsageError
from gemma_jax.inference.progress import Meter, Progress, Rate
from gemma_jax.inference.reading import Reading, read
from gemma_jax.inference.remember import Keeper, recall, remember
from gemma_jax.inference.sampling import make_sampling
from gemma_jax.inference.streaming import StopTexts, StreamDecoder
from gemma_jax.inference.writing import stop_token_ids, write
from gemma_jax.model.state import state_bytes

__all__ = ["Answer", "Reading", "generate", "read", "write"]

SEED_RANGE = 2**32


class Answer(Iterator[str]):
    """The pieces of text of an answer, as they are written.

    The attributes tell about the answer so far; they are complete when the pieces have ended.

    Attributes:
        text: all pieces so far.
        tokens: the generated ids so far, with the stop token.
        prompt_tokens: what was read before, with BOS, by the State's own count; 0 until it was
            read.
        given_tokens: what the tokenizer made of the text, with BOS.
        first_token_seconds: from the first piece being asked for to the first token; None before it.
        finish_reason: "stop" (a stop token or stop text) or "length"; None until the end.
    """

    def __init__(
        self,
        model: Any,
        text: str | Iterable[str] | None,
        *,
        memory: Memory | None,
        keeper: Keeper | None,
        on_memory: Callable[[Memory], None] | None,
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
        self._memory, self._keeper, self._on_memory = memory, keeper, on_memory
        self._sampling = sampling
        self._max_new_tokens = max_new_tokens
        self._stops = StopTexts(stop)
        self._template = template
        self._chunk_tokens, self._block_tokens = chunk_tokens, block_tokens
        self._on_progress = on_progress
        self._decode_rate: Rate | None = None
        self._reading_rate: float | None = None
        self._pieces, self._begin = self._run(), 0.0
        self.seed = seed
        self.text = ""
        self.tokens: list[int] = []
        self.prompt_tokens = self.given_tokens = 0
        self.first_token_seconds: float | None = None
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
        self._begin = time.perf_counter()
        reading = self._read()
        self._decode_rate = Rate()
        stop_ids = stop_token_ids(self._model)
        written = write(
            self._model,
            reading,
            max_new_tokens=self._max_new_tokens,
            sampling=self._sampling,
            seed=self.seed,
            stop_ids=stop_ids,
            block_tokens=self._block_tokens,
            rate=self._decode_rate,
        )
        yield from self._texts(written, StreamDecoder(self._model.tokenizer), stop_ids)

    def _read(self) -> Reading:
        model, memory = self._model, self._memory
        options = {"template": self._template, "chunk_tokens": self._chunk_tokens}
        meter = Meter(getattr(self._source, "share_read", lambda: None), self._on_progress)
        begin = 0 if memory is None else int(memory.state.length[0])
        if self._source is not None:
            memory = remember(
                model, self._source, memory, keeper=self._keeper, meter=meter, **options
            )
        if self._on_memory:
            self._on_memory(memory)
        reading = recall(model, memory, meter=meter, **options)
        self.given_tokens = begin + meter.tokens
        self.prompt_tokens = int(reading.state.length[0])
        self._reading_rate = meter.rate.per_second
        return reading

    def _texts(
        self, ids: Iterable[int], decoder: StreamDecoder, stop_ids: Sequence[int]
    ) -> Iterator[str]:
        for token in ids:
            if not self.tokens:
                self.first_token_seconds = time.perf_counter() - self._begin
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
    text: str | Iterable[str] | None,
    *,
    memory: Memory | None = None,
    keeper: Keeper | None = None,
    on_memory: Callable[[Memory], None] | None = None,
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
        text: the text, whole or as pieces (such as `Documents`); BOS is set before it. None
            continues what is in `memory`.
        memory: what was read before (consumed); the text follows on a new line.
        keeper: saves the reading while it is under way.
        on_memory: given all that was read, before the answer is begun; to be saved or copied at
            once, as it is consumed then.
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
    if text is None and memory is None:
        raise InputError("There is nothing to read: give some text, or a memory.")
    return Answer(
        model,
        text,
        memory=memory,
        keeper=keeper,
        on_memory=on_memory,
        max_new_tokens=max_new_tokens,
        sampling=make_sampling(temperature, top_k=top_k, top_p=top_p, min_p=min_p),
        seed=seed,
        stop=[stop] if isinstance(stop, str) else stop,
        template=template,
        chunk_tokens=chunk_tokens,
        block_tokens=block_tokens,
        on_progress=on_progress,
    )


def peak_memory_bytes() -> int | None:
    """Most memory used on a device so far, by this process; None where the platform is silent."""
    peaks = [
        (device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()
    ]
    return max((peak for peak in peaks if peak is not None), default=None)
