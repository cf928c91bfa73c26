"""How a run goes: its budget, its learning rates, and when something is written."""

import dataclasses
import math

SCHEDULES = ("cosine", "linear", "constant")


@dataclasses.dataclass(frozen=True)
class Ramp:
    """A number that belongs to the length of a sequence, changing by constant factors in between.

    Attributes:
        shortest, longest: the number where sequences are shortest, and where they are longest.
        lengths: of these, in tokens.
    """

    shortest: float
    longest: float
    lengths: tuple[int, int]

    def at(self, length: int) -> float:
        """The number of sequences of this length."""
        if self.shortest == self.longest:
            return self.shortest
        low, high = self.lengths
        share = math.log(length / low) / math.log(high / low) if high > low else 1.0
        return self.shortest ** (1.0 - share) * self.longest**share


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a run goes.

    Attributes:
        steps, minutes: the budget, one of them; the other is None.
        learning_rate, memory_learning_rate: at their highest.
        warmup: steps until they are there.
        schedule: how they fall, over the whole budget, to `final_rate` of it.
        accumulate, chunk_tokens, remat: see `make_train_step`.
        write_penalty: at its height, see `pressure`.
        write_margin: the most that write gates are shifted by, when `pressure` is 1.
        write_loss: how much counts what rules that choose tokens are told to keep.
        log_steps: of a row of the log.
        probe_steps: between two probes; 0: only at the end.
        checkpoint_minutes, checkpoint_steps: between two checkpoints, whichever comes first.
        stop_minutes: after so long the run is saved and ends, to be resumed.
    """

    steps: int | None
    minutes: float | None
    learning_rate: float
    memory_learning_rate: float
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.95
    moment_dtype: str | None = None
    warmup: int = 0
    schedule: str = "cosine"
    final_rate: float = 0.1
    accumulate: int = 1
    chunk_tokens: int | None = None
    remat: str | None = "layers"
    write_penalty: float = 0.0
    write_margin: float = 0.0
    write_loss: float = 0.0
    log_steps: int = 10
    probe_steps: int = 0
    checkpoint_minutes: float = 10.0
    checkpoint_steps: int | None = None
    stop_minutes: float | None = None

    def pressure(self, done: float, growth: float) -> float:
        """How much of `write_penalty` and `write_margin` counts when a share `done` of the budget is spent.

        None before the longest sequences have come, at `growth`: while little depends on what is
        remembered, gates would close for good. From there it rises to all of it in half of the
        time that is left, so that gates close while rates are high.
        """
        if done <= growth:
            return 0.0
        return min(1.0, 2.0 * (done - growth) / (1.0 - growth))

    def rate(self, step: int, done: float) -> float:
        """The learning rate of a step at which this share of the budget is spent."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        done = min(done, 1.0)
        fall = {
            "cosine": 0.5 - 0.5 * math.cos(math.pi * done),
            "linear": done,
            "constant": 0.0,
        }[self.schedule]
        return self.learning_rate * warm * (1.0 - (1.0 - self.final_rate) * fall)
