"""What keys and values are made of: adjectives and nouns, numbers, UUIDs, and words put together.

Training and tests must not share keys: of both word lists every third word is held out. A few hundred
words are soon known by heart, so training also has keys of invented ones.
"""

import itertools
import random
import uuid
from collections.abc import Iterator

from gemma_jax.errors import UsageError

KEYS = ("train", "invented", "held_out", "all")

ADJECTIVES = """
amber ample ancient arctic ashen autumn azure balmy barren blazing blond bold brass brave breezy
brief bright brisk brittle broad bronze bubbly burly busy calm candid careful casual cautious
charming cheerful chilly civic classic clever cloudy clumsy coarse cobalt colossal comic copper
coral cosmic cosy crafty crimson crisp crooked crystal curious curly dainty damp daring dazzling
decent deep dense distant dizzy dotted drowsy dry dusky dusty eager early earnest eastern elastic
elegant emerald empty enormous faded faint famous fancy fast fearless feathery fierce fiery flat
fluffy foamy foggy folded formal fragile fragrant frank fresh frosty frozen fuzzy gaunt gentle giant
gilded glad gleaming glossy golden graceful grand grassy grateful gritty hardy hasty hazy heavy
hidden hollow honest humble humid hungry idle inner ivory jade jagged jolly joyful keen kind lavish
lazy leafy lean level lively lofty lonely loud loyal lucky lunar marble mellow merry mighty mild
misty modest mossy muddy muffled narrow neat nimble noble noisy northern oaken odd olive opal orange
orderly outer pale patient pearly pebbled perky placid plain playful pleasant plucky plump polar
polished polite proud purple quaint quick quiet radiant rainy rapid rare ready regal restless rigid
ripe rocky rosy rough round royal rugged rural rusty sandy sapphire scarlet serene shady shallow
sharp shiny shy silent silky silver simple sleepy slender slim slow smoky smooth snowy sober soft
solar solemn solid southern sparkling speckled spicy spiral spotted stately steady steep stormy
striped sturdy subtle sudden sunny supple swift tall tame tangled tender thirsty thorny tidy timid
tiny tranquil twisted upright urban valiant vast velvet vibrant violet vivid wandering warm wary
weary western whispering wild windy wintry wise witty wooden woolly worthy young zesty
""".split()

NOUNS = """
acorn airship almond alley anchor anvil apron arbor arrow atlas attic axle badger bakery balcony
balloon bamboo banjo banner barge barley barrel basin basket bay beacon beaver beetle bell bench
berry bicycle birch biscuit bison blanket blossom boat bonnet bottle boulder bowl bramble bridge
brook broom bucket buckle buffalo bugle burrow butterfly button cabin cactus camel canal candle
canoe canvas canyon captain caravan carpet carriage cart cartoon castle cavern cedar cello chain
chalk chapel chariot cherry chestnut chimney cipher circus citadel clarinet cliff clock cloud clover
coast cobbler comet compass copse corridor cottage courtyard cousin cradle crane crater creek
cricket crow crown cupboard curtain cypress daisy dancer deer delta desert diamond dolphin donkey
dragon drawer drum dune eagle easel eclipse elbow elm ember engine envelope estuary falcon farmer
feather fern ferry fiddle field finch flag flame flask flute forest forge fortress fossil fountain
fox furnace galaxy galleon gallery garnet gate gazelle geyser ginger giraffe glacier glider glove
goblet goose gorge granite grove guitar gull hammer hammock harbor hare harp harvest hawk hazel
hearth hedge helmet heron hill hinge hive horizon hornet hut iceberg inkwell inlet iris island
jacket jaguar jasmine jewel jigsaw journal jungle juniper kayak kennel kestrel kettle kite ladder
lagoon lake lantern lark lattice laurel ledger lemon library lighthouse lilac lily lion lizard
locket loom lotus lynx mallet mango mantle maple marsh mast melody meteor mill mirror mitten monsoon
moor moose morning mosaic moth motor mountain mural museum nebula needle nest nettle notebook nutmeg
oak oar oasis ocean opera orbit orchard orchid osprey otter owl oyster paddle palace palm panda
panther paper parade parrot pasture path peach peacock pebble pelican pencil penguin pepper piano
pier pigeon pillow pine pirate planet plateau plaza plum pocket poem pond pony poplar poppy portrait
potter prairie prism puzzle quarry quartz quill quilt rabbit raft rainbow raven reef ribbon ridge
river robin rocket rooster rope rose rudder saddle sailor salmon sapling satchel saxophone scarf
schooner sculptor seagull shadow shell shepherd ship shovel signal skylark sleigh slipper sparrow
spider spruce squirrel stable staircase statue stream summit sunset swallow swan tavern teapot
temple thicket thimble thistle thunder tiger timber tower trail trumpet tulip tunnel turbine turtle
valley vase vessel village vineyard violin volcano wagon walnut walrus water weaver well whale wharf
wheel willow window wolf wren yacht zebra
""".split()

_CONSONANTS, _VOWELS = "bdflmnprstvz", "aeiou"
_SYLLABLES = [c + v for c in _CONSONANTS for v in _VOWELS]
CODED_WORD = f"(?:[{_CONSONANTS}][{_VOWELS}]){{4}}"  # as a regular expression


def of_split(words: list[str], split: str, every: int = 3) -> list[str]:
    """The words for training (`train`, `invented`), those held out (the last of `every` so many), or all."""
    held_out = set(words[every - 1 :: every])
    return [word for word in words if split == "all" or (word in held_out) == (split == "held_out")]


def keys(rng: random.Random, split: str) -> Iterator[str]:
    """All different pairs like `amber falcon`, in random order; `invented` ones, like `amboth falver`."""
    adjectives, nouns = of_split(ADJECTIVES, split), of_split(NOUNS, split)
    known = {*ADJECTIVES, *NOUNS}
    for index in permutation(rng, len(adjectives) * len(nouns)):
        adjective, noun = adjectives[index // len(nouns)], nouns[index % len(nouns)]
        if split == "invented":
            adjective, noun = (_invented(rng, word, nouns, known) for word in (adjective, noun))
        yield f"{adjective} {noun}"


def _invented(rng: random.Random, word: str, others: list[str], known: set[str]) -> str:
    """The word's beginning with another one's end, which no word yet has: each is `known` from then on."""
    while True:
        other = rng.choice(others)
        made = word[: rng.randint(1, 4)] + other[-rng.randint(2, 5) :]
        if made not in known:
            known.add(made)
            return made


def coded_words(rng: random.Random) -> Iterator[str]:
    """All different words of four syllables that no language has, in random order; 13 million."""
    count = len(_SYLLABLES)
    for index in permutation(rng, count**4):
        yield "".join(_SYLLABLES[index // count**place % count] for place in range(4))


def numbers(rng: random.Random, digits: int) -> Iterator[str]:
    """Different numbers of so many digits, without end (until there are no more of them)."""
    low = 10 ** (digits - 1)
    return (str(low + index) for index in permutation(rng, 9 * low))


def uuids(rng: random.Random) -> Iterator[str]:
    """Random UUIDs, without end."""
    while True:
        yield str(uuid.UUID(int=rng.getrandbits(128), version=4))


def permutation(rng: random.Random, count: int) -> Iterator[int]:
    """The numbers below `count`, each once, in an order that looks random, without holding them.

    A keyed shuffle of the next power of four (four rounds of a Feistel network), of which numbers
    that are too large are left out.
    """
    half = max(1, (count - 1).bit_length() + 1 >> 1)
    mask = (1 << half) - 1
    rounds = [(rng.getrandbits(32) | 1, rng.getrandbits(32)) for _ in range(4)]
    for index in range(1 << 2 * half):
        left, right = index >> half, index & mask
        for factor, offset in rounds:
            mixed = (right * factor + offset) * 0x9E3779B1 & 0xFFFFFFFF
            left, right = right, left ^ ((mixed ^ mixed >> 15) * factor >> 13 & mask)
        if (value := left << half | right) < count:
            yield value


def take(stream: Iterator[str], count: int, what: str) -> list[str]:
    """The next `count` of a stream.

    Raises:
        UsageError: it has no more.
    """
    taken = list(itertools.islice(stream, count))
    if len(taken) < count:
        raise UsageError(
            f"One text has room for {len(taken)} different {what}, not {count}: ask for fewer"
            " questions per depth, or fewer depths."
        )
    return taken
