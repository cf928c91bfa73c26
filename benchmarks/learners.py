"""The models that are compared: how each is trained and asked, and what is known of it then."""

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

# What is compared, in this order: names, and how `gemma_jax.train` is told.
VARIANTS = {
    "off": ("--memory", "off"),
    "linear": ("--memory", "linear"),
    "delta": ("--memory", "delta"),
    "gated_delta_sigmoid": ("--memory", "gated_delta", "--write-gate", "sigmoid"),
    "gated_delta": ("--memory", "gated_delta", "--write-gate", "hard_sigmoid"),
    "selective_delta": ("--memory", "selective_delta", "--write-gate", "hard_sigmoid"),
}


@dataclasses.dataclass(frozen=True)
class Learner:
    """A model of the comparison: a rule, trained with a seed."""

    options: argparse.Namespace
    rule: str
    seed: int

    @property
    def label(self) -> str:
        """Of the rule, in names."""
        return self.rule if self.rule in VARIANTS else records.slug(self.rule.rpartition(":")[2])

    @property
    def name(self) -> str:
        return f"{self.label}-{self.seed}"

    @property
    def model(self) -> Path:
        return Path(self.options.work) / "models" / self.name

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
            *([] if counts_writes(self.rule, self.options.recipe) else ["--write-penalty", "0"]),
            *("--seed", str(self.seed), "--output", str(self.model), "--resume"),
            *("--data-workers", str(workers(self.options))),
        ]

    @property
    def training(self) -> Job:
        arguments = ("-m", "gemma_jax.train", *self.training_options)
        return Job(f"training of {self.name}", arguments, self._log("train"))

    @property
    def evaluation(self) -> Job:
        """All texts hold as many facts, whatever their length: questions share haystacks."""
        own = [] if self.rule in VARIANTS else ["--memory", self.rule]  # checkpoints name no code
        arguments = [
            *("-m", "gemma_jax.evaluate", "--model", str(self.model), *own, *self._questions),
            *("--output", str(self.answers), "--record", str(self.answers / "recall.json")),
        ]
        return Job(f"evaluation of {self.name}", tuple(arguments), self._log("evaluate"))

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

    def _log(self, what: str) -> Path:
        return Path(self.options.work) / "logs" / f"{self.name}.{what}.log"


def common_options(options: argparse.Namespace) -> list[str]:
    """What all trainings have in common: recipe and budget."""
    return [
        *("--recipe", options.recipe),
        *(["--minutes", str(options.minutes)] if options.minutes else []),
        *(["--steps", str(options.steps)] if options.steps else []),
    ]


def workers(options: argparse.Namespace) -> int:
    """Processes that make the batches of a training, where all slots are taken."""
    if options.data_workers is not None:
        return options.data_workers
    return max(1, (os.cpu_count() or 1) // (options.jobs * len(options.devices.split(","))) - 1)


@functools.cache
def shape(recipe: str) -> GemmaConfig:
    """What a recipe trains, from scratch.

    Raises:
        UsageError: it goes on from a model.
    """
    from gemma_jax.train import options as train_options
    from gemma_jax.train.start import read_config

    told = train_options.parse(["--recipe", recipe])
    if told.model or not (told.preset or told.config):
        raise UsageError(
            f"{recipe} trains no model from scratch, and one that was trained has a rule already: give it"
            " --config or --preset."
        )
    config = PRESETS[told.preset] if told.preset else read_config(Path(told.config))
    names = ("segment_length", "local_attention")
    return config.with_memory(
        **{name: getattr(told, name) for name in names if getattr(told, name)}
    )


def counts_writes(rule: str, recipe: str) -> bool:
    """Whether a rule counts what it writes, so that writing can be penalised."""
    import jax

    from gemma_jax.model.memory import make_rule

    name = VARIANTS.get(rule, ("--memory", rule))[1]
    made = make_rule(shape(recipe).with_memory(rule=name))
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
