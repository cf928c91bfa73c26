"""A model reads a planted text once and answers all questions about it."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from gemma_jax.demo.planting import Planted
from gemma_jax.errors import GemmaError
from gemma_jax.evaluate.haystack import Text
from gemma_jax.evaluate.running import Reader
from gemma_jax.inference.prefill import default_chunk_tokens
from gemma_jax.inference.progress import Meter, Progress
from gemma_jax.model.state import state_bytes


@dataclasses.dataclass(frozen=True)
class Run:
    """What came of it.

    Attributes:
        text: as it was read.
        seconds: that reading took; compiling, and asking, are not in them.
        answers, scores: by question.
        state_bytes: size of all that was carried from token to token.
    """

    text: Text
    seconds: float
    answers: tuple[str, ...]
    scores: tuple[float, ...]
    state_bytes: int


def read_and_ask(
    planted: Planted, model: Any, on_progress: Callable[[Progress | None], None]
) -> Run:
    """Reads a planted text and asks its questions, each from what was left of the text.

    Questions are padded to the pieces that the text is read in: both then take the same program.

    Args:
        on_progress: is shown how far the reading is; None while everything is compiled.

    Raises:
        GemmaError: the model's numbers are not finite.
    """
    chunk = default_chunk_tokens(model.config)
    longest = max(len(asked.ids) for asked in planted.asked)
    reader = Reader(model, rows=1, question_tokens=-(-longest // chunk) * chunk)
    on_progress(None)
    reader.warm_up([True])

    text = planted.text()
    meter = Meter(lambda: text.tokens / planted.haystack.tokens, on_progress)
    start = time.perf_counter()
    state = reader.read([meter.count(text)], 1, meter.finished)
    seconds = time.perf_counter() - start
    answers = [
        reader.answer(reader.fork(state), [asked.ids], [asked.limit])[0] for asked in planted.asked
    ]
    if not all(answer.finite for answer in answers):
        raise GemmaError(
            f"{model.path} computes numbers that are not finite: use another checkpoint."
        )
    scores = [
        task.score(asked.question, answer.text)
        for task, asked, answer in zip(planted.tasks, planted.asked, answers, strict=True)
    ]
    return Run(
        text,
        seconds,
        tuple(answer.text for answer in answers),
        tuple(scores),
        state_bytes(model.config),
    )
