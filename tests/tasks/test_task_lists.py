"""Variables, word counts and pairs, against readers that do the sums."""

import collections
import random
import re

import pytest
from reading import compose, window

from gemma_jax import tasks
from gemma_jax.errors import UsageError
from gemma_jax.tasks import recall
from gemma_jax.tasks.forms import FORMS, RECALL, VARIABLES

WORD = re.compile(r"\b(?:[bdflmnprstvz][aeiou]){4}\b")


def recall_variables(text: str, question: str, forms: str) -> list[str]:
    """Follows every assignment of the text, in order."""
    value_of: dict[str, str] = {}
    sentences = dict.fromkeys(VARIABLES[forms].facts + VARIABLES[forms].facts_of_several)
    patterns = (
        re.escape(form)
        .replace(re.escape("{name}"), "(?P<name>[A-Z]{5})")
        .replace(re.escape("{source}"), r"(?P<source>[A-Z]{5}|\d{5})")
        for form in sentences
    )
    told = sorted(
        (match.start(), match["name"], match["source"])
        for pattern in patterns
        for match in re.finditer(pattern, text)
    )
    for _, name, source in told:
        value_of[name] = value_of.get(source, source)
    wanted = re.search(r"\d{5}", question)[0]
    return [name for name, value in value_of.items() if value == wanted]


@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("haystack", ["grass", "books"])
def test_variables_are_found_by_following_every_assignment(forms, haystack):
    task = tasks.make("variable_tracking", forms=forms, haystack=haystack)
    for seed in range(4):
        episode = task.episode(seed, [0, 0.5, 1], 1 + 3 * (seed % 2))
        text = compose(task, episode, 2000)
        for question in episode.questions:
            names = recall_variables(text, question.text, forms)
            assert len(names) == len(question.answers) == 5
            assert task.score(question, ", ".join(names)) == 1.0
            if question.depth < 0.6:
                ending = recall_variables(window(text), question.text, forms)
                assert task.score(question, ", ".join(ending)) == 0.0


@pytest.mark.parametrize("name, count", [("common_words", 10), ("frequent_words", 3)])
def test_the_words_asked_for_are_the_most_frequent_ones(name, count):
    task = tasks.make(name)
    for seed in range(5):
        episode = task.episode(seed, [0.6])
        text = compose(task, episode, 3000)
        (question,) = episode.questions
        counts = collections.Counter(WORD.findall(text)).most_common(count + 1)
        assert counts[count - 1][1] > 1.8 * counts[count][1] or name == "common_words"
        assert counts[count - 1][1] >= 10 > counts[count][1]
        best = [word for word, _ in counts[:count]]
        assert task.score(question, " ".join(best)) == 1.0
        # At the end of the text none of them is left.
        ending = collections.Counter(WORD.findall(window(text))).most_common(count)
        assert task.score(question, " ".join(word for word, _ in ending)) == 0.0


@pytest.mark.parametrize("name, most", [("common_words", 3), ("frequent_words", 2)])
def test_rare_words_stay_rare_at_any_length(name, most):
    task = tasks.make(name)
    episode = task.episode(0, [0.5])
    text = compose(task, episode, 40_000)
    counts = collections.Counter(WORD.findall(text))
    facts = {fact.text.strip() for fact in episode.facts}
    assert max(count for word, count in counts.items() if word not in facts) == most
    with pytest.raises(UsageError, match="one question about a text"):
        task.episode(0, [0.2, 0.5])
    assert task.most_questions == 1


@pytest.mark.parametrize("forms", FORMS)
def test_pairs_are_found_by_their_keys(forms):
    task, rng = tasks.make("mqar", forms=forms), random.Random(0)
    guesses = []
    for seed in range(4):
        episode = task.episode(seed, [0, 0.5, 1], 40)
        text = compose(task, episode, 3000)
        for question in episode.questions:
            key = WORD.search(question.text)[0]
            (line,) = [line for line in text.splitlines() if key in line]
            value = line.split()[-1]
            assert value in recall.VALUES and task.score(question, f" {value}") == 1.0
            if question.depth < 0.6:
                assert key not in window(text)
                guesses.append(task.score(question, rng.choice(recall.VALUES)))
    assert sum(guesses) / len(guesses) < 4 * task.chance


def test_no_wording_of_a_list_is_in_training_and_in_tests():
    for wording in (VARIABLES, RECALL):
        for field in ("facts", "questions"):
            every = [form for forms in FORMS for form in getattr(wording[forms], field)]
            assert len(every) == len(set(every))
