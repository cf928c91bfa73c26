"""Files and directories that are there whole or not at all, and whose damage is noticed.

What is written goes to a temporary name beside its place and is renamed when it is on the disk.
The temporary is locked while it is written, so that what a killed process left behind is told from
what another one is writing, and removed by the next that writes to the same place.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from gemma_jax.errors import InputError

UNSEALED = "0" * 64
_SEAL = re.compile(rb'"seal": ?"([0-9a-f]{64})"')
_PARTIAL = ".partial"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of renameat2(2)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that becomes `path` when the block ends well, and vanishes otherwise.

    Its files can be read by whom the directory can be: some libraries make theirs for their owner alone.
    """
    with _temporary(path) as temporary:
        content = temporary / "new"
        content.mkdir()
        yield content
        readable = content.stat().st_mode & 0o666
        for file in (*content.rglob("*"), content):
            if file.is_file():
                file.chmod(readable)
            _flush(file)
        _replace(path, content, temporary / "old")
        _flush(path.parent)


def write_file(path: Path, content: Iterable[bytes]) -> None:
    """Writes a file that appears under its name when all of it is on the disk.

    Raises:
        OSError: it cannot be written; then what was there before is untouched.
    """
    with _temporary(path) as temporary:
        with open(temporary / "new", "wb") as stream:
            for data in content:
                stream.write(data)
        _flush(temporary / "new")
        (temporary / "new").replace(path)
        _flush(path.parent)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A locked directory beside `path`, gone after the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{_escape(path.name)}.*{_PARTIAL}"):
        with _lock(left) as locked:
            if locked:
                shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_PARTIAL, dir=path.parent))
    try:
        with _lock(temporary):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _escape(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[bool]:
    """Whether this process holds the directory during the block; nothing waits for another."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:  # it has just gone
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = True
    except OSError:  # another holds it, or this file system knows no locks
        locked = False
    try:
        yield locked
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    """Waits until a file (or the names in a directory) would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(path: Path, content: Path, aside: Path) -> None:
    """Puts the directory `content` at `path`; what was there is moved away."""
    if path.exists() and _exchange(path, content):
        return
    if path.exists():
        path.rename(aside)
    try:
        content.rename(path)
    except OSError:
        if aside.exists():
            aside.rename(path)
        raise


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step, where the system can: no moment is without either."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    return rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


def require_space(path: Path, needed: int) -> None:
    """Raises `InputError` when the disk that holds (or will hold) `path` has fewer bytes free."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"{path} needs about {needed / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB are free:"
            " free some, or choose another disk."
        )


# --- hashes ---------------------------------------------------------------------------------------


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seal(head: bytes, rest: bytes = b"") -> bytes:
    """Writes into `head`, where it says `"seal": "000..."`, the SHA-256 of head and rest as they are
    with these zeros.
    """
    digest = hashlib.sha256(head)
    digest.update(rest)
    return _SEAL.sub(lambda found: _with_seal(found, digest.hexdigest()), head, count=1)


def is_sealed(head: bytes, rest: Iterable[bytes] = ()) -> bool:
    """Whether head and rest are as they were when they were sealed."""
    found = _SEAL.search(head)
    if found is None:
        return False
    digest = hashlib.sha256(_SEAL.sub(lambda found: _with_seal(found, UNSEALED), head, count=1))
    for data in rest:
        digest.update(data)
    return digest.hexdigest() == found[1].decode()


def _with_seal(found: re.Match[bytes], seal: str) -> bytes:
    return found[0].replace(found[1], seal.encode())
