"""Facts in other words: what answers a question stays."""

import random
import re

import pytest

from gemma_jax import tasks
from gemma_jax.train.wording import loosely

DEPTHS = [0.1, 0.4, 0.8]


def words(text):
    return re.findall(r"[\w-]+", text)


@pytest.mark.parametrize("name", ["passkey", "niah_single_2", "niah_single_3", "niah_multivalue"])
@pytest.mark.parametrize("forms", ["train", "classic"])
def test_keys_and_values_stay_in_their_order_and_other_words_change(name, forms):
    changed = 0
    for seed in range(20):
        episode = tasks.make(name, forms=forms, keys="train").episode(seed, DEPTHS)
        loose = loosely(episode, random.Random(seed))
        assert [fact.depth for fact in loose.facts] == [fact.depth for fact in episode.facts]
        for question, other in zip(episode.questions, loose.questions, strict=True):
            assert other.answers == question.answers and other.facts == question.facts
            common = set(words(question.text))
            for i in question.facts:
                common &= set(words(episode.facts[i].text))
            assert common, "what is asked for stands in both"
            for before, after in [
                (question.text, other.text),
                *((episode.facts[i].text, loose.facts[i].text) for i in question.facts),
            ]:
                kept = [w for w in words(before) if w in common or any(c.isdigit() for c in w)]
                still = iter(words(after))
                assert all(word in still for word in kept)
                assert re.match(r"\s*", after)[0] == re.match(r"\s*", before)[0]
                changed += after != before
    assert changed > 20


def test_stories_are_told_as_they_are():
    episode = tasks.make("babilong_qa2", keys="train").episode(0, DEPTHS)
    assert loosely(episode, random.Random(0)) is episode


def test_the_same_numbers_give_the_same_words():
    episode = tasks.make("niah_multikey_1", forms="train", keys="train").episode(0, DEPTHS)
    one, same, other = (loosely(episode, random.Random(seed)) for seed in (1, 1, 2))
    assert one == same != other
