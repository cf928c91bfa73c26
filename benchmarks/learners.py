"""The models that are compared, and the one that they go on from: how each is trained and asked."""

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.jobs import Job
from gemma_jax.benchmark import records
from gemma_jax.config import PRESETS, GemmaConfig
from gemma_jax.errors import UsageError
from gemma_jax.evaluate.report import Recall

START = "start"
# What is compared, in this order: names, and how `gemma_jax.train` is told.
VARIANTS = {
    "off": ("--memory", "off"),
    "linear": ("--memory", "linear"),
    "delta": ("--memory", "delta"),
    "gated_delta_sigmoid": ("--memory", "gated_delta", "--write-gate", "sigmoid"),
    "gated_delta": ("--memory", "gated_delta", "--write-gate", "hard_sigmoid"),
    "selective_delta": ("--memory", "selective_delta", "--write-gate", "hard_sigmoid"),
}

# Of rules that do not count what they write.
UNPRESSED = ("--write-penalty", "0", "--write-margin", "0")


class Trained:
    """A model that `gemma_jax.train` makes for the comparison, and what is known of it then."""

    options: argparse.Namespace
    label: str
    seed: int
    name: str
    recipe: str
    training_options: list[str]

    @property
    def model(self) -> Path:
        """Absolute: what goes on from a model does so from one place, wherever the command is run."""
        return Path(self.options.work).absolute() / "models" / self.name

    @property
    def training(self) -> Job:
        arguments = ("-m", "gemma_jax.train", *self.training_options)
        return Job(f"training of {self.name}", arguments, self.log("train"))

    @property
    def is_trained(self) -> bool:
        return (self.model / "training.json").exists()

    def trained(self) -> dict[str, float]:
        """Figures of a finished training, by the ends of their names."""
        from gemma_jax.train import record

        told = json.loads((self.model / "training.json").read_text())
        found = {"steps": told["steps"], "tokens_read": told["tokens"], "seconds": told["seconds"]}
        rows = record.read(self.model.with_name(f"{self.name}.training") / "log.csv")
        last = next((row for row in reversed(rows) if "loss" in row), {})
        if "answer_accuracy" in last:
            found["answers"] = last["answer_accuracy"]
        if written := [value for name, value in last.items() if name.startswith("written_")]:
            found["written"] = statistics.mean(written)
        return found

    def log(self, what: str) -> Path:
        return Path(self.options.work) / "logs" / f"{self.name}.{what}.log"


@dataclasses.dataclass(frozen=True)
class Start(Trained):
    """The model without memory that all rules go on from: trained from scratch, or given.

    What is to be recalled is learnt before where it is kept: copying, and answering from what local
    attention sees, take more tokens than a memory does in a model that can do both.
    """

    options: argparse.Namespace
    label = name = START
    seed = 0

    @property
    def is_given(self) -> bool:
        return bool(self.options.start)

    @property
    def model(self) -> Path:
        return Path(self.options.start).absolute() if self.is_given else super().model

    @property
    def recipe(self) -> str:
        return self.options.start_recipe

    @property
    def training_options(self) -> list[str]:
        """Of `gemma_jax.train`."""
        steps, minutes = self.options.start_steps, self.options.start_minutes
        own = self.options.data_workers
        return [
            *("--recipe", self.recipe, *budget(steps, minutes), *VARIANTS["off"]),
            *("--seed", str(self.seed), "--output", str(self.model), "--resume"),
            *([] if own is None else ["--data-workers", str(own)]),
        ]


@dataclasses.dataclass(frozen=True)
class Learner(Trained):
    """A model of the comparison: the start, gone on from with a rule and a seed."""

    options: argparse.Namespace
    rule: str
    seed: int

    @property
    def label(self) -> str:
        return label(self.rule)

    @property
    def name(self) -> str:
        return f"{self.label}-{self.seed}"

    @property
    def recipe(self) -> str:
        return self.options.recipe

    @property
    def answers(self) -> Path:
        """Where the evaluation is: other questions have another place."""
        told = hashlib.sha256(json.dumps(self._questions).encode()).hexdigest()[:8]
        return Path(self.options.work) / "recall" / f"{self.name}-{told}"

    @property
    def training_options(self) -> list[str]:
        """Of `gemma_jax.train`."""
        return [
            *common_options(self.options),
            *VARIANTS.get(self.rule, ("--memory", self.rule)),
            *([] if counts_writes(self.rule, self.options) else UNPRESSED),
            *("--seed", str(self.seed), "--output", str(self.model), "--resume"),
            *("--data-workers", str(workers(self.options))),
        ]

    @property
    def evaluation(self) -> Job:
        """All texts hold as many facts, whatever their length: questions share haystacks."""
        own = [] if self.rule in VARIANTS else ["--memory", self.rule]  # checkpoints name no code
        arguments = [
            *("-m", "gemma_jax.evaluate", "--model", str(self.model), *own, *self._questions),
            *("--output", str(self.answers), "--record", str(self.answers / "recall.json")),
        ]
        return Job(f"evaluation of {self.name}", tuple(arguments), self.log("evaluate"))

    def recalled(self) -> list[Recall]:
        """Pooled accuracies of a finished evaluation; none while it is not, or where trials failed."""
        file = self.answers / "recall.json"
        found = records.read(file, Recall) if file.exists() else []
        return [] if any(r.failed for r in found) else [r for r in found if r.depth is None]

    @property
    def _questions(self) -> list[str]:
        names = ("task", "lengths", "depths", "questions", "haystacks", "filler", "forms")
        told = [(f"--{name}", str(getattr(self.options, name))) for name in names]
        return [*(part for pair in told for part in pair), "--shared", "always"]


def label(rule: str) -> str:
    """A rule in names."""
    return rule if rule in VARIANTS else records.slug(rule.rpartition(":")[2])


def common_options(options: argparse.Namespace) -> list[str]:
    """What the trainings of all rules have in common: recipe, budget, and what they go on from."""
    return [
        *("--recipe", options.recipe, *budget(options.steps, options.minutes)),
        *("--model", str(Start(options).model), "--train", "all"),
    ]


def budget(steps: int | None, minutes: float | None) -> list[str]:
    """Options of `gemma_jax.train`."""
    return [
        *(["--steps", str(steps)] if steps else []),
        *(["--minutes", str(minutes)] if minutes else []),
    ]


def workers(options: argparse.Namespace) -> int:
    """Processes that make the batches of a training, where all slots are taken."""
    if options.data_workers is not None:
        return options.data_workers
    return max(1, (os.cpu_count() or 1) // (options.jobs * len(options.devices.split(","))) - 1)


def shape(options: argparse.Namespace) -> GemmaConfig:
    """What all rules are put into: the start's configuration, with what their recipe changes of it.

    Raises:
        UsageError: the start has a memory, its recipe trains no model from scratch, or theirs one of
            its own.
        InputError: there is no start where one is said to be.
    """
    config = _given(options.start) if options.start else _from_scratch(options.start_recipe)
    told = _told(options.recipe)
    if told.model or told.preset or told.config or told.tokenizer:
        raise UsageError(
            f"{options.recipe} has a model of its own, and all rules go on from the start: move what it"
            " says of it to the --start-recipe."
        )
    return _with_settings(config, told)


def _given(start: str) -> GemmaConfig:
    from gemma_jax.checkpoint import store

    config = store.read_config(start)
    if config.memory.rule != "off":
        raise UsageError(
            f"{start} has a memory of rule {config.memory.rule}, and the others would begin without one:"
            " choose a --start that was trained with --memory off."
        )
    return config


def _from_scratch(recipe: str) -> GemmaConfig:
    from gemma_jax.train.start import read_config

    told = _told(recipe)
    if told.model or not (told.preset or told.config):
        raise UsageError(
            f"{recipe} trains no model from scratch: give it --config or --preset, or name a model that"
            " was trained with --start."
        )
    config = PRESETS[told.preset] if told.preset else read_config(Path(told.config))
    return _with_settings(config, told)


def _with_settings(config: GemmaConfig, told: argparse.Namespace) -> GemmaConfig:
    names = ("segment_length", "local_attention")
    return config.with_memory(
        **{name: getattr(told, name) for name in names if getattr(told, name)}
    )


@functools.cache
def _told(recipe: str) -> argparse.Namespace:
    from gemma_jax.train import options as train_options

    return train_options.parse(["--recipe", recipe])


def counts_writes(rule: str, options: argparse.Namespace) -> bool:
    """Whether a rule counts what it writes, so that writing can be penalised."""
    import jax

    from gemma_jax.model.memory import make_rule

    name = VARIANTS.get(rule, ("--memory", rule))[1]
    made = make_rule(shape(options).with_memory(rule=name))
    return "offered" in jax.eval_shape(lambda: made.init(1))  # a card would be taken by numbers


def waves(learners: Sequence[Learner], slots: int) -> list[list[Learner]]:
    """Trainings that run side by side: whole seeds where there is room for them.

    Minutes are worth less where more trainings share a card, so all waves have as many of them, and
    every second seed is turned round, for each rule to be on other cards.
    """
    seeds = list(dict.fromkeys(learner.seed for learner in learners))
    own = {seed: [learner for learner in learners if learner.seed == seed] for seed in seeds}
    ordered = [learner for i, seed in enumerate(seeds) for learner in own[seed][:: 1 - 2 * (i % 2)]]
    each = len(own[seeds[0]])
    size = _divisor(each, slots) if each > slots else each * _divisor(len(seeds), slots // each)
    return [ordered[at : at + size] for at in range(0, len(ordered), size)]


def _divisor(number: int, most: int) -> int:
    """The greatest divisor that is not above `most`."""
    return max(part for part in range(1, number + 1) if number % part == 0 and part <= most)
