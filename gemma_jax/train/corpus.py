"""Texts as ids on disk: a file is tokenised once, and every batch is cut out of what is kept.

A file's ids and the places where its sentences start are kept beside the run, under the hash of the
file and of the tokenizer. Readers map them into memory, so that processes share them.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_jax.errors import InputError
from gemma_jax.inference.documents import read_text
from gemma_jax.text import encode, encode_stream

SPACE_MARKS = "▁Ġ \n"  # how tokenizers write the space that begins a word; and a new line
CLOSERS = "\"'”’)]*_"  # may stand between the end of a sentence and the space behind it

OnText = Callable[[Path, int], None]  # a file, and how many of its ids there are so far


@dataclasses.dataclass(frozen=True)
class Text:
    """A tokenised file: paths of its arrays."""

    ids: Path  # [tokens] int32
    starts: Path  # [sentences] int64, indices into `ids`


@dataclasses.dataclass(frozen=True)
class Records:
    """Tokenised prompts with their answers: paths of their arrays."""

    ids: Path  # [tokens] int32, one record after the other
    bounds: Path  # [records, 3] int64: where the prompt and the answer begin, and the answer ends


class Haystack:
    """All of some texts, to cut stretches out of.

    Raises:
        InputError: there is nothing in them.
    """

    def __init__(self, texts: Sequence[Text]):
        pairs = [(_map(text.ids), _map(text.starts)) for text in texts]
        self._parts = [(ids, starts) for ids, starts in pairs if len(ids) and len(starts)]
        if not self._parts:
            raise InputError("The texts to train on have no sentences: choose others.")
        self._ends = np.cumsum([len(starts) for _, starts in self._parts])
        self.tokens = sum(len(ids) for ids, _ in self._parts)

    def cut(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids [count] from the start of a random sentence on, and the sentence starts among them.

        What reaches beyond the end of its text goes on with the next one.
        """
        at = int(rng.integers(self._ends[-1]))
        part = int(np.searchsorted(self._ends, at, side="right"))
        ids, starts = self._parts[part]
        begin = int(starts[at - (self._ends[part] - len(starts))])
        found, places, filled = [], [], 0
        while filled < count:
            ids, starts = self._parts[part]
            piece = ids[begin : begin + count - filled]
            low, high = np.searchsorted(starts, [begin, begin + len(piece)])
            found.append(piece)
            places.append(starts[low:high] - begin + filled)
            filled += len(piece)
            part, begin = (part + 1) % len(self._parts), 0
        if not found:
            return np.zeros(0, np.int32), np.zeros(0, np.int64)
        return np.concatenate(found), np.concatenate(places)


class RecordBook:
    """All prompts and answers of some records, by length.

    Attributes:
        shortest: tokens of the shortest record.
    """

    def __init__(self, records: Records):
        self._ids, bounds = _map(records.ids), _map(records.bounds)
        lengths = bounds[:, 2] - bounds[:, 0]
        order = np.argsort(lengths, kind="stable")
        self._bounds, self._lengths = bounds[order], lengths[order]
        self.shortest = int(self._lengths[0])

    def draw(self, rng: np.random.Generator, room: int) -> tuple[np.ndarray, int] | None:
        """The ids of a random record of at most `room` tokens and where its answer begins; or None."""
        fitting = int(np.searchsorted(self._lengths, room, side="right"))
        if not fitting:
            return None
        start, answer, end = self._bounds[int(rng.integers(fitting))]
        return self._ids[start:end], int(answer - start)


def tokenize_text(file: Path, tokenizer: Any, cache: Path, on_text: OnText | None = None) -> Text:
    """The ids of a text file (`.xz`: compressed), from the cache if it holds them."""

    def make() -> tuple[np.ndarray, np.ndarray]:
        ids = _joined(_counted(encode_stream(tokenizer, read_text(str(file))), file, on_text))
        return ids, sentence_starts(ids, tokenizer)

    return Text(*_kept(cache, _key(file, tokenizer, "text"), ("ids", "starts"), make))


def tokenize_jsonl(
    file: Path, tokenizer: Any, cache: Path, *, bos_id: int, end_id: int
) -> Text | Records:
    """The records of a JSONL file: all have a `text`, or all a `prompt` and an `answer`.

    Texts become one text, in which each begins with BOS and ends with `end_id`; so do records.

    Raises:
        InputError: a line is something else.
    """
    rows = list(_read_jsonl(file))
    with_answers = "answer" in rows[0]
    names = ("ids", "bounds") if with_answers else ("ids", "starts")

    def make() -> tuple[np.ndarray, np.ndarray]:
        found, bounds, at = [], [], 0
        for row in rows:
            prompt = [bos_id, *encode(tokenizer, row["prompt" if with_answers else "text"])]
            answer = [*(encode(tokenizer, row["answer"]) if with_answers else []), end_id]
            bounds.append((at, at + len(prompt), at + len(prompt) + len(answer)))
            found += [prompt, answer]
            at = bounds[-1][-1]
        ids = _joined(found)
        return ids, np.array(bounds) if with_answers else sentence_starts(ids, tokenizer)

    paths = _kept(cache, _key(file, tokenizer, f"jsonl {bos_id} {end_id}"), names, make)
    return (Records if with_answers else Text)(*paths)


def sentence_starts(ids: np.ndarray, tokenizer: Any) -> np.ndarray:
    """Where sentences start, as their tokens look: white space after a full stop or a new line."""
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    pieces = ["" if piece is None else piece for piece in pieces]

    def those(test: Callable[[str], bool]) -> np.ndarray:
        return np.array([test(piece) for piece in pieces], bool)[ids]

    ends = those(lambda piece: piece.rstrip(CLOSERS).endswith((".", "!", "?")))
    closes = those(lambda piece: bool(piece) and not piece.strip(CLOSERS))
    spaces = those(lambda piece: piece.startswith(tuple(SPACE_MARKS)))
    ends[1:] |= closes[1:] & ends[:-1]
    is_start = np.zeros(len(ids), bool)
    is_start[:1] = True
    is_start[1:] = ends[:-1] & spaces[1:]
    return np.flatnonzero(is_start)


def _read_jsonl(file: Path) -> Iterator[dict[str, str]]:
    fields: set[str] | None = None
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                kind = {"text"} if "text" in row else {"prompt", "answer"}
                row = {name: row[name] for name in kind}
                if not all(isinstance(value, str) and value for value in row.values()):
                    raise TypeError("an empty field, or one that is no text")
                if kind != (fields := fields or kind):
                    raise TypeError(f"lines before it have {' and '.join(sorted(fields))}")
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(
                    f"{file}, line {number} is not of use ({error}): every line must be a JSON object"
                    ' with "text", or with "prompt" and "answer".'
                ) from error
            yield row
    if fields is None:
        raise InputError(f"{file} is empty: name a file with records.")


def _counted(ids: Iterator[list[int]], file: Path, on_text: OnText | None) -> Iterator[list[int]]:
    count = 0
    for some in ids:
        yield some
        count += len(some)
        if on_text:
            on_text(file, count)


def _joined(lists: Any) -> np.ndarray:
    arrays = [np.asarray(some, np.int32) for some in lists]
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int32)


def _key(file: Path, tokenizer: Any, kind: str) -> str:
    with open(file, "rb") as stream:
        content = hashlib.file_digest(stream, "sha256").hexdigest()
    words = tokenizer.backend_tokenizer.to_str()
    return hashlib.sha256(f"{kind}\n{content}\n{words}".encode()).hexdigest()[:24]


def _kept(
    cache: Path,
    key: str,
    names: Sequence[str],
    make: Callable[[], Sequence[np.ndarray]],
) -> list[Path]:
    """Paths of arrays in the cache, made now if they are not there; the last one there, all are."""
    paths = [cache / f"{key}.{name}.npy" for name in names]
    if not paths[-1].is_file():
        cache.mkdir(parents=True, exist_ok=True)
        for path, array in zip(paths, make(), strict=True):
            partial = path.with_suffix(f".{os.getpid()}.partial")
            with open(partial, "wb") as stream:
                np.save(stream, array)
            partial.rename(path)
    return paths


def _map(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")


@functools.lru_cache(maxsize=4)
def haystack(texts: tuple[Text, ...]) -> Haystack:
    """Of the same texts the same one."""
    return Haystack(texts)
