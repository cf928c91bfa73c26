"""What is planted: out of sight of local attention, never repeated, scored by its own task."""

import pytest

from gemma_jax.demo.planting import make_tasks, plant
from gemma_jax.errors import UsageError
from gemma_jax.tasks import haystacks
from gemma_jax.text import batch_encoder, load_tokenizer

WANTED = {"passkey": 1, "niah_multikey_1": 3, "babilong_qa1": 2}
REACH = 40


@pytest.fixture
def planted_with(tokenizer_directory):
    def call(wanted=WANTED, tokens=6000, seed=0):
        return plant(
            make_tasks(wanted),
            tokens=tokens,
            seed=seed,
            reach=REACH,
            books=haystacks.shipped("held_out"),
            encode_batch=batch_encoder(load_tokenizer(tokenizer_directory)),
            bos_id=2,
        )

    return call


def ids_of(planted):
    return [i for some in planted.text() for i in some]


@pytest.mark.parametrize("seed", range(4))
def test_all_that_is_asked_for_stands_beyond_the_reach_of_local_attention(planted_with, seed):
    planted = planted_with(seed=seed)
    text = planted.text()
    ids = [i for some in text for i in some]
    assert 5700 < len(ids) < 6000 and text.tokens == len(ids)
    distances = [text.trial(asked)["distance"] for asked in planted.asked]
    assert len(distances) == sum(WANTED.values())
    assert min(distances) > REACH and max(distances) > 3000
    for asked, distance in zip(planted.asked, distances, strict=True):
        end = len(ids) + len(asked.ids) - distance  # just behind the last fact that it needs
        fact = planted.encode_batch([f" {planted.facts(asked)[-1]}"])[0]
        assert ids[end - len(fact) : end] == fact


def test_facts_hold_the_answers_and_some_are_planted_that_nobody_asks_for(planted_with):
    planted = planted_with()
    for asked in planted.asked:
        assert asked.question.answers[0] in " ".join(planted.facts(asked))
    assert planted.others >= 3  # of niah_multikey_1


def test_nothing_of_the_books_is_shown_twice(planted_with):
    text = (planted := planted_with(tokens=50_000)).text()
    for _ in text:
        pass
    assert text.trial(planted.asked[0])["repeated_share"] == 0


def test_each_question_is_scored_by_its_own_task(planted_with):
    planted = planted_with()
    for task, asked in zip(planted.tasks, planted.asked, strict=True):
        assert task.score(asked.question, asked.question.reply) == 1
        assert task.score(asked.question, " nothing of the kind") == 0
    assert [task.name for task in planted.tasks] == [n for n, c in WANTED.items() for _ in range(c)]


def test_the_same_seed_gives_the_same_text_and_questions_and_another_seed_others(planted_with):
    first, again, other = planted_with(), planted_with(), planted_with(seed=1)
    assert ids_of(first) == ids_of(first) == ids_of(again) != ids_of(other)
    questions = [[asked.question for asked in planted.asked] for planted in (first, again, other)]
    assert questions[0] == questions[1] != questions[2]


@pytest.mark.parametrize(
    "wanted, tokens, word",
    [
        ({"perfection": 1}, 6000, "perfection"),
        ({"common_words": 1}, 6000, "common_words"),
        ({"babilong_qa1": 1, "babilong_qa2": 1}, 6000, "contradict"),
        ({"passkey": 1}, 500, "--tokens"),
        ({"passkey": 100}, 2000, "too few"),
        ({"babilong_qa1": 26}, 90_000, "stories"),
    ],
)
def test_what_cannot_be_planted_is_a_usage_error(planted_with, wanted, tokens, word):
    with pytest.raises(UsageError, match=word):
        planted_with(wanted, tokens)
