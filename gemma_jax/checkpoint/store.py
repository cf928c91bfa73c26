"""The checkpoint on disk: parameters (Orbax), configuration and tokenizer in one directory.

    config.json               GemmaConfig
    params/                   the parameter tree, written by Orbax
    tokenizer.json, ...       the tokenizer as it came
    huggingface/              config.json and generation_config.json as they came
    manifest.json             size and SHA-256 of every file above, and of itself

A checkpoint is written under a temporary name beside its place and renamed when it is complete.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gemma_jax.checkpoint import files
from gemma_jax.checkpoint.files import new_directory as new_directory
from gemma_jax.checkpoint.files import require_space as require_space
from gemma_jax.checkpoint.source import TOKENIZER_FILES
from gemma_jax.config import GemmaConfig
from gemma_jax.errors import CorruptError, GemmaError, InputError, UsageError

CONFIG, MANIFEST, PARAMS, ORIGINAL = "config.json", "manifest.json", "params", "huggingface"
SEAL = "seal"  # the manifest's entry for itself
HASH_THREADS = 8
REMEDY = "convert the model again"


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded checkpoint.

    Attributes:
        config: hashable; a static argument of jitted functions.
        params: nested dict of arrays, as `gemma_jax.abstract_params(config)` describes it.
        tokenizer: a fast Hugging Face tokenizer.
        path: where it was loaded from.
        hashes: SHA-256 of its parts ("weights", "tokenizer", "adapter"); a memory file belongs to these.
    """

    config: GemmaConfig
    params: dict[str, Any]
    tokenizer: Any
    path: Path
    hashes: Mapping[str, str] = dataclasses.field(default_factory=dict)


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
        verify: compare the files with the manifest's hashes (sizes always are), and look for
            weights that are not finite.
        adapter: the directory of an adapter that was trained for this model.

    Raises:
        InputError: there is no checkpoint at `path`, or the adapter is of another model.
        CorruptError: its files are not those that were written.
        GemmaError: with `verify`, weights that are not finite.
        UsageError: an argument is out of range.
    """
    import jax

    from gemma_jax.checkpoint import adapter as adapters
    from gemma_jax.model.device import default_device
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
    wanted = abstract_params(dataclasses.replace(base, dtype=config.dtype))
    with ThreadPoolExecutor(1) as pool:
        tokenizer = pool.submit(load_tokenizer, path)
        params = load_params(path / PARAMS, wanted)
    if trained is not None:
        params = adapters.apply(trained, config, params)
    if verify:
        require_finite(params)
    if config.memory.rule != recorded.memory.rule:
        _replace_memory(params, init_memory_params(config, jax.random.key(0)))
    params = jax.device_put(params, default_device())  # what is new in them as well
    hashes = part_hashes(path)
    if adapter is not None:
        hashes["adapter"] = _digest(read_manifest(absolute(adapter)))
    return Model(config, params, tokenizer.result(), path, hashes)


def load_params(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a tree of `jax.ShapeDtypeStruct`, on the default device, cast to their dtypes.

    Raises:
        CorruptError: Orbax cannot read them.
    """
    import jax
    from orbax.checkpoint import v1 as ocp

    from gemma_jax.model.device import default_device

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


def require_finite(params: dict[str, Any]) -> None:
    """Raises `GemmaError` that names the first parameters that are not finite numbers."""
    import jax

    places, leaves = zip(*jax.tree.leaves_with_path(params), strict=True)
    finite = jax.device_get(_finite_check()(leaves))
    broken = [place for place, good in zip(places, finite, strict=True) if not good]
    if broken:
        name = "/".join(part.key for part in broken[0])
        more = f" (and {len(broken) - 1} more)" if broken[1:] else ""
        raise GemmaError(
            f"{name}{more} has numbers that are not finite: the checkpoint was written by training"
            " that diverged, or damaged before it was written; use another one."
        )


@functools.cache
def _finite_check() -> Any:
    import jax
    import jax.numpy as jnp

    return jax.jit(lambda leaves: [jnp.isfinite(leaf).all() for leaf in leaves])


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
    remedy: str = REMEDY,
) -> None:
    """Compares a checkpoint's files (or one of them) with its manifest; `remedy` ends what is said.

    Raises:
        CorruptError: a file is missing, of another size, or (with `hashes`) of other content; or
            there is one that would be read and was not written with the others.
    """
    manifest = read_manifest(path, remedy=remedy)
    try:
        names = manifest if only is None else [only]
        wanted = {name: (manifest[name]["size"], manifest[name]["sha256"]) for name in names}
    except (TypeError, KeyError) as error:
        raise _unreadable_manifest(path, error, remedy) from error
    for name, (expected, _) in wanted.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected:
            found = "is missing" if size is None else f"has {size} bytes, not {expected}"
            raise CorruptError(f"{file} {found}: {remedy}, or copy it again.")
    if only is None and (foreign := [name for name in _read_files(path) if name not in wanted]):
        raise CorruptError(
            f"{path / foreign[0]} does not belong to what was written ({MANIFEST} does not name it):"
            f" remove it, or {remedy}."
        )
    if hashes:
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            found = pool.map(lambda name: files.sha256(path / name), wanted)
            for (name, (_, expected)), digest in zip(wanted.items(), found, strict=True):
                if digest != expected:
                    raise CorruptError(
                        f"{path / name} is damaged (its SHA-256 is not the recorded one): {remedy},"
                        " or copy it again."
                    )


def read_manifest(path: Path, *, remedy: str = REMEDY) -> dict[str, Any]:
    """Size and SHA-256 of the files of a checkpoint, by name; `remedy` ends what is said.

    Raises:
        CorruptError: it cannot be read, or is not as it was written.
    """
    try:
        data = (path / MANIFEST).read_bytes()
        manifest = json.loads(data)
        sealed = manifest.pop(SEAL, None)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable_manifest(path, error, remedy) from error
    if sealed is not None and not files.is_sealed(data):
        raise CorruptError(
            f"{path / MANIFEST} is damaged (its SHA-256 is not the recorded one): {remedy}, or copy"
            " it again."
        )
    return manifest


def _unreadable_manifest(path: Path, error: Exception, remedy: str) -> CorruptError:
    return CorruptError(f"{path / MANIFEST} cannot be read ({error}): {remedy}.")


def _read_files(path: Path) -> list[str]:
    """Names of the files that loading would read, whoever put them there."""
    found = [*path.glob(f"{PARAMS}/**/*"), *(path / name for name in TOKENIZER_FILES)]
    return sorted(str(file.relative_to(path)) for file in found if file.is_file())


def part_hashes(path: Path) -> dict[str, str]:
    """SHA-256 of a checkpoint's weights and of its tokenizer, by what the manifest says of their
    files.
    """
    manifest = read_manifest(path)
    parts = {
        "weights": [name for name in manifest if name.startswith(f"{PARAMS}/")],
        "tokenizer": [name for name in manifest if name in TOKENIZER_FILES],
    }
    return {
        part: _digest({name: manifest[name] for name in names}) for part, names in parts.items()
    }


def _digest(manifest: Mapping[str, Any]) -> str:
    """One hash of all files of a manifest."""
    hashes = [[name, manifest[name]["sha256"]] for name in sorted(manifest)]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


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


def write_manifest(path: Path) -> None:
    """Records size and SHA-256 of every file below `path`."""
    names = sorted(
        str(file.relative_to(path))
        for file in path.rglob("*")
        if file.is_file() and file.name != MANIFEST
    )
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        digests = pool.map(lambda name: files.sha256(path / name), names)
        manifest = {
            name: {"size": (path / name).stat().st_size, "sha256": digest}
            for name, digest in zip(names, digests, strict=True)
        }
    content = json.dumps({SEAL: files.UNSEALED, **manifest}, indent=1) + "\n"
    (path / MANIFEST).write_bytes(files.seal(content.encode()))
