"""A conversation whose history is a State: what was said is never read again."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from gemma_jax import text as text_lib
from gemma_jax.checkpoint.memory_file import Memory
from gemma_jax.errors import InputError
from gemma_jax.inference.decode import decode_block
from gemma_jax.inference.progress import Meter, Rate
from gemma_jax.inference.reading import Reading
from gemma_jax.inference.remember import fork, new_memory, recall
from gemma_jax.inference.sampling import make_sampling
from gemma_jax.inference.streaming import StopTexts, StreamDecoder
from gemma_jax.inference.writing import (
    default_block_tokens,
    padded_stop_ids,
    require_finite,
    stop_token_ids,
)
from gemma_jax.text import Place


@dataclasses.dataclass
class Statistics:
    """Of the turn before."""

    read: int = 0  # tokens
    written: int = 0
    read_per_second: float | None = None
    written_per_second: float | None = None


class Chat:
    """Turns of the chat template, one after the other, on top of a memory.

    Attributes:
        memory: everything so far; it can be saved, and set. A turn that fails leaves it as it was.
        turns: answers so far.
        last: statistics of the turn before.
    """

    def __init__(
        self,
        model: Any,
        memory: Memory | None = None,
        *,
        max_new_tokens: int = 256,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        chunk_tokens: int | None = None,
    ):
        """`memory` (consumed) is what the model knows when the conversation begins; the other
        arguments are those of `generate`.

        Raises:
            InputError: the model has no chat template, or one of a single turn.
        """
        self._turn = text_lib.user_turn(model.tokenizer, model.config.bos_id)
        if not self._turn.between:
            raise InputError(
                "The model's chat template knows no second turn: use an instruction-tuned model."
            )
        self._model = model
        self._beginning = new_memory(model) if memory is None else memory
        self._max_new_tokens = max_new_tokens
        self._sampling = make_sampling(temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        self._key = jax.random.key(seed)
        self._stop = tuple(stop)
        self._chunk_tokens = chunk_tokens
        # With stop texts State must not run ahead of the text that is shown.
        self._block_tokens = 1 if stop else default_block_tokens()
        self._stopped = False
        self.is_writing = False
        self.last = Statistics()
        self.reset()

    def reset(self) -> None:
        """Back to where the conversation began."""
        self.memory, self.turns = fork(self._beginning), 0

    def stop(self) -> None:
        """Ends the answer that is being written after this block of tokens; what there is stays."""
        self._stopped = True

    def say(self, text: str) -> Iterator[str]:
        """Reads a turn of the user, and gives the answer in pieces of text.

        Raises:
            InputError: the text is empty, or not of characters.
            GemmaError: the model computed numbers that are not finite.
        """
        meter = Meter()
        self._stopped = False
        reading = recall(
            self._model,
            fork(self.memory),
            text,
            template=True,
            chunk_tokens=self._chunk_tokens,
            meter=meter,
        )
        self.last = Statistics(meter.tokens, 0, meter.rate.per_second)
        rate = Rate()
        self.is_writing = True
        try:
            yield from self._answer(reading, rate)
        finally:
            self.is_writing = False
            self.last.written_per_second = rate.per_second

    def _answer(self, reading: Reading, rate: Rate) -> Iterator[str]:
        decoder, stops = StreamDecoder(self._model.tokenizer), StopTexts(self._stop)
        ends = stop_token_ids(self._model)
        last = None
        while not self._stopped and not stops.found and last not in ends:
            if self.last.written >= self._max_new_tokens:
                break
            require_finite(reading)
            block, reading = self._block(reading, ends)
            self.last.written += len(block)
            rate.update(self.last.written)
            for last in block:
                if last not in ends and (piece := stops.push(decoder.push(last))):
                    yield piece
        if rest := stops.push(decoder.finish()) + stops.finish():
            yield rest
        require_finite(reading)
        self.memory = Memory(
            state=reading.state,
            # The turn that comes next begins with the end of this one, which may be read already.
            place=Place.END if last == self._turn.end_id else Place.ANSWER,
            sources=self.memory.sources,
        )
        self.turns += 1

    def _block(self, reading: Reading, ends: Sequence[int]) -> tuple[list[int], Reading]:
        """A block of tokens, no further than one that ends the answer, and what is read after."""
        tokens, counts, logits, state = decode_block(
            self._model.params,
            reading.logits,
            reading.state,
            config=self._model.config,
            sampling=self._sampling,
            key=self._key,
            num_tokens=self._block_tokens,
            stop_ids=padded_stop_ids(ends),
        )
        tokens, counts = jax.device_get((tokens, counts))
        block = tokens[0, : int(counts[0])].tolist()
        return block, Reading(logits, state, reading.tokens + len(block), 0.0)
