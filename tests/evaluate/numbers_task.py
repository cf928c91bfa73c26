"""A tiny task: numbered facts among a few sentences."""

import itertools
import random
import re

from gemma_jax.tasks.base import Draft, Piece, Task

FILLER = (
    " the people of this long day.",
    " and then she said some words.",
    " with many little ones about.",
)
FRESH = 40  # pieces of filler, the others are repeated


class Numbers(Task):
    """`number 3 is 41.`; asked for one of them."""

    name = "numbers"
    chance = 1 / 90

    def episode(self, seed, depths, questions_per_depth=1):
        rng = random.Random(seed)
        places = [depth for depth in sorted(depths) for _ in range(questions_per_depth)]
        draft = Draft(self.name, seed, "these are numbers.")
        for number, depth in enumerate(places):
            value = str(rng.randrange(10, 100))
            fact = draft.fact(f" number {number} is {value}.", depth)
            draft.ask(f" what is number {number}? number {number} is", [value], [fact], depth)
        return draft.episode()

    def filler(self, episode, books):
        rng = random.Random(episode.seed)
        for index in itertools.count():
            yield Piece(rng.choice(FILLER), fresh=index < FRESH)

    def score(self, question, answer):
        found = re.search(r"\d+", answer)
        return float(found is not None and found[0] == question.answers[0])
