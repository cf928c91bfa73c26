"""Answers made by hand: the first candidates count, and listing guesses scores nothing."""

import pytest

from gemma_jax import tasks
from gemma_jax.tasks.base import Question
from gemma_jax.tasks.scoring import NUMBER, UUID, one_of, share_found

ID = "0fb1a2c3-1111-4222-8333-abcdefabcdef"
OTHER_ID = "ffffffff-1111-4222-8333-abcdefabcdef"


@pytest.mark.parametrize(
    "answer, score",
    [
        (" 12345.", 1.0),
        ("12345", 1.0),
        (" the number is 12345, I am sure", 1.0),
        (" 12,345", 1.0),
        ("**12345**", 1.0),
        ("\n12345\n99999", 1.0),
        (" 99999 or 12345", 0.0),
        (" 1234 12345", 0.0),
        (" 123456", 0.0),
        (" 1 2 3 4 5", 0.0),
        (" no idea", 0.0),
        ("", 0.0),
    ],
)
def test_the_first_number_is_the_answer(answer, score):
    assert share_found(answer, ["12345"], NUMBER) == score


@pytest.mark.parametrize(
    "answer, score",
    [
        (f" {ID}.", 1.0),
        (f" {ID.upper()}", 1.0),
        (f" it is a well-known id: {ID}", 1.0),
        (f" {OTHER_ID} {ID}", 0.0),
        (f" {ID[:-1]}", 0.0),
        (f" {ID}0", 0.0),
        (f" {ID[:8]}", 0.0),
    ],
)
def test_the_first_uuid_is_the_answer(answer, score):
    assert share_found(answer, [ID], UUID) == score


@pytest.mark.parametrize(
    "answer, score",
    [
        (" 1111111, 2222222, 3333333 and 4444444.", 1.0),
        (" 4444444, 3333333, 2222222, 1111111", 1.0),
        (" 1111111, 1111111, 2222222, 3333333, 4444444", 1.0),
        (" 1111111, 5555555, 2222222, 3333333, 4444444", 0.75),
        (" 1111111, 2222222", 0.5),
        (" 9999999 8888888 7777777 6666666 1111111 2222222 3333333 4444444", 0.0),
        ("1,111,111 and 2,222,222", 0.5),
    ],
)
def test_of_several_values_as_many_candidates_count_as_there_are_values(answer, score):
    references = ["1111111", "2222222", "3333333", "4444444"]
    assert share_found(answer, references, NUMBER) == score


def test_words_are_whole_and_of_any_case():
    rooms = one_of(["bath", "bathroom", "garden"])
    assert share_found(" The Bathroom.", ["bathroom"], rooms) == 1.0
    assert share_found(" bathrooms, then the bathroom", ["bathroom"], rooms) == 1.0
    assert share_found(" garden? bathroom", ["bathroom"], rooms) == 0.0
    assert share_found(" winter-garden, bathroom", ["bathroom"], rooms) == 1.0
    shouts = one_of(["no!", "yes"])  # one ends in a sign
    assert share_found(" No! Yes", ["no!"], shouts) == 1.0
    assert share_found(" yesterday: no!", ["no!"], shouts) == 1.0


@pytest.mark.parametrize(
    "name, text, reference, right, wrong",
    [
        ("babilong_qa1", "Where is Mary?", "garden", "She is in the garden", "kitchen garden"),
        (
            "babilong_qa3",
            "Where was the milk before the kitchen?",
            "office",
            "Before the kitchen it was in the office",
            "the hallway, the office",
        ),
        (
            "babilong_qa4",
            "What is north of the attic?",
            "cellar",
            "North of the attic is the cellar",
            "bedroom or cellar",
        ),
        (
            "babilong_qa4",
            "What is the wine-cellar north of?",
            "attic",
            "The wine-cellar is north of the attic",
            "cellar, attic",
        ),
        (
            "babilong_qa5",
            "Who gave the milk to Bill?",
            "Fred",
            "Bill got the milk from fred",
            "Jeff, Fred",
        ),
        ("mqar", "abab =", "apron", " Apron", "acorn apron"),
        ("variable_tracking", "", "ABCDE", "VAR ABCDE", "EDCBA ABCDE"),
        ("frequent_words", "", "badelufo", "The words: badelufo", "dobadobi badelufo"),
    ],
)
def test_the_first_possible_word_is_the_answer(name, text, reference, right, wrong):
    task, question = tasks.make(name), Question(text, (reference,), (), 0.5)
    assert task.score(question, right) == 1.0
    assert task.score(question, wrong) == 0.0
    assert task.score(question, "none of them") == 0.0


def test_all_possible_words_listed_score_no_more_than_the_first_of_them():
    task = tasks.make("babilong_qa1")
    rooms = ["kitchen", "bathroom", "hallway", "garden", "office", "bedroom"]
    scores = [
        task.score(Question("Where is John?", (r,), (), 0.5), ", ".join(rooms)) for r in rooms
    ]
    assert scores == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
