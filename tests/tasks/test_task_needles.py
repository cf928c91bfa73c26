"""Passkeys and needles against a reader that looks for their sentences in the text."""

import itertools
import random
import re

import pytest
from reading import compose, found, window

from gemma_jax import tasks
from gemma_jax.errors import UsageError
from gemma_jax.tasks import needles, words
from gemma_jax.tasks.forms import FORMS, NEEDLES, PASSKEY

DEPTHS = (0.0, 0.5, 1.0)
KEYED = {
    "number": re.compile(r"[a-z]+-[a-z]+"),
    "UUID": re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
}


def recall_passkey(text: str, question: str, forms: str) -> str:
    owner = re.search(r" of the [a-z]+ [a-z]+", question)
    names = "(?:" + "|".join(PASSKEY[forms].names) + ")"
    (value,) = found(text, PASSKEY[forms].facts, "value", what=names, of=owner[0] if owner else "")
    return f"I think {value}."


def recall_needles(text: str, name: str, question: str, forms: str) -> str:
    kind = needles.KINDS[name]
    wording = NEEDLES[forms]
    sentences = wording.facts_of_several if kind.values_per_key > 1 else wording.facts
    keys = dict.fromkeys(KEYED["UUID" if kind.keys == "UUID" else "number"].findall(question))
    values = [v for key in keys for v in found(text, sentences, "value", key=key, kind=kind.values)]
    return " and ".join(values)


@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("haystack", ["grass", "books"])
def test_passkeys_are_where_they_were_asked_for(forms, haystack):
    for seed in range(3):
        task = tasks.make("passkey", forms=forms, haystack=haystack)
        for count in (1, 4):
            episode = task.episode(seed, [0.5] if count == 1 else DEPTHS, count)
            text = compose(task, episode, 1500)
            for question in episode.questions:
                assert task.score(question, recall_passkey(text, question.text, forms)) == 1.0
                if question.depth < 0.6:
                    with pytest.raises(ValueError, match="not enough"):
                        recall_passkey(window(text), question.text, forms)


@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("name", needles.KINDS)
def test_every_needle_is_found_by_its_key_and_only_where_it_is(name, forms):
    task = tasks.make(name, forms=forms)
    for seed in range(2):
        for count in (1, 3):
            episode = task.episode(seed, DEPTHS, count)
            text = compose(task, episode, 1500)
            for question in episode.questions:
                answer = recall_needles(text, name, question.text, forms)
                assert task.score(question, answer) == 1.0
                if question.depth < 0.6:
                    ending = recall_needles(window(text), name, question.text, forms)
                    assert task.score(question, ending) == 0.0


@pytest.mark.parametrize("name", ["passkey", "niah_single_2", "niah_multikey_3", "mqar"])
def test_hundreds_of_questions_are_asked_about_one_text(name):
    task = tasks.make(name)
    episode = task.episode(0, (0, 0.25, 0.5, 0.75, 1), 100)
    assert len({question.text for question in episode.questions}) == 500
    assert [fact.depth for fact in episode.facts] == sorted(fact.depth for fact in episode.facts)
    for question in episode.questions:
        (fact,) = question.facts
        assert question.answers[0] in episode.facts[fact].text
        assert abs(episode.facts[fact].depth - question.depth) <= 0.05


def test_the_facts_of_a_question_end_at_its_depth():
    for name in ("niah_multivalue", "niah_multiquery", "variable_tracking"):
        episode = tasks.make(name).episode(1, [0.25, 0.75])
        for question in episode.questions:
            assert max(episode.facts[fact].depth for fact in question.facts) == question.depth


def test_multikey_1_hides_three_needles_that_nobody_asks_for():
    episode = tasks.make("niah_multikey_1").episode(0, [0.5])
    assert len(episode.facts) == 4 and len(episode.questions) == 1


def test_a_haystack_of_needles_never_has_a_key_that_is_asked_for():
    task = tasks.make("niah_multikey_2")
    episode = task.episode(0, DEPTHS, 5)
    asked = {KEYED["number"].search(question.text)[0] for question in episode.questions}
    every = len(list(words.keys(random.Random(0), "held_out")))
    filler = task.filler(episode, ())
    others = [KEYED["number"].search(next(filler).text)[0] for _ in range(every + 100)]
    assert len(asked) == 15 and asked.isdisjoint(others)
    assert set(others[-100:]) <= set(others[:-100]), "after all other keys they come again"


def test_a_haystack_of_needles_needs_a_key_of_its_own():
    task = tasks.make("niah_multivalue", haystack="needles")
    most = len(list(words.keys(random.Random(0), "held_out"))) - 1
    episode = task.episode(0, [0.5], most)
    asked = {question.text for question in episode.questions}
    (other,) = {
        KEYED["number"].search(piece.text)[0]
        for piece in itertools.islice(task.filler(episode, ()), 9)
    }
    assert len(asked) == most and not any(f"for {other} " in question for question in asked)
    with pytest.raises(UsageError, match="different keys"):
        task.episode(0, [0.5], most + 1)


def test_invented_keys_are_as_many_all_different_and_of_no_listed_word():
    train, invented = (list(words.keys(random.Random(1), split)) for split in ("train", "invented"))
    assert len(invented) == len(set(invented)) == len(train)
    known = {*words.ADJECTIVES, *words.NOUNS}
    assert not known & {part for key in invented for part in key.split()}
    assert invented != list(words.keys(random.Random(2), "invented"))


def test_training_shares_no_word_of_a_key_and_no_wording_with_the_tests():
    def parts(split):
        return {part for key in words.keys(random.Random(0), split) for part in key.split()}

    assert parts("train").isdisjoint(parts("held_out"))
    assert parts("all") == parts("train") | parts("held_out")
    for wording in (PASSKEY, NEEDLES):
        for field in ("facts", "questions", "facts_of_several", "questions_of_several", "names"):
            every = [form for forms in FORMS for form in getattr(wording[forms], field)]
            assert len(every) == len(set(every))
        assert len(wording["train"].facts) >= 12 and len(wording["train"].questions) >= 12


def test_what_cannot_be_made_is_refused_by_name():
    with pytest.raises(UsageError, match="no task called 'niah'.*passkey"):
        tasks.make("niah")
    with pytest.raises(UsageError, match="choose grass, books"):
        tasks.make("passkey", haystack="needles")
    with pytest.raises(UsageError, match="classic, train, held_out"):
        tasks.make("passkey", forms="new")
    with pytest.raises(UsageError, match="train, invented, held_out, all"):
        tasks.make("passkey", keys="new")
    with pytest.raises(UsageError, match="different names"):
        tasks.make("passkey").episode(0, [0.5], 20_000)
    with pytest.raises(UsageError, match="between 0 and 1"):
        tasks.make("passkey").episode(0, [50])
    with pytest.raises(UsageError, match="at least one"):
        tasks.make("passkey").episode(0, [])


def test_every_name_makes_a_task_of_that_name_that_scores_its_own_reply():
    for name in tasks.names():
        task = tasks.make(name)
        assert task.name == name and 0 <= task.chance < 0.5
        (question,) = task.episode(5, [0.5]).questions
        assert task.score(question, question.reply) == 1.0
        assert task.score(question, "") == task.score(question, " I do not know.") == 0.0
