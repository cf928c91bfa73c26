"""The checkpoint on disk: parameters (Orbax), configuration and tokenizer in one directory.

    config.json               GemmaConfig
    params/                   the parameter tree, written by Orbax
    tokenizer.json, ...       the tokenizer as it came
    huggingface/              config.json and generation_config.json as they came
    manifest.json             size and SHA-256 of every file above

A checkpoint is written under a temporary name beside its place and renamed when it is complete.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gemma_jax.config import GemmaConfig
from gemma_jax.errors import CorruptError, InputError, UsageError

CONFIG, MANIFEST, PARAMS, ORIGINAL = "config.json", "manifest.json", "params", "huggingface"
HASH_THREADS = 8


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded checkpoint.

    Attributes:
        config: hashable; a static argument of jitted functions.
        params: nested dict of arrays, as `gemma_jax.abstract_params(config)` describes it.
        tokenizer: a fast Hugging Face tokenizer.
        path: where it was loaded from.
    """

    config: GemmaConfig
    params: dict[str, Any]
    tokenizer: Any
    path: Path


# --- reading --------------------------------------------------------------------------------------


def read_config(
    path: str | Path, *, memory: str | None = None, adapter: str | Path | None = None
) -> GemmaConfig:
    """The configuration of a checkpoint, without loading it.

    Args:
        memory: the rule that is asked for; only by it can code be named.
        adapter: the directory of an adapter, whose memory settings replace the recorded ones.

    Raises:
        InputError: `path` is no checkpoint, or it names code that `memory` does not.
        CorruptError: a file is not the one that was written.
    """
    path = _directory(path)
    check(path, only=CONFIG)
    config = GemmaConfig.from_json((path / CONFIG).read_text(encoding="utf-8"))
    if adapter is not None:
        from gemma_jax.checkpoint import adapter as adapters

        path = absolute(adapter)
        config = dataclasses.replace(config, memory=adapters.read(path, with_params=False).memory)
    recorded, colon, kind = config.memory.rule.rpartition(":")
    if not colon:
        return config
    if memory is None or memory.rpartition(":")[1:] != (":", kind):
        raise InputError(
            f"{path} names code as its memory rule ({config.memory.rule}): refused. Name"
            " the file yourself with --memory if you trust it."
        )
    return config.with_memory(rule=memory)


def load(
    path: str | Path,
    *,
    memory: str | None = None,
    segment_length: int | None = None,
    dtype: str | None = None,
    verify: bool = True,
    adapter: str | Path | None = None,
) -> Model:
    """Loads a checkpoint that `convert_weights.py` wrote.

    Args:
        path: the checkpoint's directory.
        memory: a memory rule other than the recorded one: a name, or "path/to/file.py:ClassName".
            It starts from fresh parameters.
        segment_length: S, in tokens, if it is not to be the recorded one.
        dtype: "bfloat16" or "float32" for weights and activations; as recorded by default.
        verify: compare the files with the manifest's hashes (sizes always are).
        adapter: the directory of an adapter that was trained for this model.

    Raises:
        InputError: there is no checkpoint at `path`, or the adapter is of another model.
        CorruptError: its files are not those that were written.
        UsageError: an argument is out of range.
    """
    import jax

    from gemma_jax.checkpoint import adapter as adapters
    from gemma_jax.model.transformer import abstract_params, init_memory_params
    from gemma_jax.text import load_tokenizer

    path = _directory(path)
    trained = None if adapter is None else adapters.read(adapter)
    recorded = read_config(path, memory=memory, adapter=adapter)
    config = dataclasses.replace(recorded, dtype=dtype or recorded.dtype)
    if memory is not None:
        config = config.with_memory(rule=memory)
    if segment_length is not None:
        config = config.with_memory(segment_length=segment_length)
    check(path, hashes=verify)
    base = recorded if trained is None else read_config(path, memory=memory)
    params = load_params(
        path / PARAMS, abstract_params(dataclasses.replace(base, dtype=config.dtype))
    )
    if trained is not None:
        params = adapters.apply(trained, config, params)
    if config.memory.rule != recorded.memory.rule:
        _replace_memory(params, init_memory_params(config, jax.random.key(0)))
    return Model(config, params, load_tokenizer(path), path)


def load_params(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a tree of `jax.ShapeDtypeStruct`, on the default device, cast to their dtypes.

    Raises:
        CorruptError: Orbax cannot read them.
    """
    import jax
    from orbax.checkpoint import v1 as ocp

    from gemma_jax.model.state import default_device

    place = jax.sharding.SingleDeviceSharding(default_device())
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), wanted
    )
    try:
        return ocp.load(path, abstract)
    except (ValueError, KeyError, FileNotFoundError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise CorruptError(f"{path} cannot be read ({reason}): convert the model again.") from error


def load_array(path: Path, keys: tuple[str, ...]) -> Any:
    """One parameter as it is on disk, as a NumPy array."""
    import jax
    import numpy as np
    from orbax.checkpoint import v1 as ocp

    def only(place: tuple[Any, ...], leaf: Any) -> Any:
        wanted = tuple(part.key for part in place) == keys
        return np.empty(0, leaf.dtype) if wanted else ocp.PLACEHOLDER

    found = ocp.load(path, jax.tree.map_with_path(only, ocp.metadata(path).metadata))
    for key in keys:
        found = found[key]
    return found


def _replace_memory(params: dict[str, Any], fresh: dict[str, Any]) -> None:
    for layer in params.values():
        layer.get("attention", {}).pop("memory", None)
    for name, layer in fresh.items():
        params[name]["attention"] |= layer["attention"]


def check(
    path: Path,
    *,
    hashes: bool = True,
    only: str | None = None,
    remedy: str = "convert the model again",
) -> None:
    """Compares a checkpoint's files (or one of them) with its manifest; `remedy` ends what is said.

    Raises:
        CorruptError: a file is missing, of another size, or (with `hashes`) of other content.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        names = manifest if only is None else [only]
        files = {name: (manifest[name]["size"], manifest[name]["sha256"]) for name in names}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptError(f"{path / MANIFEST} cannot be read ({error}): {remedy}.") from error
    for name, (expected, _) in files.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected:
            found = "is missing" if size is None else f"has {size} bytes, not {expected}"
            raise CorruptError(f"{file} {found}: {remedy}, or copy it again.")
    if hashes:
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            found = pool.map(lambda name: _sha256(path / name), files)
            for (name, (_, expected)), digest in zip(files.items(), found, strict=True):
                if digest != expected:
                    raise CorruptError(
                        f"{path / name} is damaged (its SHA-256 is not the recorded one): {remedy},"
                        " or copy it again."
                    )


def absolute(path: str | Path) -> Path:
    """The path as Orbax wants it."""
    return Path(path).expanduser().absolute()


def _directory(path: str | Path) -> Path:
    path = absolute(path)
    if not path.is_dir():
        raise InputError(
            f"{path} is not a directory: name a checkpoint that convert_weights.py wrote."
        )
    if not (path / MANIFEST).is_file():
        if any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin")):
            raise InputError(
                f"{path} is a Hugging Face model: convert it first with"
                f" `python convert_weights.py {path} DEST`."
            )
        raise InputError(
            f"{path} holds no (complete) checkpoint: name one that convert_weights.py wrote, or"
            " convert the model again."
        )
    return path


# --- writing --------------------------------------------------------------------------------------


def require_place(
    path: Path, *, source: Path, overwrite: bool, belongs: Callable[[str], bool]
) -> None:
    """Raises `UsageError` when something is at `path` that may not be replaced.

    Args:
        source: what is converted; it must not be lost.
        overwrite: whether what is at `path` may be replaced.
        belongs: whether a file of this name belongs to what may be replaced; nothing else is lost.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise UsageError(f"{path} exists: choose another name, or replace it with --overwrite.")
    inside = {path.resolve(), *path.resolve().parents} & {source.resolve()}
    if inside or path.resolve() in source.resolve().parents:
        raise UsageError(f"{path} and {source} overlap: choose another name.")
    foreign = [path] if not path.is_dir() else [f for f in path.iterdir() if not belongs(f.name)]
    if foreign:
        raise UsageError(
            f"{path} exists and holds {foreign[0].name}, so it is not replaced: choose another name."
        )


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that becomes `path` when the block ends well, and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        content = temporary / "new"
        content.mkdir()
        yield content
        _replace(path, content, temporary / "old")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(path: Path, content: Path, aside: Path) -> None:
    if path.exists():
        path.rename(aside)
    try:
        content.rename(path)
    except OSError:
        if aside.exists():
            aside.rename(path)
        raise


def write_manifest(path: Path) -> None:
    """Records size and SHA-256 of every file below `path`."""
    names = sorted(
        str(file.relative_to(path))
        for file in path.rglob("*")
        if file.is_file() and file.name != MANIFEST
    )
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        digests = pool.map(lambda name: _sha256(path / name), names)
        manifest = {
            name: {"size": (path / name).stat().st_size, "sha256": digest}
            for name, digest in zip(names, digests, strict=True)
        }
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def require_space(path: Path, needed: int) -> None:
    """Raises `InputError` when the disk that holds (or will hold) `path` has fewer bytes free."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"{path} needs about {needed / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB are free:"
            " free some, or choose another disk."
        )


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
