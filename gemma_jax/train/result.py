"""What a training makes: a checkpoint of the whole model, or an adapter of what was trained."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from gemma_jax.checkpoint import adapter as adapters
from gemma_jax.checkpoint import store
from gemma_jax.checkpoint.source import TOKENIZER_FILES
from gemma_jax.config import GemmaConfig
from gemma_jax.errors import UsageError

TRAINING = "training.json"  # how a checkpoint was made
_OWN = (store.CONFIG, store.MANIFEST, store.PARAMS, store.ORIGINAL, TRAINING, *TOKENIZER_FILES)
_ADAPTER = (adapters.DESCRIPTION, adapters.ARRAYS, store.MANIFEST)


def require_place(path: Path, overwrite: bool) -> None:
    """Raises `UsageError` when something is at `path` that training did not make, or may not replace."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file: choose another --output.")
    if path.exists():
        names = {file.name for file in path.iterdir()}
        if not overwrite:
            raise UsageError(
                f"{path} exists: choose another --output, or replace it with --overwrite."
            )
        made_here = TRAINING in names or adapters.DESCRIPTION in names
        if foreign := sorted(names - {*_OWN, *_ADAPTER}) or not made_here and sorted(names):
            raise UsageError(
                f"{path} exists and holds {foreign[0]}, so it is not replaced: choose another --output."
            )


def write_model(
    path: Path, config: GemmaConfig, params: Any, source: Path, training: dict[str, Any]
) -> None:
    """Writes a checkpoint that `gemma_jax.load` reads.

    Args:
        params: of any dtype; kept as `config` has it.
        source: the directory that the tokenizer's files come from, and what else came with the model.
        training: how it was trained, for the reader.
    """
    import jax
    from orbax.checkpoint import v1 as ocp

    from gemma_jax.model.transformer import abstract_params

    config = dataclasses.replace(config, name=path.name)
    kept = jax.tree.map(lambda x, like: x.astype(like.dtype), params, abstract_params(config))
    with store.new_directory(path) as content:
        ocp.save(content / store.PARAMS, kept)
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, content / name)
        if (source / store.ORIGINAL).is_dir():
            shutil.copytree(source / store.ORIGINAL, content / store.ORIGINAL)
        (content / store.CONFIG).write_text(config.to_json(), encoding="utf-8")
        (content / TRAINING).write_text(json.dumps(training, indent=1) + "\n", encoding="utf-8")
        store.write_manifest(content)


def write_adapter(
    path: Path,
    config: GemmaConfig,
    trained: Any,
    frozen: Any,
    what: str,
    training: dict[str, Any],
    dtype: str,
) -> None:
    """Writes what was trained alone; arguments as `adapting.split` has them."""
    adapter = adapters.Adapter(
        base=config.name,
        base_hash=adapters.params_hash(frozen),
        memory=config.memory,
        trained=what,
        params=trained,
        training=training,
    )
    with store.new_directory(path) as content:
        adapters.write(adapter, content, dtype)
