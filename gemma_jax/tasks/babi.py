"""The worlds of bAbI's first five tasks: people move between rooms, take, drop and give objects.

Everything happens in sentences of one fact each. A story ends with a question that its sentences answer
in one way only, and knows which of them it takes.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Sequence

MOVES = ("moved to", "went to", "went back to", "journeyed to", "travelled to")
TAKES = ("took", "got", "grabbed", "picked up")
DROPS = ("dropped", "discarded", "put down", "left")
GIVES = ("gave", "handed", "passed")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question that the sentences of a story answer in one way only."""

    question: str
    lead: str  # how an answer begins, up to the word that is asked for
    answer: str
    needed: tuple[int, ...]  # sentences that it takes, in their order


@dataclasses.dataclass(frozen=True)
class Story:
    """Sentences, the question it is told for, and what else could be asked in the same manner."""

    sentences: tuple[str, ...]
    asked: Asked
    others: tuple[Asked, ...]


@dataclasses.dataclass(frozen=True)
class Cast:
    """Who and what a story is about."""

    people: Sequence[str]
    objects: Sequence[str]
    rooms: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Event:
    """What one sentence tells."""

    kind: str  # move, take, drop, give
    person: str
    thing: str  # the room of a move, else the object
    receiver: str = ""

    def sentence(self, rng: random.Random) -> str:
        there = rng.choice(("", " there"))
        if self.kind == "move":
            return f"{self.person} {rng.choice(MOVES)} the {self.thing}."
        if self.kind == "take":
            return f"{self.person} {rng.choice(TAKES)} the {self.thing}{there}."
        if self.kind == "drop":
            return f"{self.person} {rng.choice(DROPS)} the {self.thing}{there}."
        return f"{self.person} {rng.choice(GIVES)} the {self.thing} to {self.receiver}."


class World:
    """Where everybody and everything is; at the start nobody has said so."""

    def __init__(self, cast: Cast, kinds: Sequence[str], rng: random.Random):
        self._cast, self._kinds, self._rng = cast, kinds, rng
        self._room = {person: rng.choice(cast.rooms) for person in cast.people}
        self._lies_in: dict[str, str] = {thing: rng.choice(cast.rooms) for thing in cast.objects}
        self._holder: dict[str, str] = {}

    def step(self) -> Event:
        """Somebody does something that is possible: a move, or one of the other kinds."""
        person = self._rng.choice(self._cast.people)
        if self._rng.random() < 0.5 and (possible := self._possible(person)):
            event = self._rng.choice(possible)
        else:
            rooms = [room for room in self._cast.rooms if room != self._room[person]]
            event = Event("move", person, self._rng.choice(rooms))
        self._happen(event)
        return event

    def _possible(self, person: str) -> list[Event]:
        room = self._room[person]
        held = [thing for thing in self._cast.objects if self._holder.get(thing) == person]
        lying = [thing for thing in self._cast.objects if self._lies_in.get(thing) == room]
        near = [p for p in self._cast.people if p != person and self._room[p] == room]
        events = [
            *(Event("take", person, thing) for thing in lying),
            *(Event("drop", person, thing) for thing in held),
            *(Event("give", person, thing, receiver) for thing in held for receiver in near),
        ]
        return [event for event in events if event.kind in self._kinds]

    def _happen(self, event: Event) -> None:
        if event.kind == "move":
            self._room[event.person] = event.thing
        elif event.kind == "drop":
            del self._holder[event.thing]
            self._lies_in[event.thing] = self._room[event.person]
        else:
            self._lies_in.pop(event.thing, None)
            self._holder[event.thing] = event.receiver or event.person


@dataclasses.dataclass(frozen=True)
class Stay:
    """A room that an object was in, and the events that say so."""

    room: str
    because: tuple[int, ...]


def trail(events: Sequence[Event], thing: str) -> list[Stay]:
    """The rooms that an object was in one after the other, as far as the events tell.

    The last one's reasons are those for where the object is at the end.
    """
    moved: dict[str, int] = {}  # the event that last moved each person
    stays: list[Stay] = []
    holder, taken = None, 0
    for index, event in enumerate(events):
        if event.kind == "move":
            moved[event.person] = index
            if event.person == holder:
                stays.append(Stay(event.thing, (taken, index)))
        elif event.thing == thing:
            holder = None if event.kind == "drop" else event.receiver or event.person
            taken = index
            if (move := moved.get(event.person)) is not None:
                # The object is where it was, but these are the latest events that say so.
                stays[-1:] = [Stay(events[move].thing, (move, index))]
    return stays


def one_fact(cast: Cast, length: int, rng: random.Random) -> Story | None:
    """QA1: where is a person?"""
    events = _events(cast, (), length, rng)
    last = {event.person: index for index, event in enumerate(events)}
    askable = [
        Asked(f"Where is {person}?", f"{person} is in the", events[at].thing, (at,))
        for person, at in sorted(last.items())
    ]
    return _told(events, askable, rng.choice(range(len(askable))), rng)


def two_facts(cast: Cast, length: int, rng: random.Random) -> Story | None:
    """QA2: where is an object?"""
    events = _events(cast, ("take", "drop"), length, rng)
    known = {thing: stays[-1] for thing in cast.objects if (stays := trail(events, thing))}
    if not known:
        return None
    askable = [
        Asked(
            f"Where is the {thing}?",
            f"The {thing} is in the",
            stay.room,
            tuple(sorted(stay.because)),
        )
        for thing, stay in sorted(known.items())
    ]
    return _told(events, askable, rng.choice(range(len(askable))), rng)


def three_facts(cast: Cast, length: int, rng: random.Random) -> Story | None:
    """QA3: where was an object before a room that it was in once?"""
    events = _events(cast, ("take", "drop"), length, rng)
    askable = []
    for thing in cast.objects:
        stays = trail(events, thing)
        rooms = [stay.room for stay in stays]
        for before, stay in itertools.pairwise(stays):
            because = sorted({*before.because, *stay.because})
            if rooms.count(stay.room) == 1 and len(because) == 3:
                question = f"Where was the {thing} before the {stay.room}?"
                lead = f"Before the {stay.room}, the {thing} was in the"
                askable.append(Asked(question, lead, before.room, tuple(because)))
    if not askable:
        return None
    return _told(events, askable, rng.choice(range(len(askable))), rng)


def two_arguments(cast: Cast, length: int, rng: random.Random) -> Story | None:
    """QA4: three rooms, two facts, and what is north (east, ...) of the one in the middle."""
    middle, *others = rng.sample(list(cast.rooms), 3)
    directions = rng.sample(sorted(OPPOSITE), 2)  # of the others, seen from the middle
    sentences = [
        rng.choice(
            (
                f"The {other} is {direction} of the {middle}.",
                f"The {middle} is {OPPOSITE[direction]} of the {other}.",
            )
        )
        for other, direction in zip(others, directions, strict=True)
    ]
    askable = [
        [
            Asked(
                f"What is {direction} of the {middle}?",
                f"{direction.capitalize()} of the {middle} is the",
                other,
                (index,),
            ),
            Asked(
                f"What is the {middle} {OPPOSITE[direction]} of?",
                f"The {middle} is {OPPOSITE[direction]} of the",
                other,
                (index,),
            ),
        ]
        for index, (other, direction) in enumerate(zip(others, directions, strict=True))
    ]
    asked = rng.choice(askable[rng.randrange(2)])
    rest = tuple(other for some in askable for other in some if other != asked)
    return Story(tuple(sentences), asked, rest)


def three_arguments(cast: Cast, length: int, rng: random.Random) -> Story | None:
    """QA5: who gave what to whom, where only one event can be meant."""
    events = _events(cast, ("take", "drop", "give"), length, rng)
    gifts = [(i, e.person, e.thing, e.receiver) for i, e in enumerate(events) if e.kind == "give"]
    askable: dict[int, list[Asked]] = {}
    for index, giver, thing, receiver in gifts:
        questions = (
            (
                f"Who gave the {thing} to {receiver}?",
                f"The {thing} was given to {receiver} by",
                giver,
            ),
            (f"What did {giver} give to {receiver}?", f"{giver} gave {receiver} the", thing),
            (f"Who did {giver} give the {thing} to?", f"{giver} gave the {thing} to", receiver),
            (f"Who gave the {thing}?", f"The {thing} was given by", giver),
            (f"Who received the {thing}?", f"The {thing} was received by", receiver),
        )
        fits = [
            sum((g[2], g[3]) == (thing, receiver) for g in gifts),
            sum((g[1], g[3]) == (giver, receiver) for g in gifts),
            sum((g[1], g[2]) == (giver, thing) for g in gifts),
            *[sum(g[2] == thing for g in gifts)] * 2,
        ]
        for kind, (question, count) in enumerate(zip(questions, fits, strict=True)):
            if count == 1:
                askable.setdefault(kind, []).append(Asked(*question, (index,)))
    if not askable:
        return None
    asked = rng.choice(askable[rng.choice(sorted(askable))])
    everything = list(itertools.chain(*askable.values()))
    return _told(events, everything, everything.index(asked), rng)


@dataclasses.dataclass(frozen=True)
class Kind:
    """One of bAbI's tasks."""

    make: Callable[[Cast, int, random.Random], Story | None]  # None: nothing to ask about
    least: int  # sentences
    most: int
    chance: float  # of a guess among those that the question leaves possible
    skew: int = 3  # 1: all lengths are equally frequent; 3: a quarter of the range on average

    def story(self, cast: Cast, rng: random.Random) -> Story:
        """A story of any length within the limits."""
        share = math.prod([rng.random()] * self.skew)
        length = self.least + int((self.most - self.least + 1) * share)
        while True:
            if story := self.make(cast, length, rng):
                return story


KINDS = {
    "qa1": Kind(one_fact, 2, 10, 1 / 6, skew=1),
    "qa2": Kind(two_facts, 2, 68, 1 / 6),
    "qa3": Kind(three_facts, 4, 320, 1 / 5),
    "qa4": Kind(two_arguments, 2, 2, 1 / 5),
    "qa5": Kind(three_arguments, 2, 126, 0.304),
}


def _events(cast: Cast, kinds: Sequence[str], count: int, rng: random.Random) -> list[Event]:
    world = World(cast, kinds, rng)
    return [world.step() for _ in range(count)]


def _told(
    events: Sequence[Event], askable: Sequence[Asked], chosen: int, rng: random.Random
) -> Story:
    sentences = tuple(event.sentence(rng) for event in events)
    return Story(sentences, askable[chosen], (*askable[:chosen], *askable[chosen + 1 :]))
