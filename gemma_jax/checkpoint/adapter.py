"""Adapters: what was trained of a model, alone, in a directory that belongs to one base model.

    adapter.json              what it is: memory's settings, what was trained, the base's name and hash
    adapter.safetensors       the trained arrays, by their path in the tree of parameters
    manifest.json             size and SHA-256 of both

The hash of a base is over its parameters rounded to bfloat16, without those of memory: every conversion
of the same weights has the same one, in whatever dtype and on whatever day it was made.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gemma_jax.checkpoint import store
from gemma_jax.config import GemmaConfig, MemoryConfig
from gemma_jax.errors import CorruptError, GemmaError, InputError

DESCRIPTION, ARRAYS = "adapter.json", "adapter.safetensors"
FORMAT = 1
REMEDY = "train the adapter again"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What was trained of a model, and for which one.

    Attributes:
        base: name of the model it was trained for.
        base_hash: `params_hash` of that model.
        memory: the settings it was trained with.
        trained: "memory" or "lora", see `gemma_jax.model.adapting`.
        params: the trained arrays, as `adapting.split` parts them.
        training: how it was trained, for the reader.
    """

    base: str
    base_hash: str
    memory: MemoryConfig
    trained: str
    params: dict[str, Any]
    training: dict[str, Any] = dataclasses.field(default_factory=dict)


def write(adapter: Adapter, directory: Path, dtype: str = "float32") -> None:
    """Writes the files of an adapter into an empty directory, its arrays as `dtype`."""
    import jax
    import numpy as np
    from safetensors.numpy import save_file

    kind = jax.numpy.dtype(dtype)
    arrays = {
        name: np.ascontiguousarray(np.asarray(leaf).astype(kind))
        for name, leaf in _flat(adapter.params).items()
    }
    save_file(arrays, directory / ARRAYS)
    description = {"format": FORMAT} | {
        field.name: getattr(adapter, field.name)
        for field in dataclasses.fields(Adapter)
        if field.name != "params"
    }
    description["memory"] = dataclasses.asdict(adapter.memory)
    text = json.dumps(description, indent=2) + "\n"
    (directory / DESCRIPTION).write_text(text, encoding="utf-8")
    store.write_manifest(directory)


def read(path: str | Path, *, with_params: bool = True) -> Adapter:
    """Reads an adapter, its arrays in float32.

    Raises:
        InputError: there is no adapter at `path`, or one of a later format.
        CorruptError: its files are not those that were written.
    """
    from safetensors.numpy import load_file

    path = store.absolute(path)
    if not (path / DESCRIPTION).is_file():
        raise InputError(
            f"{path} holds no adapter: name a directory that `python -m gemma_jax.train` wrote."
        )
    store.check(path, only=None if with_params else DESCRIPTION, remedy=REMEDY)
    try:
        content = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise InputError(f"{path} is an adapter of another format: update gemma_jax.")
        content["memory"] = MemoryConfig(**content["memory"])
        arrays = load_file(path / ARRAYS) if with_params else {}
        return Adapter(params=_nested(arrays), **content)
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, GemmaError) as error:
        raise CorruptError(f"{path} cannot be read as an adapter ({error}): {REMEDY}.") from error


def apply(adapter: Adapter, config: GemmaConfig, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a base model with an adapter's in them.

    Raises:
        InputError: the adapter was trained for another model.
    """
    import jax.numpy as jnp

    from gemma_jax.model.adapting import join, without_memory

    if (found := params_hash(params)) != adapter.base_hash:
        raise InputError(
            f"The adapter was trained for {adapter.base} (parameters {adapter.base_hash[:12]}), and"
            f" this model is {config.name} (parameters {found[:12]}): name the model that it was"
            " trained for."
        )
    trained = _map(jnp.asarray, adapter.params)
    return join(without_memory(params), trained)


def params_hash(params: Mapping[str, Any]) -> str:
    """SHA-256 of a model's parameters: floats as bfloat16, memory's own left out."""
    import jax.numpy as jnp
    import numpy as np

    from gemma_jax.model.adapting import without_memory

    leaves = sorted(_flat(without_memory(dict(params))).items())

    def digest(named: tuple[str, Any]) -> str:
        name, leaf = named
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf = leaf.astype(jnp.bfloat16)
        head = f"{name} {leaf.dtype} {leaf.shape}\n".encode()
        return hashlib.sha256(head + np.asarray(leaf).tobytes()).hexdigest()

    with ThreadPoolExecutor(store.HASH_THREADS) as pool:
        return hashlib.sha256("\n".join(pool.map(digest, leaves)).encode()).hexdigest()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, part in tree.items():
        if isinstance(part, Mapping):
            found |= _flat(part, f"{prefix}{name}/")
        else:
            found[prefix + name] = part
    return found


def _nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = name.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = array.astype("float32")
    return tree


def _map(function: Any, tree: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _map(function, part) if isinstance(part, dict) else function(part)
        for name, part in tree.items()
    }
