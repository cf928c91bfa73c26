"""Text to token ids, piece by piece: the tokenizer, the chat template, encoding in a stream.

A book is never held whole: files are decoded, joined and tokenised as they are read, and the ids
are exactly those of tokenising the whole text at once. Text is always text: a `<bos>` or
`<end_of_turn>` written in a book is encoded as the characters it consists of; control tokens come
from this module alone.
"""

import dataclasses
import enum
import functools
import itertools
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_jax.cuts import safe_cuts
from gemma_jax.errors import InputError, UsageError

# Characters tokenised at once, and how many such parts go to the tokenizer's threads together
# (about 60 KB).
PART_CHARS = 4_096
PARTS_PER_BATCH = 16

_TURN_MARKS = ("<start_of_turn>", "<end_of_turn>")
_GEMMA_TURN = (  # before the user's text, between the model's answer and more, after it
    "<start_of_turn>user\n",
    "<end_of_turn>\n<start_of_turn>user\n",
    "<end_of_turn>\n<start_of_turn>model\n",
)


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
    _encoder(tokenizer)  # looking through a large vocabulary takes a while: not when a user waits
    return tokenizer


# --- encoding -------------------------------------------------------------------------------------


def encode_parts(tokenizer: Any, pieces: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    """Parts of the text that `pieces` join to, and their token ids, without BOS.

    The ids are exactly those of tokenising the joined text at once, with control tokens read as
    plain text; those of all parts but the last stay what they are whatever follows. A BPE tokenizer
    without context (Gemma's) is fed in parts of `PART_CHARS` characters, cut where no token could
    span the cut; text that has no such place is held until one comes. Any other kind of tokenizer
    is given the whole text.

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
        yield from zip(batch, encode_batch(tokenizer, batch), strict=True)


def is_cut(tokenizer: Any) -> bool:
    """Whether `encode_parts` cuts texts; otherwise it has to be given all of a text at once."""
    return _encoder(tokenizer).is_safe_cut is not None


def encode_stream(tokenizer: Any, pieces: Iterable[str]) -> Iterator[list[int]]:
    """The ids of `encode_parts`, as lists of a few thousand."""
    return (ids for _, ids in encode_parts(tokenizer, pieces) if ids)


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

    @functools.cached_property
    def text_ids(self) -> np.ndarray:
        """Ids [n] of the tokens that texts are made of: all but those that steer the model."""
        added = self.tokenizer.get_added_tokens_decoder()
        control = [i for i, token in added.items() if token.special]
        return np.setdiff1d(list(self.tokenizer.get_vocab().values()), control)


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
        # Words are stretches between numbers where nothing else divides a text. Each thread would keep
        # 10,000 of them, together gigabytes on a large machine, and hardly meet one again.
        if forget := getattr(view.model, "_resize_cache", None):
            forget(0)
        _ENCODERS[tokenizer] = _Encoder(view, safe_cuts(view))
    return _ENCODERS[tokenizer]


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


class Place(enum.StrEnum):
    """Where a text or a conversation ends, as far as it has come."""

    START = "start"  # nothing, not even BOS
    TEXT = "text"  # text outside the chat template
    TURN = "turn"  # the user's turn, which more text may follow
    ANSWER = "answer"  # the model's turn, before the token that ends it
    END = "end"  # the model's turn, after that token


@dataclasses.dataclass(frozen=True)
class Turn:
    """What surrounds the user's text in the chat template: control tokens as ids, text as text."""

    before: tuple[int | str, ...]
    after: tuple[int | str, ...]
    between: tuple[
        int | str, ...
    ]  # the model's answer and more text; empty: it knows one turn only
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
        between = _between(tokenizer, name)
    else:
        (before, between, after), found, strips = _GEMMA_TURN, name, True
    turn = Turn(*(_control(tokenizer, part, bos_id) for part in (before, after, between)), strips)
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


def opening(tokenizer: Any, place: str, turn: Turn | None, bos_id: int) -> tuple[list[int], str]:
    """What comes between a text that ends at `place` and more text of the user: ids, and then text
    that is tokenised together with the user's. Without a turn it is plain text.
    """
    start = [bos_id] if place == Place.START else []
    if turn is None or place == Place.TURN:
        return start, ""
    if place in (Place.ANSWER, Place.END):
        parts = list(turn.between if place == Place.ANSWER else turn.between[1:])
    else:
        parts = list(turn.before)
    seam = parts.pop() if parts and isinstance(parts[-1], str) else ""
    return start + _ids(tokenizer, parts), seam


def closing(tokenizer: Any, turn: Turn | None) -> tuple[str, list[int]]:
    """What comes after the user's text: text that is tokenised together with it, and then ids."""
    parts = list(turn.after) if turn else []
    seam = parts.pop(0) if parts and isinstance(parts[0], str) else ""
    return seam, _ids(tokenizer, parts)


def encode_prompt(
    tokenizer: Any, pieces: Iterable[str], *, bos_id: int, template: bool = False
) -> Iterator[list[int]]:
    """Everything the model reads before it answers: one BOS, then the text.

    With `template`, the text is one user turn of the chat template.

    Raises:
        InputError: `template` is asked of a tokenizer that has none.
    """
    turn = user_turn(tokenizer, bos_id) if template else None
    before, first = opening(tokenizer, Place.START, turn, bos_id)
    last, after = closing(tokenizer, turn)
    user = UserText(pieces, strips=turn is not None and turn.strips)
    text = encode_stream(tokenizer, itertools.chain([first], user, [last]))
    return itertools.chain([before], text, [after] if after else [])


class UserText(Iterable[str]):
    """What a template takes of a user's text in pieces: all, or all but white space around it.

    Attributes:
        removed: characters of white space that were left out at the start.
        given: characters passed on.
        held: white space that is not passed on before something follows it.
    """

    def __init__(self, pieces: Iterable[str], *, strips: bool, begun: bool = False):
        """`begun`: what comes before is text of the user too, so the start is not stripped."""
        self._pieces, self._strips, self._begun = pieces, strips, begun
        self.removed = self.given = 0
        self._held: list[str] = []

    @property
    def held(self) -> str:
        return "".join(self._held)

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            text = self._strip(piece) if self._strips else piece
            if text:
                self.given += len(text)
                yield text

    def _strip(self, piece: str) -> str:
        text = piece if self._begun else piece.lstrip()
        self.removed += len(piece) - len(text)
        body = text.rstrip()
        if not body:
            self._held.append(text)
            return ""
        self._begun = True
        held, self._held = self.held, [text[len(body) :]]
        return held + body


def _between(tokenizer: Any, text: str) -> str:
    answer = "answer of the model"
    try:
        _, found, rest = _render(tokenizer, text, answer, text).partition(answer)
    except InputError:
        return ""
    return rest.partition(text)[0] if found else ""


def _render(tokenizer: Any, *contents: str) -> str:
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]
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


def _ids(tokenizer: Any, parts: Iterable[int | str]) -> list[int]:
    nested = (encode(tokenizer, part) if isinstance(part, str) else [part] for part in parts)
    return list(itertools.chain.from_iterable(nested))


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Ids of the tokens that steer the model and stand for no text, by how they are written."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {token.content: i for i, token in added.items() if token.special}
