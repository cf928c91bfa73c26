"""Where a text may be cut so that its parts are tokenised as the whole is."""

import itertools
import json
import string
from collections.abc import Callable
from typing import Any

DIGIT_GROUPS = "[0-9]{1,3}"  # a pre-tokenizer's pattern: numbers in groups of three, from the left


def safe_cuts(view: Any) -> Callable[[str], bool] | None:
    """Which pairs of adjacent characters a text may be cut between without changing its tokens.

    BPE only ever joins neighbours into an entry of the vocabulary. Where no entry (and no added
    token) contains the characters a, b side by side, nothing is joined across a|b, and the two
    sides do not know of each other.
    """
    replace = _single_character_replacement(view.normalizer)
    added = view.get_added_tokens_decoder().values()
    if (
        replace is None
        or not _is_plain_bpe(view.model)
        or not (_splits_at_characters(view.pre_tokenizer) or _groups_digits(view.pre_tokenizer))
    ):
        return None
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        return None  # such a token looks at the text around it
    vocabulary = view.get_vocab(with_added_tokens=True)
    joined = set()
    for entry in itertools.chain(vocabulary, (replace(token.content) for token in added)):
        joined.update(map(str.__add__, entry, entry[1:]))
    if _groups_digits(view.pre_tokenizer):  # which digits are a group depends on where they begin
        joined.update(map("".join, itertools.product(string.digits, repeat=2)))

    def is_safe_cut(pair: str) -> bool:
        seen = replace(pair)
        # A character without an entry of its own becomes bytes or <unk>, which follow rules of
        # their own.
        return (
            pair not in joined
            and seen not in joined
            and seen[0] in vocabulary
            and seen[1] in vocabulary
        )

    return is_safe_cut


def _is_plain_bpe(model: Any) -> bool:
    import tokenizers

    return isinstance(model, tokenizers.models.BPE) and not (
        model.dropout
        or model.ignore_merges
        or model.continuing_subword_prefix
        or model.end_of_word_suffix
    )


def _component(part: Any) -> dict[str, Any]:
    return {} if part is None else json.loads(part.__getstate__())


def _single_character_replacement(normalizer: Any) -> Callable[[str], str] | None:
    """The normaliser as a function, if all it does is to replace characters one by one."""
    component = _component(normalizer)
    steps = component.get("normalizers", [component] if component else [])
    replacements = [
        (step.get("pattern", {}).get("String", ""), step.get("content", "")) for step in steps
    ]
    if any(step["type"] != "Replace" for step in steps) or any(
        len(a) != 1 or len(b) != 1 for a, b in replacements
    ):
        return None

    def replace(text: str) -> str:
        for old, new in replacements:
            text = text.replace(old, new)
        return text

    return replace


def _splits_at_characters(pre_tokenizer: Any) -> bool:
    """Whether the pre-tokenizer does nothing, or only splits at one given character."""
    component = _component(pre_tokenizer)
    pattern = component.get("pattern", {}).get("String", "")
    return not component or (
        component["type"] == "Split" and len(pattern) == 1 and not component["invert"]
    )


def _groups_digits(pre_tokenizer: Any) -> bool:
    component = _component(pre_tokenizer)
    grouping = {"type": "Split", "pattern": {"Regex": DIGIT_GROUPS}, "behavior": "Isolated"}
    return component == grouping | {"invert": False}
