"""The run: step after step until the budget is spent, with a log, probes and checkpoints."""

import collections
import functools
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.config import GemmaConfig
from gemma_jax.errors import GemmaError
from gemma_jax.inference.console import duration
from gemma_jax.model.adapting import join
from gemma_jax.model.scan import Remat
from gemma_jax.train.carrying import begin_with, empty_memories, keep_newest
from gemma_jax.train.data import Feeder, HostBatch, Mixture, choose_length
from gemma_jax.train.plan import Plan
from gemma_jax.train.probe import Probe
from gemma_jax.train.programs import Programs
from gemma_jax.train.record import Record
from gemma_jax.train.saving import Checkpoints, Progress
from gemma_jax.train.step import (
    Batch,
    compute_params,
    make_optimizer,
    make_train_step,
)

# Steps given to the device before the host looks at the oldest; on a CPU there is nothing to overlap.
IN_FLIGHT = {"cpu": 0}
DEFAULT_IN_FLIGHT = 2


class Run:
    """A training run.

    Attributes:
        progress: where it is; `progress.trained` is what it makes.
        frozen: the rest of the model.
    """

    def __init__(
        self,
        config: GemmaConfig,
        trained: Any,
        frozen: Any,
        mixture: Mixture,
        plan: Plan,
        directory: Path,
        *,
        checkpoints: Checkpoints,
        options: dict[str, Any],
        probes: Sequence[Probe] = (),
        workers: int = 0,
        tell: Callable[[str, int | None, int | None], None] = lambda *_: None,
    ):
        """Nothing is computed yet.

        Args:
            trained, frozen: the model, see `adapting.split`.
            directory: for the log.
            options: what checkpoints say of the run.
            workers: processes that make batches.
            tell: is told how far the run is: a phrase, and the parts done of all (None: unknown).
        """
        self._config, self.frozen = config, frozen
        self._mixture, self._plan, self._directory = mixture, plan, directory
        self._checkpoints, self._options = checkpoints, options
        self._probes, self._workers, self._tell = probes, workers, tell
        begin, self._step = _programs(
            config,
            (
                ("weight_decay", plan.weight_decay),
                ("clip_norm", plan.clip_norm),
                ("b1", plan.b1),
                ("b2", plan.b2),
                ("moment_dtype", plan.moment_dtype),
            ),
            plan.memory_learning_rate / plan.learning_rate,
            plan.chunk_tokens or mixture.lengths[-1],
            plan.remat,
            plan.accumulate,
        )
        self._carries = mixture.carried_rows > 0
        self._empty = empty_memories(config, 1)
        carried = empty_memories(config, mixture.carried_rows) if self._carries else ()
        self.progress = Progress(0, 0.0, 0, [], trained, begin(trained), carried)
        parts = (trained, self.progress.optimizer_state, frozen or None)
        self._shapes = jax.eval_shape(lambda *parts: parts, *parts)
        self._pending: collections.deque[tuple[int, HostBatch, float, Any]] = collections.deque()

    @property
    def memory_layers(self) -> list[int]:
        """Layers that have memory."""
        return [i for i, memory in enumerate(self._empty) if memory]

    def resume(self, step: int) -> None:
        """Takes up the run at one of its checkpoints."""
        self.progress = self._checkpoints.load(step, self.progress)

    def go(self) -> str:
        """Trains until the budget is spent.

        Returns:
            Why it ended: "done", or "stopped" (after `stop_minutes`).

        Raises:
            GemmaError: the loss or its gradient is not finite; the last checkpoint is left.
            KeyboardInterrupt: by SIGINT or SIGTERM, after a checkpoint was written.
        """
        recalls = [f"{probe.source.name}_{n}" for probe in self._probes for n in probe.lengths]
        self._record = Record(self._directory, self.memory_layers, recalls, self.progress.step)
        self._start_clock()
        first = self.progress.step
        with (
            Interruption() as interrupted,
            Feeder(self._mixture, first, self._share, self._workers) as batches,
            Programs(self._lower, self._lengths()) as self._programs,
        ):
            self._programs.wait()
            self._start_clock()  # what is compiled before the first step is no part of the training's time
            stop_at = self._stop_seconds()
            self._saved = time.monotonic(), first
            while not self._is_done():
                if interrupted.by is not None or self._elapsed() >= stop_at:
                    self._save()
                    self._record.draw()
                    if interrupted.by is None:
                        return "stopped"
                    raise KeyboardInterrupt
                self._advance(next(batches))
                self._after_step()
            if self.progress.step > first:
                self._settle()
                self._finish_row(probe=True)
                self._save()
                self._record.draw()
        return "done"

    def _lengths(self) -> list[int]:
        """Of the sequences, in the order in which they will come."""
        step = self.progress.step
        first = choose_length(self._mixture, step, self._share(step))
        return sorted(self._mixture.lengths, key=lambda length: (length != first, length))

    def _lower(self, length: int) -> jax.stages.Lowered:
        """The step for sequences of a length, to be compiled."""
        rows = self._mixture.rows(length)
        ids, weights, answers, wanted, start, number = (
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in (
                ((rows, length), np.int32),
                ((rows, length), np.float32),
                ((rows, length), np.bool_),
                ((rows, length), np.int8),
                ((rows,), np.int32),
                ((), np.float32),
            )
        )
        memories = None
        if self._carries:
            memories = jax.eval_shape(begin_with, self._empty, self.progress.carried, start)
        trained, state, frozen = self._shapes
        batch = Batch(ids, ids, weights, answers, wanted if self._plan.write_loss else None)
        return self._step.lower(trained, state, batch, memories, frozen, *[number] * 4)

    # --- a step -----------------------------------------------------------------------------------

    def _advance(self, made: HostBatch) -> None:
        progress, plan = self.progress, self._plan
        done = self._share(progress.step)
        rate, pressure = plan.rate(progress.step, done), plan.pressure(done, self._mixture.growth)
        batch = Batch(
            jnp.asarray(made.ids[:, :-1]),
            jnp.asarray(made.ids[:, 1:]),
            jnp.asarray(made.weights),
            jnp.asarray(made.answers),
            jnp.asarray(made.wanted) if plan.write_loss else None,
        )
        memories = begin_with(self._empty, progress.carried, made.start) if self._carries else None
        length = made.weights.shape[1]
        step = self._programs[length]
        progress.trained, progress.optimizer_state, metrics = step(
            progress.trained,
            progress.optimizer_state,
            batch,
            memories,
            self.frozen or None,
            np.float32(rate),
            np.float32(pressure * plan.write_penalty),
            np.float32(pressure * plan.write_margin * made.jitter),
            np.float32(plan.write_loss),
        )
        memories = metrics.pop("memories")
        if self._carries:
            progress.carried = keep_newest(progress.carried, memories)
        self._pending.append((progress.step, made, rate, metrics))
        progress.step += 1
        progress.tokens += made.tokens
        if len(self._pending) > IN_FLIGHT.get(jax.default_backend(), DEFAULT_IN_FLIGHT):
            self._look()

    def _look(self) -> None:
        """Waits for the oldest step in flight, and looks at what it measured."""
        step, made, rate, metrics = self._pending.popleft()
        metrics = jax.device_get(metrics)
        if not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["gradient_norm"])):
            raise GemmaError(self._not_finite(step, metrics))
        tokens = float(metrics["answer_tokens"])
        measured = {
            "step": step + 1,
            "learning_rate": rate,
            "sequence_tokens": made.weights.shape[1],
            "answer_tokens": tokens,
            "answer_loss": float(metrics["answer_loss"]) if tokens else 0.0,
            "answer_accuracy": float(metrics["answer_accuracy"]) if tokens else 0.0,
            **{name: float(metrics[name]) for name in ("loss", "gradient_norm", "write_loss")},
        }
        for name in ("written", "read"):
            layers = zip(self.memory_layers, metrics.get(name, ()), strict=False)
            measured |= {f"{name}_{i}": float(value) for i, value in layers}
        self.progress.unlogged.append(measured)

    def _settle(self) -> None:
        """Looks at all steps in flight."""
        while self._pending:
            self._look()

    def _after_step(self) -> None:
        progress, plan = self.progress, self._plan
        step = progress.step
        progress.seconds = self._elapsed()
        self._tell(self._describe(), *self._parts())
        if self._is_done():
            return  # the last row and the last checkpoint are still to come
        wants_probe = bool(plan.probe_steps and step % plan.probe_steps == 0)
        if wants_probe or step % plan.log_steps == 0:
            self._settle()
            self._finish_row(probe=wants_probe)
        saved_at, saved_step = self._saved
        due = time.monotonic() - saved_at > 60 * plan.checkpoint_minutes
        if due or (plan.checkpoint_steps and step - saved_step >= plan.checkpoint_steps):
            self._save()

    # --- what is written --------------------------------------------------------------------------

    def _finish_row(self, probe: bool) -> None:
        """A row of the log of the steps looked at since the last one."""
        measured = self._probe() if probe and self._probes else {}
        steps, self.progress.unlogged = self.progress.unlogged, []
        if not (steps or measured):
            return
        row: dict[str, float] = {
            "step": self.progress.step,
            "seconds": round(self.progress.seconds, 3),
            "tokens": self.progress.tokens,
        }
        row |= _summary(steps) if steps else {}
        self._record.add(row | {f"recall_{name}": value for name, value in measured.items()})

    def _probe(self) -> dict[str, float]:
        self._tell("measuring recall", *self._parts())
        started = time.monotonic()
        params = _full(self.progress.trained, self.frozen, config=self._config)
        found: dict[str, float] = {}
        for probe in self._probes:
            found |= probe.measure(params, self._config)
        self._began += time.monotonic() - started  # no part of the training's time
        return found

    def _save(self) -> None:
        self._settle()
        if self.progress.step not in self._checkpoints.steps():
            self._tell("writing a checkpoint", *self._parts())
            self._checkpoints.save(self.progress, self._options)
        self._saved = time.monotonic(), self.progress.step

    # --- how far ----------------------------------------------------------------------------------

    def _start_clock(self) -> None:
        self._began = time.monotonic() - self.progress.seconds

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _share(self, step: int) -> float:
        """Of the budget that is spent at a step (or now, which is all that is known of minutes)."""
        if self._plan.steps is not None:
            return step / self._plan.steps
        return min(1.0, self._elapsed() / (60 * self._plan.minutes))

    def _is_done(self) -> bool:
        if self._plan.steps is not None:
            return self.progress.step >= self._plan.steps
        return self._elapsed() >= 60 * self._plan.minutes

    def _stop_seconds(self) -> float:
        minutes = self._plan.stop_minutes
        return math.inf if minutes is None else self._elapsed() + 60 * minutes

    def _parts(self) -> tuple[int, int]:
        if self._plan.steps is not None:
            return self.progress.step, self._plan.steps
        return int(self.progress.seconds), int(60 * self._plan.minutes)

    def _describe(self) -> str:
        """Progress as a phrase: `step 120 of 5000, loss 2.310, answers 0.71, 94000 tokens/s, ...`."""
        progress, plan = self.progress, self._plan
        said = [f"step {progress.step}" + (f" of {plan.steps}" if plan.steps else "")]
        if rows := self._record.rows:
            last = rows[-1]
            if "loss" in last:
                said.append(f"loss {last['loss']:.3f}")
            if not math.isnan(last.get("answer_accuracy", math.nan)):
                said.append(f"answers {last['answer_accuracy']:.2f}")
        if progress.seconds:
            said.append(f"{progress.tokens / progress.seconds:.0f} tokens/s")
        share = self._share(progress.step)
        if 0 < share < 1:
            said.append(f"{duration(progress.seconds / share - progress.seconds)} left")
        return ", ".join(said)

    # --- what goes wrong --------------------------------------------------------------------------

    def _not_finite(self, step: int, metrics: Mapping[str, Any]) -> str:
        what = "gradient" if np.isfinite(metrics["loss"]) else "loss"
        saved = self._checkpoints.steps()
        left = (
            f"the checkpoint of step {saved[-1]} is left" if saved else "there is no checkpoint yet"
        )
        return (
            f"The {what} of step {step + 1} (seed {self._mixture.seed}, batch {step}) is not finite;"
            f" it begins in {self._where(metrics)}. Nothing was learnt from it, and {left}: lower the"
            " learning rates, or --clip-norm."
        )

    def _where(self, metrics: Mapping[str, Any]) -> str:
        """The part of the model where numbers first were not finite, as far as can be told."""
        for name, part in sorted(self.progress.trained.items(), key=_in_order):
            if not all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(part)):
                return f"the parameters of {name}"
        if not metrics["finite"].all():
            return f"what layers_{int(np.argmin(metrics['finite']))} computed"
        norms = metrics["gradient_norms"]
        broken = [
            name for name, norm in sorted(norms.items(), key=_in_order) if not np.isfinite(norm)
        ]
        return f"the gradient of {broken[-1]}" if broken else "the output"


class Interruption:
    """While it is entered, SIGINT and SIGTERM are noted; a second one of them interrupts at once.

    Attributes:
        by: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.by: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread: whoever is there decides
                break
        return self

    def __exit__(self, *_: Any) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, _: Any) -> None:
        if self.by is not None:
            raise KeyboardInterrupt
        self.by = number


def _summary(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The numbers of a row, of several steps: means, and the last where it is a state."""
    last = steps[-1]
    row = {name: float(np.mean([step[name] for step in steps])) for name in last}
    row |= {
        name: value
        for name, value in last.items()
        if name in ("step", "learning_rate") or name.startswith("read_")
    }
    tokens = np.array([step["answer_tokens"] for step in steps])
    for name in ("answer_loss", "answer_accuracy"):
        values = np.array([step[name] for step in steps])
        row[name] = float(np.sum(values * tokens) / tokens.sum()) if tokens.any() else math.nan
    return row


def _in_order(named: tuple[str, Any]) -> tuple[int, int]:
    """Parts of the tree of parameters as a token meets them."""
    name = named[0]
    if name.startswith("layers_"):
        return 1, int(name.removeprefix("layers_"))
    return (0, 0) if name == "embedder" else (2, 0)


@functools.partial(jax.jit, static_argnames="config")
def _full(trained: Any, frozen: Any, *, config: GemmaConfig) -> Any:
    """The whole model, in the dtypes it computes in."""
    return compute_params(join(frozen, trained), config)


@functools.lru_cache(maxsize=4)
def _programs(
    config: GemmaConfig,
    adam: tuple[tuple[str, Any], ...],
    memory_rate: float,
    step_tokens: int,
    remat: Remat,
    accumulate: int,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The optimiser's first state, and a step. Runs of one process share what was compiled.

    Learning rates are given to each step, so that other rates are the same program; `memory_rate` is
    the memory's over the model's.
    """
    optimizer = make_optimizer(1.0, memory_rate, **dict(adam))
    step = make_train_step(
        config,
        optimizer,
        step_tokens=step_tokens,
        remat=remat,
        accumulate=accumulate,
        watch=True,
    )
    return jax.jit(optimizer.init), step
