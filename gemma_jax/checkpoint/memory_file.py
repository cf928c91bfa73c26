"""Memory files: what a model has read, in one file of the State's size, to be gone on with.

A memory file is a safetensors file: the arrays of State, what the tokenizer gave beyond them, and
in its metadata what was read and by which model. (Orbax writes directories, which cannot replace
one another on every system, and whose files would need a manifest; this is a file that is copied,
sent and replaced as one.) It is written beside its place and renamed, and its metadata holds the
SHA-256 of the whole file, taken with zeros in the place of the hash.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_jax.checkpoint import files
from gemma_jax.config import MemoryConfig
from gemma_jax.errors import CorruptError, InputError, UsageError

FORMAT, VERSION = "gemma_jax memory file", 1
READ_BYTES = 2**20
OPTIONS = {"segment_length": "--segment-length", "rule": "--memory"}  # of run.py, by what they set
_STATE, _LOGITS, _IDS, _TEXT = "state", "logits", "ids", "text"


@dataclasses.dataclass(frozen=True)
class Source:
    """A file or a prompt, as far as it was read."""

    name: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a text ends that was not read to its end.

    Of `sources`, all but the last were read whole; the last as far as it says, and then `skip`
    characters, whose SHA-256 is `sha256`.
    """

    sources: tuple[Source, ...]
    skip: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Memory:
    """What was read, to be gone on with.

    The model has read whole pieces of the text. What is left of it is kept as ids, and the last few
    characters as text, because their tokens depend on what follows: so that a text read in two
    sittings has the tokens, the pieces and hence the very numbers of one that is read at once.

    Attributes:
        state: the State, on the device, or as NumPy arrays.
        logits: [B, V] float32 of what comes next, if all is in State.
        ids: tokens that come next.
        text: what comes after them.
        place: where the text ends: a `gemma_jax.text.Place`.
        sources: what was read to its end, in order.
        unread: where to go on with the sources after these; None when there are none.
    """

    state: Any
    logits: Any = None
    ids: tuple[int, ...] = ()
    text: str = ""
    place: str = "text"
    sources: tuple[Source, ...] = ()
    unread: Position | None = None

    @property
    def tokens(self) -> int:
        """Tokens read so far, the longest text's of a batch."""
        return int(np.max(self.state.length)) + len(self.ids)


# --- writing --------------------------------------------------------------------------------------


def save(path: str | Path, memory: Memory, model: Any) -> None:
    """Writes a memory file; what was there before is replaced when the new one is on the disk.

    Raises:
        InputError: the file cannot be written.
    """
    import jax
    import safetensors.numpy

    path = _path(path)
    arrays = {_name(place): leaf for place, leaf in jax.tree.leaves_with_path(memory.state)}
    arrays |= {_IDS: np.asarray(memory.ids, np.int32)}
    arrays |= {_TEXT: np.frombuffer(memory.text.encode("utf-8", "surrogatepass"), np.uint8)}
    arrays |= {} if memory.logits is None else {_LOGITS: memory.logits}
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in jax.device_get(arrays).items()}
    content = {
        "model": identity(model),
        "tokens": memory.tokens,
        "place": str(memory.place),
        "sources": [dataclasses.asdict(source) for source in memory.sources],
        "unread": memory.unread and dataclasses.asdict(memory.unread),
    }
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "seal": files.UNSEALED,
        "content": json.dumps(content),
    }
    data = safetensors.numpy.save(arrays, metadata)
    head, rest = _split(data)
    try:
        files.write_file(path, (files.seal(head, rest), rest))
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}): free some disk, or choose"
            " another place."
        ) from error


def require_place(path: str | Path) -> None:
    """Raises `InputError` when no file can be written at `path`."""
    path = _path(path)
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"{path} cannot be written: name a file in a directory that can.")


def identity(model: Any) -> dict[str, Any]:
    """What a memory file belongs to: hashes of a model's parts, and its configuration."""
    hashes = dict(getattr(model, "hashes", {}))
    code = model.config.memory.rule.rpartition(":")[0]
    if code:
        hashes["code of the memory rule"] = files.sha256(Path(code).expanduser())
    config = json.loads(model.config.to_json())
    return {"name": config.pop("name"), "hashes": hashes, "config": config}


def _path(path: str | Path) -> Path:
    if "\0" in str(path):
        raise InputError(f"{str(path)!r} is no name of a file: name another.")
    return Path(path).expanduser()


def _name(place: Sequence[Any]) -> str:
    parts = (
        getattr(part, "name", getattr(part, "key", getattr(part, "idx", None))) for part in place
    )
    return "/".join([_STATE, *map(str, parts)])


def _split(data: bytes) -> tuple[bytes, memoryview]:
    end = 8 + int.from_bytes(data[:8], "little")
    return data[:end], memoryview(data)[end:]


# --- reading --------------------------------------------------------------------------------------


def load(path: str | Path, model: Any, *, verify: bool = True) -> Memory:
    """A memory file's content, on the default device.

    Args:
        model: what the memory is to be used with.
        verify: compare the file with the hash in it.

    Raises:
        InputError: there is no such file.
        CorruptError: it is not as it was written, or no memory file.
        UsageError: it belongs to another model.
    """
    import jax

    from gemma_jax.model.device import default_device
    from gemma_jax.model.state import init_state

    path = _path(path)
    content, arrays = _read(path, verify)
    try:
        require_same(path, content["model"], identity(model))
        rows = len(arrays[f"{_STATE}/length"])
        wanted = jax.eval_shape(lambda: init_state(model.config, rows))
        places = jax.tree.leaves_with_path(wanted)
        leaves = [arrays[_name(place)] for place, _ in places]
        for leaf, (place, expected) in zip(leaves, places, strict=True):
            if (leaf.shape, leaf.dtype) != (expected.shape, expected.dtype):
                raise ValueError(f"{_name(place)} is {leaf.dtype}{list(leaf.shape)}")
        state = jax.tree.unflatten(jax.tree.structure(wanted), leaves)
        unread = content["unread"]
        return Memory(
            state=jax.device_put(state, default_device()),
            logits=arrays.get(_LOGITS),
            ids=tuple(arrays[_IDS].tolist()),
            text=arrays[_TEXT].tobytes().decode("utf-8", "surrogatepass"),
            place=content["place"],
            sources=_sources(content["sources"]),
            unread=unread and Position(**unread | {"sources": _sources(unread["sources"])}),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(
            f"{path} holds no State of this model ({error}): read the text again."
        ) from error


def _sources(content: Sequence[Mapping[str, Any]]) -> tuple[Source, ...]:
    return tuple(Source(**source) for source in content)


def _read(path: Path, verify: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and arrays of a memory file."""
    import safetensors

    content = describe(path, verify=verify)
    try:
        with safetensors.safe_open(path, framework="numpy") as stored:
            return content, {name: stored.get_tensor(name) for name in stored.keys()}
    except (safetensors.SafetensorError, ValueError) as error:
        raise CorruptError(f"{path} is damaged ({error}): read the text again.") from error


def describe(path: str | Path, *, verify: bool = True) -> dict[str, Any]:
    """What a memory file says about itself.

    Raises:
        InputError, CorruptError: as `load`.
    """
    path = _path(path)
    try:
        with open(path, "rb") as stream:
            head = _head(stream)
            sealed = not verify or files.is_sealed(head, iter(lambda: stream.read(READ_BYTES), b""))
            metadata = json.loads(head[8:])["__metadata__"]
            known, version = metadata["format"] == FORMAT, metadata["version"]
            content = json.loads(metadata["content"])
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): name a file that --save-memory wrote."
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptError(
            f"{path} is damaged, or no memory file: name one that --save-memory wrote, or read the"
            " text again."
        ) from error
    if not (sealed and known):
        raise CorruptError(
            f"{path} is damaged (its SHA-256 is not the recorded one): copy it again, or read the"
            " text again."
        )
    if version != str(VERSION):
        raise InputError(
            f"{path} is a memory file of version {version}, and this is for version {VERSION}: read"
            " the text again."
        )
    return content


def _head(stream: Any) -> bytes:
    size = stream.read(8)
    length = int.from_bytes(size, "little")
    if length > 2**27:  # what safetensors allows itself is less
        raise ValueError("no header")
    return size + stream.read(length)


def require_same(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises `UsageError` that names how a memory's model differs from the one at hand."""
    if differences := list(_differences(theirs, ours)):
        raise UsageError(
            f"{path} was read by another model ({theirs['name']}): {'; '.join(differences)}. Use"
            " that model and its options, or read the text again."
        )


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[str]:
    for part in sorted({*theirs["hashes"], *ours["hashes"]}):
        there, here = theirs["hashes"].get(part), ours["hashes"].get(part)
        if there != here:
            found = (
                "was not there" if there is None else "is missing" if here is None else "differs"
            )
            yield f"the hash of its {part} {found}"
    there, here = _flat(theirs["config"]), _flat(ours["config"])
    for field in sorted({*there, *here}):
        if there.get(field) != here.get(field):
            option = f" ({OPTIONS[field]} {there.get(field)})" if field in OPTIONS else ""
            yield f"{field} was {there.get(field)}{option}, and is {here.get(field)} here"


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration, those of its memory beside the others.

    What a file of an earlier version does not say of its memory is as it is by default.
    """
    fields = {key: value for key, value in config.items() if key != "memory"}
    return fields | dataclasses.asdict(MemoryConfig()) | config["memory"]
