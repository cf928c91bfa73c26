"""What a model in training recalls: facts planted in texts of given lengths, asked at their end.

A text is read in pieces of one shape, so a long one takes no more memory than a short one, and no
program is compiled for it. An answer counts when each of its tokens is the likeliest after the right
ones before it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_jax.config import GemmaConfig
from gemma_jax.errors import UsageError
from gemma_jax.train.sources import TaskSource

SEED = 7_777_777  # apart from that of any training
ROWS = 4  # texts read at once
LENGTH_MULTIPLE = 32  # of what is asked: few programs are compiled


@dataclasses.dataclass(frozen=True)
class Probe:
    """Asks a task's questions about texts of some lengths.

    Attributes:
        source: makes texts and questions.
        lengths: of the texts, in tokens.
        questions: asked at each length, at least.
    """

    source: TaskSource
    lengths: tuple[int, ...]
    questions: int = 32

    def check(self) -> None:
        """Raises `UsageError` when a text is too short for a question."""
        for length in self.lengths:
            if length < self.source.shortest:
                raise UsageError(
                    f"A question of {self.source.name} takes {self.source.shortest} tokens: choose"
                    f" --probe-lengths above {length}."
                )

    def measure(self, params: Any, config: GemmaConfig) -> dict[str, float]:
        """Share of the questions answered, by `TASK_LENGTH`; the same questions each time."""
        return {
            f"{self.source.name}_{length}": self._at(length, params, config)
            for length in self.lengths
        }

    def _at(self, length: int, params: Any, config: GemmaConfig) -> float:
        each = min(self.source.most_questions, -(-self.questions // ROWS))
        hits: list[bool] = []
        for text in range(-(-self.questions // (each * ROWS))):
            rng = np.random.default_rng([SEED, length, text])
            made = [
                self.source.asked_at_the_end(own, length, each, config.memory.reach)
                for own in rng.spawn(ROWS)
            ]
            state = _read(params, np.stack([ids for ids, _ in made]), config)
            for asked in zip(*(asked for _, asked in made), strict=False):
                hits += _answers(params, state, asked, config)
        return float(np.mean(hits))


def _read(params: Any, ids: np.ndarray, config: GemmaConfig) -> Any:
    """The State after texts [B, T]."""
    from gemma_jax.inference.prefill import default_chunk_tokens, prefill
    from gemma_jax.model.state import init_state

    state = init_state(config, len(ids))
    size = default_chunk_tokens(config)
    for start in range(0, ids.shape[1], size):
        piece = ids[:, start : start + size]
        count = piece.shape[1]
        piece = np.pad(piece, ((0, 0), (0, size - count)))
        lengths = np.full(len(ids), count, np.int32)
        _, state = prefill(params, piece, state, config=config, lengths=lengths, fits=True)
    return state


def _answers(
    params: Any, state: Any, asked: Sequence[tuple[list[int], list[int]]], config: GemmaConfig
) -> list[bool]:
    """Whether each row answers its question [B], from a State that is left as it is."""
    import jax

    from gemma_jax.model.scan import forward, logits

    longest = max(len(question) + len(answer) for question, answer in asked)
    size = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    tokens = np.zeros((len(asked), size), np.int32)
    wanted = np.full((len(asked), size), -1, np.int32)
    for row, (question, answer) in enumerate(asked):
        both = [*question, *answer]
        tokens[row, : len(both)] = both
        wanted[row, len(question) - 1 : len(both) - 1] = answer
    lengths = np.array([len(question) + len(answer) for question, answer in asked], np.int32)
    copy = jax.tree.map(jax.numpy.copy, state)
    hidden, _ = forward(params, tokens, copy, config=config, lengths=lengths)
    found = np.asarray(logits(params, hidden, config=config).argmax(axis=-1))
    return ((found == wanted) | (wanted < 0)).all(axis=1).tolist()
