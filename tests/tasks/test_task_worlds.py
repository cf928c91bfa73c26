"""BABILong against a reader that plays the stories of a text over again."""

import random
import re

import pytest
from reading import compose, window

from gemma_jax import tasks
from gemma_jax.errors import UsageError
from gemma_jax.tasks import babilong
from gemma_jax.tasks.words import KEYS

QA = tuple(f"babilong_qa{number}" for number in (1, 2, 3, 4, 5))
MOVE = r"(?P<mover>\w+) (?:moved to|went to|went back to|journeyed to|travelled to) the (?P<room>[\w-]+)\."
TAKE = r"(?P<taker>\w+) (?:took|got|grabbed|picked up) the (?P<taken>\w+)(?: there)?\."
DROP = r"(?P<dropper>\w+) (?:dropped|discarded|put down|left) the (?P<dropped>\w+)(?: there)?\."
GIVE = r"(?P<giver>\w+) (?:gave|handed|passed) the (?P<given>\w+) to (?P<receiver>\w+)\."
SIDE = r"The (?P<a>[\w-]+) is (?P<side>north|south|east|west) of the (?P<b>[\w-]+)\."
ANY = re.compile("|".join((MOVE, TAKE, DROP, GIVE, SIDE)))
TURNED = {"north": "south", "south": "north", "east": "west", "west": "east"}


class Reader:
    """Believes every sentence that reads like one of a story, and answers from what it believes."""

    def __init__(self, text: str):
        self.room: dict[str, str] = {}
        self.holder: dict[str, str] = {}
        self.rooms_of: dict[str, list[str]] = {}
        self.gifts: list[tuple[str, str, str]] = []
        self.sides: set[tuple[str, str, str]] = set()
        for match in ANY.finditer(text):
            self._believe(match.groupdict())

    def _believe(self, told: dict[str, str | None]) -> None:
        if told["mover"]:
            self.room[told["mover"]] = told["room"]
            for thing, holder in self.holder.items():
                if holder == told["mover"]:
                    self._seen(thing, told["room"])
        elif told["taker"]:
            self.holder[told["taken"]] = told["taker"]
            self._seen(told["taken"], self.room.get(told["taker"]))
        elif told["dropper"]:
            self.holder.pop(told["dropped"], None)
            self._seen(told["dropped"], self.room.get(told["dropper"]))
        elif told["giver"]:
            self.gifts.append((told["giver"], told["given"], told["receiver"]))
        else:
            self.sides.add((told["a"], told["side"], told["b"]))
            self.sides.add((told["b"], TURNED[told["side"]], told["a"]))

    def _seen(self, thing: str, room: str | None) -> None:
        seen = self.rooms_of.setdefault(thing, [])
        if room and seen[-1:] != [room]:
            seen.append(room)

    def answers(self, question: str) -> set[str]:
        """All that could be meant."""
        if m := re.search(r"Where is the (\w+)\?", question):
            return set(self.rooms_of.get(m[1], [])[-1:])
        if m := re.search(r"Where is (\w+)\?", question):
            return {self.room[m[1]]} if m[1] in self.room else set()
        if m := re.search(r"Where was the (\w+) before the ([\w-]+)\?", question):
            rooms = self.rooms_of.get(m[1], [])
            return {a for a, b in zip(rooms, rooms[1:], strict=False) if b == m[2]}
        if m := re.search(r"What is (\w+) of the ([\w-]+)\?", question):
            return {a for a, side, b in self.sides if (side, b) == m.groups()}
        if m := re.search(r"What is the ([\w-]+) (\w+) of\?", question):
            return {b for a, side, b in self.sides if (a, side) == m.groups()}
        if m := re.search(r"Who gave the (\w+) to (\w+)\?", question):
            return {g for g, thing, r in self.gifts if (thing, r) == m.groups()}
        if m := re.search(r"What did (\w+) give to (\w+)\?", question):
            return {thing for g, thing, r in self.gifts if (g, r) == m.groups()}
        if m := re.search(r"Who did (\w+) give the (\w+) to\?", question):
            return {r for g, thing, r in self.gifts if (g, thing) == m.groups()}
        if m := re.search(r"Who gave the (\w+)\?", question):
            return {g for g, thing, _ in self.gifts if thing == m[1]}
        m = re.search(r"Who received the (\w+)\?", question)
        return {r for _, thing, r in self.gifts if thing == m[1]}


@pytest.mark.parametrize("name", QA)
def test_a_reader_of_everything_knows_the_one_answer(name):
    for keys, haystack, seeds in (
        ("held_out", "grass", 25),
        ("train", "grass", 5),
        ("all", "books", 2),
    ):
        task = tasks.make(name, keys=keys, haystack=haystack)
        for seed in range(seeds):
            episode = task.episode(
                seed, [0.7] if seed % 2 else [0, 0.25, 0.5, 0.75, 1], 1 + seed % 2
            )
            reader = Reader(compose(task, episode, 5000))
            for question in episode.questions:
                assert reader.answers(question.text) == set(question.answers), question


@pytest.mark.parametrize("name", QA)
def test_more_questions_about_a_story_have_one_answer_too_and_the_first_stays(name):
    task = tasks.make(name, haystack="grass")
    more = task.asking_more(3)
    found = 0
    for seed in range(25):
        episode, one = more.episode(seed, [0.7]), task.episode(seed, [0.7])
        assert (episode.facts, episode.questions[0].answers) == (
            one.facts,
            one.questions[0].answers,
        )
        reader = Reader(compose(task, episode, 5000))
        asked = {re.search(r"[^.?]*\?", question.text)[0] for question in episode.questions}
        assert len(asked) == len(episode.questions) <= 4
        found += len(asked)
        for question in episode.questions:
            assert reader.answers(question.text) == set(question.answers), question
            told = "".join(episode.facts[index].text for index in question.facts)
            assert Reader(told).answers(question.text) == set(question.answers)
    assert found > 40
    assert tasks.make("passkey").asking_more(3).episode(0, [0.5]).questions[1:] == ()


@pytest.mark.parametrize("name", QA)
def test_the_facts_that_a_question_names_are_enough_and_the_last_is_at_its_depth(name):
    task = tasks.make(name)
    for seed in range(20):
        episode = task.episode(seed, [0.1, 0.6])
        for question in episode.questions:
            facts = [episode.facts[index] for index in question.facts]
            assert len(facts) == {"babilong_qa2": 2, "babilong_qa3": 3}.get(name, 1)
            assert facts[-1].depth == question.depth
            told = "".join(fact.text for fact in facts)
            assert Reader(told).answers(question.text) == set(question.answers)


@pytest.mark.parametrize("name", QA)
def test_who_sees_only_the_end_scores_no_more_than_chance(name):
    task, rng = tasks.make(name, haystack="grass"), random.Random(0)
    scores = []
    for seed in range(300):
        episode = task.episode(seed, [0.3])
        (question,) = episode.questions
        possible = possible_answers(name, question.text)
        facts = [fact for fact in episode.facts if fact.depth > 0.7]
        seen = Reader("".join(fact.text for fact in facts)).answers(question.text)
        scores.append(task.score(question, rng.choice(sorted(seen or possible))))
    assert abs(sum(scores) / len(scores) - task.chance) < 0.08


@pytest.mark.parametrize("name", QA)
def test_chance_is_that_of_a_guess_among_what_the_question_leaves_possible(name):
    task = tasks.make(name)
    asked = [task.episode(seed, [0.5]).questions[0].text for seed in range(400)]
    chances = [1 / len(possible_answers(name, question)) for question in asked]
    assert abs(sum(chances) / len(chances) - task.chance) < 0.005


def possible_answers(name: str, question: str) -> set[str]:
    """What can be answered by who knows bAbI's names and the question."""
    if name != "babilong_qa5":
        possible = set(babilong.ROOMS)
    elif "What did" in question:
        possible = set(babilong.OBJECTS)
    else:
        possible = set(babilong.PEOPLE_WHO_GIVE)
    return possible - set(re.findall(r"[\w-]+", question))


def test_one_story_has_the_names_and_as_many_sentences_as_in_babi():
    limits = {"qa1": (2, 10), "qa2": (2, 68), "qa3": (4, 320), "qa4": (2, 2), "qa5": (2, 126)}
    for name in QA:
        counts = [len(tasks.make(name).episode(seed, [0.5]).facts) for seed in range(60)]
        least, most = limits[name.removeprefix("babilong_")]
        assert least <= min(counts) <= max(counts) <= most
        assert min(counts) <= least + (most - least) / 10
        assert max(counts) > most / 2
    names = set(re.findall(r"[A-Z]\w+", "".join(map(str, stories("babilong_qa5", 30)))))
    assert names - {"Mary", "Fred", "Bill", "Jeff"} == set()
    for name in ("babilong_qa1", "babilong_qa4"):
        rooms = set(re.findall(r"the (\w+)", "".join(stories(name, 30))))
        assert rooms == {"kitchen", "bathroom", "hallway", "garden", "office", "bedroom"}


def stories(name: str, seeds: int) -> list[str]:
    task = tasks.make(name)
    return [fact.text for seed in range(seeds) for fact in task.episode(seed, [0.5]).facts]


@pytest.mark.parametrize("name", QA)
def test_twenty_stories_of_one_text_share_no_name(name):
    episode = tasks.make(name).episode(0, [0, 0.25, 0.5, 0.75, 1], 4)
    assert len({question.text for question in episode.questions}) == 20
    reader = Reader("".join(fact.text for fact in episode.facts))
    for question in episode.questions:
        assert reader.answers(question.text) == set(question.answers)
    with pytest.raises(UsageError, match="fewer"):
        tasks.make(name).episode(0, [0.5], 200)


def test_training_has_no_name_of_a_test_but_babis_own():
    def names(keys):
        return {
            word
            for name in QA
            for seed in range(3)
            for question in tasks.make(name, keys=keys).episode(seed, [0.2, 0.8], 8).questions
            for word in re.findall(r"[A-Z]\w+|the ([\w-]+)", question.text)
        } - {"", "Who", "What", "Where"}

    own = {*babilong.OBJECTS, *babilong.ROOMS}
    held_out = set(babilong.MORE_OBJECTS[1::2]) | set(babilong.MORE_ROOMS[1::2])
    train = set(babilong.MORE_OBJECTS[::2]) | set(babilong.MORE_ROOMS[::2])
    assert names("train") & held_out == set() and names("train") & train and names("train") & own
    assert names("held_out") & train == set() and names("held_out") & held_out
    assert names("held_out") & own


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("name", QA)
def test_all_names_of_a_story_are_in_the_tasks_vocabulary_and_the_first_are_babis(name, keys):
    task = tasks.make(name, keys=keys)
    own = {*babilong.PEOPLE, *babilong.PEOPLE_WHO_GIVE, *babilong.OBJECTS, *babilong.ROOMS}
    for seed in range(5):
        assert names_in(task.episode(seed, [0.5])) <= own & set(task.vocabulary)
        several = task.episode(seed, [0.2, 0.8], 4)
        found = names_in(several)
        assert found <= set(task.vocabulary) and found & own and found - own
        assert {answer for q in several.questions for answer in q.answers} <= found
    train, held_out, every = (
        set(tasks.make(name, keys=split).vocabulary) for split in ("train", "held_out", "all")
    )
    assert train & held_out <= own and train | held_out == every


def names_in(episode) -> set[str]:
    """The people, objects and rooms of its sentences."""
    told = [ANY.fullmatch(fact.text.strip()).groupdict() for fact in episode.facts]
    return {name for each in told for kind, name in each.items() if name and kind != "side"}


def test_window_of_the_text_is_not_enough():
    task = tasks.make("babilong_qa1", haystack="grass")
    for seed in range(10):
        episode = task.episode(seed, [0.3])
        text = compose(task, episode, 1500)
        assert Reader(window(text)).answers(episode.questions[0].text) == set()
