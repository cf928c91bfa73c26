"""Text to token ids, piece by piece: the tokenizer, the chat template, encoding in a stream.

A book is never held whole: files are decoded, joined and tokenised as they are read, and the ids
are exactly those of tokenising the whole text at once. Text is always text: a `<bos>` or
`<end_of_turn>` written in a book is encoded as the characters it consists of; control tokens come
from this module alone.
"""

import dataclasses
import itertools
import json
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gemma_jax.errors import InputError, UsageError

# Characters tokenised at once, and how many such parts go to the tokenizer's threads together
# (about 60 KB).
PART_CHARS = 4_096
PARTS_PER_BATCH = 16

_TURN_MARKS = ("<start_of_turn>", "<end_of_turn>")
_GEMMA_TURN = ("<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n")


def load_tokenizer(directory: str | Path) -> Any:
    """Loads the tokenizer of a directory, without a network and without running code from it.

    Args:
        directory: holds `tokenizer.json` (preferred) or `tokenizer.model`, with
            `tokenizer_config.json` beside it.

    Returns:
        A fast Hugging Face tokenizer (its Rust tokenizer is `.backend_tokenizer`).

    Raises:
        InputError: the files are missing or broken.
    """
    directory = Path(directory)
    source = next(
        (f for f in ("tokenizer.json", "tokenizer.model") if (directory / f).is_file()), None
    )
    if source is None:
        raise InputError(
            f"{directory} has neither tokenizer.json nor tokenizer.model: download the model's"
            " tokenizer files into it."
        )
    import transformers

    # The plain class takes tokenizer.json as it is; a class of one family would build its own
    # version of it.
    kind = (
        transformers.PreTrainedTokenizerFast
        if source == "tokenizer.json"
        else transformers.GemmaTokenizer
    )
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it takes any large vocabulary without a model_type for Mistral's
    try:
        tokenizer = kind.from_pretrained(str(directory), local_files_only=True)
    except ImportError as error:
        raise UsageError(
            f"{directory / source} needs sentencepiece ({error}): pip install sentencepiece."
        ) from error
    except Exception as error:  # the Rust side raises bare Exception
        reason = " ".join(str(error).split())
        raise InputError(
            f"{directory / source} cannot be read ({reason}): download it again."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    # tokenizer.model knows the marks of a turn as ordinary symbols: a text could then end a turn.
    vocabulary, control = tokenizer.get_vocab(), control_tokens(tokenizer)
    if missed := [mark for mark in _TURN_MARKS if mark in vocabulary and mark not in control]:
        tokenizer.add_tokens(missed, special_tokens=True)
    return tokenizer


# --- encoding -------------------------------------------------------------------------------------


def encode_stream(tokenizer: Any, pieces: Iterable[str]) -> Iterator[list[int]]:
    """Token ids of the text that `pieces` join to, without BOS, as lists of a few thousand ids.

    The ids are exactly those of tokenising the joined text at once, with control tokens read as
    plain text. A BPE tokenizer without context (Gemma's) is fed in parts of `PART_CHARS`
    characters, cut where no token could span the cut; text that has no such place is held until one
    comes. Any other kind of tokenizer is given the whole text.

    Raises:
        InputError: the text has code points that are not characters (lone surrogates).
    """
    encoder = _encoder(tokenizer)
    parts = (
        _cut(_regroup(pieces, PART_CHARS), encoder.is_safe_cut)
        if encoder.is_safe_cut
        else ["".join(pieces)]
    )
    for batch in _batched(parts, PARTS_PER_BATCH):
        for ids in encode_batch(tokenizer, batch):
            if ids:
                yield ids


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without BOS; control tokens in it are plain text."""
    return list(itertools.chain.from_iterable(encode_stream(tokenizer, [text])))


def encode_batch(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each of many texts, as `encode` gives them; each is tokenised for itself, on all
    of the tokenizer's threads.

    Raises:
        InputError: a text has code points that are not characters (lone surrogates).
    """
    return batch_encoder(tokenizer)(texts)


def encode_prompt(
    tokenizer: Any, pieces: Iterable[str], *, bos_id: int, template: bool = False
) -> Iterator[list[int]]:
    """Everything the model reads before it answers: one BOS, then the text.

    With `template`, the text is one user turn of the chat template.

    Raises:
        InputError: `template` is asked of a tokenizer that has none.
    """
    if not template:
        return itertools.chain([[bos_id]], encode_stream(tokenizer, pieces))
    return itertools.chain(
        [[bos_id]], _encode_turn(tokenizer, pieces, user_turn(tokenizer, bos_id))
    )


@dataclasses.dataclass(frozen=True)
class BatchEncoder:
    """`encode_batch` of one tokenizer; other processes can be given it.

    Attributes:
        tokenizer: a `tokenizers.Tokenizer` that reads control tokens as text.
    """

    tokenizer: Any

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:
            raise InputError(
                f"The text has code points that are not characters ({error})."
            ) from error
        return [encoding.ids for encoding in encodings]


def batch_encoder(tokenizer: Any) -> BatchEncoder:
    """Encodes with this tokenizer."""
    return BatchEncoder(_encoder(tokenizer).tokenizer)


@dataclasses.dataclass(frozen=True)
class _Encoder:
    tokenizer: Any  # tokenizers.Tokenizer that reads control tokens as text
    # Whether a text may be cut between two characters; None: only the whole text is exact.
    is_safe_cut: Callable[[str], bool] | None


_ENCODERS: weakref.WeakKeyDictionary[Any, _Encoder] = weakref.WeakKeyDictionary()


def _encoder(tokenizer: Any) -> _Encoder:
    """A view of the tokenizer that shares its model and reads control tokens as text.

    A private one, because "control tokens are text" is a switch on the object, and others may be
    using the object. Truncation that was stored with the tokenizer is left behind.
    """
    if tokenizer not in _ENCODERS:
        import tokenizers

        backend = tokenizer.backend_tokenizer
        view = tokenizers.Tokenizer(backend.model)
        if backend.normalizer is not None:
            view.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            view.pre_tokenizer = backend.pre_tokenizer
        view.add_tokens([token for _, token in sorted(backend.get_added_tokens_decoder().items())])
        view.encode_special_tokens = True
        _ENCODERS[tokenizer] = _Encoder(view, _safe_cuts(view))
    return _ENCODERS[tokenizer]


def _safe_cuts(view: Any) -> Callable[[str], bool] | None:
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
        or not _splits_at_characters(view.pre_tokenizer)
    ):
        return None
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        return None  # such a token looks at the text around it
    vocabulary = view.get_vocab(with_added_tokens=True)
    joined = set()
    for entry in itertools.chain(vocabulary, (replace(token.content) for token in added)):
        joined.update(map(str.__add__, entry, entry[1:]))

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


def _regroup(pieces: Iterable[str], size: int) -> Iterator[str]:
    """The same text in pieces of exactly `size` characters (the last may be shorter)."""
    held: list[str] = []
    count = 0
    for piece in pieces:
        start = 0
        while len(piece) - start >= size - count:
            end = start + size - count
            yield "".join([*held, piece[start:end]])
            held, count, start = [], 0, end
        if start < len(piece):
            held.append(piece[start:])
            count += len(piece) - start
    if held:
        yield "".join(held)


def _cut(pieces: Iterable[str], is_safe_cut: Callable[[str], bool]) -> Iterator[str]:
    """The same text, cut at the last safe place of each piece; without one a piece is held."""
    held: list[str] = []
    last = ""
    for piece in pieces:
        seen = last + piece
        cut = next(
            (i for i in range(len(seen) - 1, 0, -1) if is_safe_cut(seen[i - 1 : i + 1])), None
        )
        if cut is None:
            held.append(piece)
        else:
            cut -= len(last)
            yield "".join([*held, piece[:cut]])
            held = [piece[cut:]]
        last = piece[-1]
    yield "".join(held)


def _batched(parts: Iterable[str], size: int) -> Iterator[list[str]]:
    parts = iter(parts)
    while batch := list(itertools.islice(parts, size)):
        yield batch


# --- the chat template ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Turn:
    """What surrounds the user's text in the chat template: control tokens as ids, text as text."""

    before: tuple[int | str, ...]
    after: tuple[int | str, ...]
    strips: bool  # whether the template strips white space around the user's text

    @property
    def end_id(self) -> int | None:
        """The control token that ends a turn."""
        return next((part for part in self.after if isinstance(part, int)), None)


def user_turn(tokenizer: Any, bos_id: int) -> Turn:
    """One user turn and the start of the model's: the tokenizer's own template, or else Gemma's.

    Raises:
        InputError: the tokenizer has no usable template.
        UsageError: the template is there, but jinja2, which renders it, is not installed.
    """
    name = "text of the user"
    if getattr(tokenizer, "chat_template", None):
        before, found, after = _render(tokenizer, name).partition(name)
        strips = bool(found) and f" {name} " not in _render(tokenizer, f" {name} ")
    else:
        (before, after), found, strips = _GEMMA_TURN, name, True
    turn = Turn(_control(tokenizer, before, bos_id), _control(tokenizer, after, bos_id), strips)
    if not found or turn.end_id is None:
        raise InputError(
            "The model's tokenizer has no chat template: use an instruction-tuned model, or no"
            " --template."
        )
    return turn


def end_of_turn_ids(tokenizer: Any, bos_id: int) -> tuple[int, ...]:
    """The control token that ends a turn, if there is a chat template; it stops every answer."""
    try:
        end = user_turn(tokenizer, bos_id).end_id
    except (InputError, UsageError):
        return ()
    return () if end is None else (end,)


def _render(tokenizer: Any, content: str) -> str:
    messages = [{"role": "user", "content": content}]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except ImportError as error:
        raise UsageError(
            f"The chat template needs jinja2 ({error}): pip install jinja2."
        ) from error
    except Exception as error:  # a template may raise what it likes
        reason = " ".join(str(error).split())
        raise InputError(f"The model's chat template cannot be rendered ({reason}).") from error


def _control(tokenizer: Any, text: str, bos_id: int) -> tuple[int | str, ...]:
    """Splits template text at its control tokens; BOS is left out, as it is set elsewhere."""
    ids = {content: i for content, i in control_tokens(tokenizer).items() if content in text}
    if not ids:
        return (text,) if text else ()
    pattern = "|".join(re.escape(content) for content in sorted(ids, key=len, reverse=True))
    parts = [ids.get(part, part) for part in re.split(f"({pattern})", text) if part]
    return tuple(part for part in parts if part != bos_id)


def _encode_turn(tokenizer: Any, pieces: Iterable[str], turn: Turn) -> Iterator[list[int]]:
    # Text of the template that touches the user's text is tokenised together with it, as tokens may
    # span the seam.
    before, after = list(turn.before), list(turn.after)
    opening = [before.pop()] if before and isinstance(before[-1], str) else []
    closing = [after.pop(0)] if after and isinstance(after[0], str) else []
    for part in before:
        yield encode(tokenizer, part) if isinstance(part, str) else [part]
    user_text = _strip(pieces) if turn.strips else pieces
    yield from encode_stream(tokenizer, itertools.chain(opening, user_text, closing))
    for part in after:
        yield encode(tokenizer, part) if isinstance(part, str) else [part]


def _strip(pieces: Iterable[str]) -> Iterator[str]:
    """`str.strip` of a text in pieces: white space is held until something follows it."""
    held: list[str] | None = None  # None: nothing but white space so far
    for piece in pieces:
        text = piece.lstrip() if held is None else piece
        body = text.rstrip()
        if body:
            yield "".join([*(held or []), body])
            held = []
        if held is not None:
            held.append(text[len(body) :])


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Ids of the tokens that steer the model and stand for no text, by how they are written."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {token.content: i for i, token in added.items() if token.special}
