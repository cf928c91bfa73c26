"""A tokenizer for a model from scratch, learnt from the texts it is to read and built as Gemma's is.

BPE over characters, with ▁ for the space that begins a word and bytes for what has no character of its
own. No token spans two words, and every sign of punctuation is a token, but for words that are asked
for. Numbers are read in groups of up to three digits from the left, each a token: 12345 is 123, 45.
"""

import itertools
import json
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gemma_jax.cuts import DIGIT_GROUPS
from gemma_jax.errors import UsageError

Merges = list[tuple[str, str]]

CONTROL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CHARACTERS = ["▁", "\n", *(chr(code) for code in range(0x21, 0x7F))]
NUMBERS = [  # those that are tokens: 0 to 9, 00 to 99, 000 to 999
    "".join(digits)
    for count in (1, 2, 3)
    for digits in itertools.product(string.digits, repeat=count)
]
SMALLEST = len({*CONTROL_TOKENS, *BYTES, *CHARACTERS, *NUMBERS})


def learn_tokenizer(texts: Iterable[str], size: int, words: Iterable[str] = ()) -> Any:
    """A `tokenizers.Tokenizer` of at most `size` tokens; equal arguments give equal tokenizers.

    Args:
        texts: what it is to be good at.
        size: of the vocabulary, all tokens counted.
        words: each becomes a token, together with the space before it; without digits.

    Raises:
        UsageError: `size` has no room for control tokens, bytes, characters, numbers and words.
    """
    words = [f"▁{word.replace(' ', '▁')}" for word in words]
    if any(set(word) & set(string.digits) for word in words):
        raise ValueError("A word with digits is never one token: numbers are read in groups.")
    characters = list(dict.fromkeys([*CHARACTERS, *"".join(words)]))
    merges = _learn_merges(texts, characters, max(0, size - SMALLEST))
    while True:
        tokenizer = _with_words(characters, merges, words)
        excess = tokenizer.get_vocab_size() - size
        if excess <= 0:
            return tokenizer
        if not merges:
            raise UsageError(
                f"A tokenizer of {size} tokens is too small: choose {size + excess} or more."
            )
        merges = merges[:-excess]


def assemble(characters: Sequence[str], merges: Merges, *, pre_tokenizer: Any = None) -> Any:
    """A tokenizer as Gemma's is built: control tokens, bytes, characters, and what is merged of them.

    Gemma's own `pre_tokenizer` is the default; it leaves every digit a token of its own.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    merged = (first + second for first, second in merges)
    pieces = dict.fromkeys([*CONTROL_TOKENS, *BYTES, *characters, *merged])
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    return tokenizer


def save_tokenizer(tokenizer: Any, directory: Path) -> Path:
    """Writes the files that `text.load_tokenizer` reads."""
    directory.mkdir(parents=True, exist_ok=True)
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(str(directory / "tokenizer.json"))  # last: with it the directory is complete
    return directory


def _learn_merges(texts: Iterable[str], characters: Sequence[str], count: int) -> Merges:
    """At most `count` merges of what stands together most often, within words and without digits.

    The first few of them are what would have been learnt of so many.
    """
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    learner = tokenizers.Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(tokenizers.Regex(r"[^\w▁]"), "isolated"),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=len(characters) + count,
        initial_alphabet=characters,
        limit_alphabet=len(characters),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    return [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]


def _with_words(characters: Sequence[str], learnt: Merges, words: Sequence[str]) -> Any:
    """A tokenizer with these merges, and after them those that still join the parts of `words`."""
    import tokenizers
    from tokenizers import pre_tokenizers

    groups = pre_tokenizers.Split(tokenizers.Regex(DIGIT_GROUPS), "isolated")
    merges = [*_number_merges(), *learnt]
    while True:
        tokenizer = assemble(characters, merges, pre_tokenizer=groups)
        found = [encoding.tokens for encoding in tokenizer.encode_batch(words)]
        # A merge that comes last changes no word that is one token already, and shortens its own. From
        # the end, because ▁wine is to stay a word before a hyphen where wine-cellar is one.
        missing = dict.fromkeys(tuple(tokens[-2:]) for tokens in found if len(tokens) > 1)
        if not missing:
            return tokenizer
        merges += missing


def _number_merges() -> Merges:
    """Of two digits, then of three: of ab and bc in abc, that which comes first is merged first."""
    of_two = list(itertools.product(string.digits, repeat=2))
    of_three = [
        (a + b, c) if a + b <= b + c else (a, b + c)
        for a, b, c in itertools.product(string.digits, repeat=3)
    ]
    return of_two + of_three
