"""What a checkpoint, an adapter or a memory file holds, in lines for people."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemma_jax.checkpoint import memory_file, store
from gemma_jax.errors import InputError
from gemma_jax.inference.console import size

ADAPTER = "adapter.json"
KINDS = {store.CONFIG: "a checkpoint", ADAPTER: "an adapter"}  # by a file that only these have
HASH_DIGITS = 16  # of a hash that is shown


def describe(path: str | Path, *, verify: bool = True) -> Iterator[str]:
    """Lines about a directory or a file.

    Raises:
        InputError: it is missing, or none of these.
        CorruptError: it is not as it was written.
    """
    path = store.absolute(path)
    yield from _directory(path, verify) if path.is_dir() else _memory(path, verify)


def _directory(path: Path, verify: bool) -> Iterator[str]:
    if not (path / store.MANIFEST).is_file():
        raise InputError(f"{path} holds no (complete) checkpoint and no adapter: name another.")
    manifest = store.read_manifest(path)
    store.check(path, hashes=verify)
    kind = next((kind for name, kind in KINDS.items() if name in manifest), "files with a manifest")
    total = sum(entry["size"] for entry in manifest.values())
    yield f"{path}: {kind}, {size(total)} in {len(manifest)} files"
    if store.CONFIG in manifest:
        yield from _config(json.loads((path / store.CONFIG).read_text(encoding="utf-8")))
        yield from _hashes(store.part_hashes(path))
    elif ADAPTER in manifest:
        content = json.loads((path / ADAPTER).read_text(encoding="utf-8"))
        yield from (f"{name}: {json.dumps(value)}" for name, value in content.items())
    yield "files: whole" if verify else "files: of the recorded sizes; hashes were not checked"


def _memory(path: Path, verify: bool) -> Iterator[str]:
    content = memory_file.describe(path, verify=verify)
    unread = content["unread"]
    yield f"{path}: a memory file, {size(path.stat().st_size)}"
    ends = "interrupted; go on with --resume" if unread else f"ends in {content['place']}"
    yield f"read: {content['tokens']:,} tokens ({ends})"
    for source in [*content["sources"], *(unread["sources"] if unread else [])]:
        yield f"  {source['name']}: {source['bytes']:,} bytes, SHA-256 {source['sha256'][:HASH_DIGITS]}"
    model = content["model"]
    yield from _config(model["config"] | {"name": model["name"]})
    yield from _hashes(model["hashes"])
    yield "file: whole" if verify else "file: not checked"


def _config(config: Mapping[str, Any]) -> Iterator[str]:
    memory = config["memory"]
    yield (
        f"model: {config['name']} ({config['family']}), {len(config['layer_types'])} layers of width"
        f" {config['width']}, {config['quantization'] or config['dtype']}"
    )
    yield (
        f"memory: rule {memory['rule']}, {memory['local_attention']}, segments of"
        f" {memory['segment_length']} tokens"
        + (f", {memory['slots']} slots a KV head" if memory["rule"] == "slots" else "")
    )


def _hashes(hashes: Mapping[str, str]) -> Iterator[str]:
    for part, digest in hashes.items():
        yield f"SHA-256 of the {part}: {digest[:HASH_DIGITS]}"
