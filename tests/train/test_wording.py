"""Facts in other words: what answers a question stays."""

import random
import re

import pytest

from gemma_jax import tasks
from gemma_jax.train.wording import loosely

DEPTHS = [0.1, 0.4, 0.8]


def words(text):
    return re.findall(r"[\w-]+", text)


def both(name, forms, seed):
    episode = tasks.make(name, forms=forms, keys="train").episode(seed, DEPTHS)
    return episode, loosely(episode, random.Random(seed))


@pytest.mark.parametrize("name", ["passkey", "niah_single_2", "niah_single_3", "niah_multivalue"])
@pytest.mark.parametrize("forms", ["train", "classic"])
def test_keys_and_values_stay_in_their_order_and_other_words_change(name, forms):
    facts = questions = 0
    for seed in range(20):
        episode, loose = both(name, forms, seed)
        assert [fact.depth for fact in loose.facts] == [fact.depth for fact in episode.facts]
        for question, other in zip(episode.questions, loose.questions, strict=True):
            assert other.answers == question.answers and other.facts == question.facts
            asked = set(words(question.text))
            for i in question.facts:
                told = words(episode.facts[i].text)
                matters = asked & set(told) if name == "passkey" else set()
                for before, after in (
                    (question.text, other.text),
                    (episode.facts[i].text, loose.facts[i].text),
                ):
                    kept = [w for w in words(before) if w in matters or not w.isalpha()]
                    still = iter(words(after))
                    assert kept and all(word in still for word in kept)
                    assert re.match(r"\s*", after)[0] == re.match(r"\s*", before)[0]
                facts += loose.facts[i].text != episode.facts[i].text
            questions += other.text != question.text
    assert facts > 20 and questions > 10


def test_words_do_not_tell_which_needles_are_asked_for():
    changed = {True: [], False: []}
    for seed in range(100):
        episode, loose = both("niah_multikey_1", "classic", seed)
        asked = {i for question in episode.questions for i in question.facts}
        for i, (before, after) in enumerate(zip(episode.facts, loose.facts, strict=True)):
            changed[i in asked].append(before.text != after.text)
    shares = [sum(found) / len(found) for found in changed.values()]
    assert min(shares) > 0.5 and abs(shares[0] - shares[1]) < 0.12


def test_stories_are_told_as_they_are():
    episode, loose = both("babilong_qa2", "train", 0)
    assert loose is episode


def test_the_same_numbers_give_the_same_words():
    episode = tasks.make("niah_multikey_1", forms="train", keys="train").episode(0, DEPTHS)
    one, same, other = (loosely(episode, random.Random(seed)) for seed in (1, 1, 2))
    assert one == same != other
