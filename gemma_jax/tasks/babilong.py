"""BABILong: stories of bAbI whose sentences stand in order, far apart, among the text of books.

A story's sentences up to the last one that its question needs stand anywhere before the question's
depth, that one at it, and the others anywhere behind it. One text can hold several stories: every story
has people, objects and (in QA4, which is about rooms) rooms of its own; one story has bAbI's.
"""

import copy
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence

from gemma_jax.errors import UsageError
from gemma_jax.tasks import babi, haystacks, scoring, words
from gemma_jax.tasks.base import Draft, Episode, Piece, Question, Task, spread
from gemma_jax.tasks.forms import BABILONG

HAYSTACKS = ("books", "grass")
OPENING = (
    "Between the sentences of the text below a few facts are told that do not belong to it, about who went"
    " where and did what. Remember them: there will be questions about them."
)
PEOPLE_WHO_GIVE = ("Mary", "Fred", "Bill", "Jeff")  # in QA5
PEOPLE = ("Mary", "John", "Daniel", "Sandra")
OBJECTS = ("football", "apple", "milk")
ROOMS = ("kitchen", "bathroom", "hallway", "garden", "office", "bedroom")

# For more than one story; half of each is held out, but none of bAbI's own names.
MORE_PEOPLE = """
Adrian Agnes Albert Alfred Alice Amanda Amelia Andrea Angela Anita Anthony Antonia Arnold Arthur
Astrid Audrey Barbara Beatrice Benjamin Bernard Bertha Beverly Bianca Bridget Bruce Camilla Carla
Carmen Caroline Cecilia Charles Charlotte Christine Clara Claudia Clifford Colin Conrad Cynthia
Dagmar Darren Deborah Dennis Derek Diana Dolores Dominic Donald Doris Dorothy Douglas Edgar Edith
Edmund Eileen Elaine Eleanor Elisa Elliot Emil Emma Eric Ernest Esteban Eugene Eva Fabian Felix
Ferdinand Fiona Florian Frances Frederica Gareth Gemma Geoffrey Gerald Gilbert Gloria Gordon Greta
Gustav Hannah Harold Harriet Hector Heidi Helen Henrietta Herbert Hilda Horace Howard Hubert Hugo
Ida Ingrid Irene Irma Isabel Ivan Jasper Jerome Jessica Joanna Josephine Joyce Judith Julian Karen
Karl Keith Kenneth Klara Laura Leonard Leslie Lorenzo Louise Lucinda Ludwig Lydia Malcolm Marcel
Margaret Marion Martha Martin Matilda Maureen Maurice Melanie Mildred Miriam Monica Muriel Nadia
Natasha Neville Nigel Nora Norbert Norman Olga Oliver Oscar Otto Pamela Patricia Paula Percy
Philippa Priscilla Quentin Ralph Ramona Raymond Rebecca Regina Reginald Renata Roderick Roger Roland
Rosalind Rudolf Sabrina Samantha Sebastian Sheila Sidney Silvia Simone Sophie Stella Stephen Susan
Sylvester Tamara Teresa Theodore Tobias Trevor Ulrich Ursula Valerie Vanessa Veronica Vincent Viola
Walter Wanda Wilfred Wilhelmina Winifred Xavier Yolanda Yvonne
""".split()
MORE_OBJECTS = """
album almanac ball balloon banana bandage bar basket bell biscuit blanket bonnet book bottle bowl
bracelet bread brick broom brush bucket button cake calculator camera candle cap carrot catalogue
chain cheese cherry coat coconut coin comb compass cookie cork cream cup cushion diary dice
dictionary doll drill drum egg envelope eraser fan feather flask flute fork glass globe glove grape
guitar hammer hat helmet honey jacket jar jigsaw jug kettle key knife ladle lamp lantern lemon
letter magazine magnet mango map marble marmalade mask medal melon microphone mirror mop mug napkin
necklace needle newspaper notebook nut onion orange pan paper parcel pear pen pencil pepper pillow
pineapple plate plum poster potato puppet purse puzzle radio rake razor ribbon ring rope ruler
saddle salt sandwich saucer saw scarf screwdriver shawl shirt shoe shovel soap sock spoon stamp
stick sugar suitcase sweater telescope thermometer ticket toothbrush torch towel trophy trumpet
umbrella vase violin wallet watch whistle yoghurt
""".split()
MORE_ROOMS = """
alcove annex arcade archive armory atelier attic auditorium aviary bakery ballroom barn barracks
basement battlement billiard-room boardroom boathouse boiler-room boudoir brewery buttery cabinet
cafeteria canteen cellar chancel chapel clinic cloakroom cloister closet conservatory corridor
cottage courthouse courtyard crypt dairy darkroom den dispensary dormitory dungeon elevator
engine-room entrance foyer gallery garage gatehouse granary greenhouse guardroom gymnasium hangar
henhouse infirmary kennel laboratory larder laundry library loft lobby lodge lounge lumber-room
mailroom mill morgue mosque museum music-room nursery observatory orangery oratory orchard pantry
parlor pavilion playground playroom porch refectory sacristy salon sauna scullery showroom shed
smithy stable staircase storeroom studio study sunroom surgery swimming-pool tavern terrace theater
toolshed tower treasury tunnel vault veranda vestibule vineyard waiting-room wardrobe warehouse
washroom wine-cellar winery workshop
""".split()


class Babilong(Task):
    """One of the five tasks."""

    def __init__(self, name: str, forms: str, keys: str, haystack: str):
        self.name, self._forms, self.haystack = name, BABILONG[forms], haystack
        self._kind = babi.KINDS[name.removeprefix("babilong_")]
        self._others = 0  # questions about a story besides the one it is told for
        self.chance = self._kind.chance
        self._asks_for_rooms = self._kind.make is babi.two_arguments
        people = PEOPLE_WHO_GIVE if self._kind.make is babi.three_arguments else PEOPLE
        more = [words.of_split(names, keys, 2) for names in (MORE_PEOPLE, MORE_OBJECTS, MORE_ROOMS)]
        # bAbI's own names come first, in every split: BABILong itself trains and tests on the same.
        self._names = list(zip((people, OBJECTS, ROOMS), more, strict=True))
        self.vocabulary = tuple(itertools.chain(*itertools.chain(*self._names)))
        people, things, rooms = (len(first) + len(others) for first, others in self._names)
        self.most_questions = min(people // 4, things // 3)
        if self._asks_for_rooms:
            self.most_questions = min(self.most_questions, rooms // 3)

    def episode(self, seed: int, depths: Sequence[float], questions_per_depth: int = 1) -> Episode:
        rng = random.Random(f"{self.name}:{seed}")
        places = spread(depths, questions_per_depth, rng)
        if len(places) > self.most_questions:
            raise UsageError(
                f"{self.name} has names for {self.most_questions} stories in one text, not for"
                f" {len(places)}: ask fewer questions per depth, or give fewer depths."
            )
        draft = Draft(self.name, seed, OPENING)
        for (asked, depth), cast in zip(places, self._casts(len(places), rng), strict=True):
            story = self._kind.story(cast, rng)
            last = story.asked.needed[-1]
            wheres = [
                *sorted(rng.random() * depth for _ in range(last)),
                depth,
                *sorted(depth + rng.random() * (1 - depth) for _ in story.sentences[last + 1 :]),
            ]
            facts = [
                draft.fact(f" {sentence}", where)
                for sentence, where in zip(story.sentences, wheres, strict=True)
            ]
            others = rng.sample(story.others, min(self._others, len(story.others)))
            for one in (story.asked, *others):
                form = rng.choice(self._forms.questions)
                draft.ask(
                    form.format(question=one.question, lead=one.lead),
                    [one.answer],
                    [facts[index] for index in one.needed],
                    asked,
                )
        return draft.episode()

    def asking_more(self, most: int) -> "Babilong":
        task = copy.copy(self)
        task._others = most
        return task

    def filler(self, episode: Episode, books: Iterable[str]) -> Iterator[Piece]:
        return haystacks.stream(self.haystack, books, f"{self.name}:{episode.seed}:books")

    def score(self, question: Question, answer: str) -> float:
        """The first word that could be meant: one like the right one that the question does not name."""
        kind = next(kind for kind in _POSSIBLE if question.answers[0] in kind)
        possible = kind - set(question.text.replace("?", " ").replace(",", " ").split())
        return scoring.share_found(answer, question.answers, scoring.one_of(possible))

    def _casts(self, stories: int, rng: random.Random) -> list[babi.Cast]:
        people, things, rooms = (
            iter([*of_babi, *rng.sample(more, len(more))]) for of_babi, more in self._names
        )
        if self._asks_for_rooms and stories > 1:
            rooms_of = [words.take(rooms, 3, "rooms") for _ in range(stories)]
        else:
            rooms_of = [words.take(rooms, len(ROOMS), "rooms")] * stories
        casts = [
            babi.Cast(words.take(people, 4, "people"), words.take(things, 3, "objects"), own)
            for own in rooms_of
        ]
        rng.shuffle(casts)  # or else bAbI's names would always stand at the first depth
        return casts


_POSSIBLE = (
    frozenset([*PEOPLE, *PEOPLE_WHO_GIVE, *MORE_PEOPLE]),
    frozenset([*OBJECTS, *MORE_OBJECTS]),
    frozenset([*ROOMS, *MORE_ROOMS]),
)


def make(name: str, *, forms: str, keys: str, haystack: str | None) -> Babilong:
    """The task with its options."""
    return Babilong(name, forms, keys, haystack or "books")
