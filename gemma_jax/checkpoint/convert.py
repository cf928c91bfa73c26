"""Conversion: Hugging Face weights to a checkpoint, and back.

One group of parameters (the embedder, a layer) is in memory at a time.
"""

import dataclasses
import itertools
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemma_jax.checkpoint import huggingface, store
from gemma_jax.checkpoint.source import SAFETENSORS, TOKENIZER_FILES, Weights, read_json, resolve
from gemma_jax.checkpoint.verify import Verification, require_reference, verify_checkpoint
from gemma_jax.config import DTYPES, GemmaConfig
from gemma_jax.errors import InputError, UsageError
from gemma_jax.model.weights import SCALE, quantize
from gemma_jax.text import encode, load_tokenizer

ORIGINAL_FILES = ("config.json", "generation_config.json")
SHARD_BYTES = 2 * 10**9  # of a Hugging Face directory that is written
TOKENIZER_BYTES = 2**26  # room for it on the disk
SPACE = "\u2581"  # as tokenizers write it
WORDS_TRIED = 1000  # of a tokenizer's own
NEVER_READ = -20.0  # a gate below it gives memory a weight of less than 1e-8

OnProgress = Callable[[int, int], None]  # parameters done, of how many


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        parameters: how many numbers were converted.
        skipped: tensors that are no part of the language model (the vision tower).
        notices: sentences that the user should read.
        verification: the comparison with Hugging Face transformers, if it was asked for.
    """

    config: GemmaConfig
    parameters: int
    skipped: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    verification: Verification | None = None


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    dtype: str = "bfloat16",
    quantize: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    verify: bool = False,
    on_progress: OnProgress | None = None,
) -> Conversion:
    """Converts a Hugging Face model into a checkpoint at `dest`.

    Args:
        source: a directory, or the id of a model on the hub.
        dest: the checkpoint's directory; it appears when everything went well.
        dtype: "bfloat16" or "float32", of the weights on disk and of the activations.
        quantize: "int8" keeps matrices in int8, with a scale per output; `dtype` is then that of
            norms and activations.
        revision: branch, tag or commit on the hub.
        overwrite: replace the checkpoint at `dest`.
        verify: compare logits with Hugging Face transformers (needs torch) before `dest` appears.
        on_progress: called with the number of parameters done, and of all.

    Raises:
        InputError: the model is missing, incomplete, of another family, or the disk is full.
        CorruptError: a file is damaged.
        UsageError: `dest` exists, or torch is needed and not there.
        GemmaError: the verification failed.
    """
    dest = store.absolute(dest)
    if dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}: choose one of {', '.join(DTYPES)}.")
    if verify:
        require_reference()
    store.require_place(
        dest, source=store.absolute(source), overwrite=overwrite, belongs=_in_checkpoint
    )
    directory = resolve(source, revision)
    local = Path(source).expanduser().is_dir()
    name = directory.resolve().name if local else str(source).split("/")[-1]
    config = read_config(directory, dtype=dtype, quantize=quantize, name=name)
    # What is wrong with it is known before any work.
    about_tokenizer = _notices_of_tokenizer(load_tokenizer(directory))
    weights = Weights(directory)
    names, skipped = _canonical_names(weights)
    config = _complete(config, weights, names)
    entries = huggingface.table(config)
    tied_head = {huggingface.HEAD} if config.tied_embeddings else set()
    shapes = {name: weights.shapes[original] for name, original in names.items()}
    huggingface.check(
        entries, {name: shape for name, shape in shapes.items() if name not in tied_head}
    )
    total = sum(entry.size for entry in entries)
    itemsize = 1 if config.quantized else _numpy_dtype(config.dtype).itemsize
    store.require_space(dest, total * itemsize + TOKENIZER_BYTES)
    with store.new_directory(dest) as content:
        gates = write_params(
            content / store.PARAMS, entries, config, weights, names, on_progress, total
        )
        _copy(directory, content, TOKENIZER_FILES)
        (content / store.CONFIG).write_text(config.to_json(), encoding="utf-8")
        (content / store.ORIGINAL).mkdir()
        _copy(directory, content / store.ORIGINAL, ORIGINAL_FILES)
        store.write_manifest(content)
        verification = verify_checkpoint(directory, content) if verify else None
    return Conversion(config, total, skipped, _notices(gates) + about_tokenizer, verification)


def read_config(directory: Path, *, dtype: str, quantize: str | None, name: str) -> GemmaConfig:
    """The configuration of a Hugging Face directory, with the stop tokens it generates with."""
    config = GemmaConfig.from_hf(directory, dtype=dtype, quantization=quantize, name=name)
    stops = read_json(directory / "generation_config.json").get("eos_token_id")
    if stops is None:
        return config
    stops = stops if isinstance(stops, list) else [stops]
    if not all(isinstance(stop, int) for stop in stops):
        raise InputError(f"{directory}/generation_config.json: eos_token_id holds no token ids.")
    return dataclasses.replace(config, eos_ids=tuple(stops))


def _canonical_names(weights: Weights) -> tuple[dict[str, str], tuple[str, ...]]:
    """Tensors by canonical name, and those that are skipped."""
    names: dict[str, str] = {}
    skipped = []
    for original in weights.shapes:
        name = huggingface.canonical(original)
        if name is None:
            skipped.append(original)
        elif name in names:
            raise InputError(
                f"{original} and {names[name]} are the same tensor: convert one model."
            )
        else:
            names[name] = original
    return names, tuple(skipped)


def _complete(config: GemmaConfig, weights: Weights, names: dict[str, str]) -> GemmaConfig:
    """The configuration with what only the tensors tell: an own head, and gates of the original."""
    head, embedding = names.get(huggingface.HEAD), names.get(huggingface.EMBEDDING)
    if head and embedding:
        config = dataclasses.replace(config, tied_embeddings=weights.equal(head, embedding))
    if any(name.endswith(huggingface.GATE_SUFFIX) for name in names):
        config = config.with_memory(rule="linear")
    return config


def write_params(
    path: Path,
    entries: tuple[huggingface.Entry, ...],
    config: GemmaConfig,
    weights: Weights,
    names: dict[str, str],
    on_progress: OnProgress | None,
    total: int,
) -> list[np.ndarray]:
    """Writes all parameters with Orbax, group by group; returns the memory's gates."""
    from orbax.checkpoint import v1 as ocp

    done, gates = 0, []
    for group, members in itertools.groupby(entries, key=lambda entry: entry.path[0]):
        tree: dict[str, Any] = {}
        for entry in members:
            array = entry.join([_read_finite(weights, names[name]) for name in entry.names])
            if config.quantized and entry.is_matrix:
                array, scale = quantize(array)
                _place(tree, _scale_path(entry)[1:], scale)
            else:
                kind = np.dtype(np.float32) if entry.is_gate else _numpy_dtype(config.dtype)
                array = array.astype(kind, copy=False)
            if entry.is_gate:
                gates.append(array)
            _place(tree, entry.path[1:], array)
            done += entry.size
        ocp.partial.save(path, {group: tree})
        del tree, array
        if on_progress:
            on_progress(done, total)
    ocp.partial.finalize(path)
    return gates


def _scale_path(entry: huggingface.Entry) -> huggingface.Place:
    return (*entry.path[:-1], entry.path[-1] + SCALE)


def _read_finite(weights: Weights, name: str) -> np.ndarray:
    array = weights.read(name)
    if not np.isfinite(array).all():
        raise InputError(f"{name} has numbers that are not finite: download the model again.")
    return array


def _in_checkpoint(name: str) -> bool:
    own = (store.CONFIG, store.MANIFEST, store.PARAMS, store.ORIGINAL)
    return name in own or name in TOKENIZER_FILES


def _in_huggingface(name: str) -> bool:
    weights = name.endswith((".safetensors", ".safetensors.index.json"))
    return weights or name in ORIGINAL_FILES or name in TOKENIZER_FILES


def _place(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def _copy(source: Path, dest: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, dest / name)


def _notices(gates: list[np.ndarray]) -> tuple[str, ...]:
    if not gates:
        return ()
    highest = max(float(gate.max()) for gate in gates)
    if highest < NEVER_READ:
        return (
            f"the memory's gates are all below {highest:.0f}, so memory is written and never read:"
            " the model behaves as one with local attention only.",
        )
    return (f"memory rule linear, with gates up to {highest:.2f}, is recorded.",)


def _notices_of_tokenizer(tokenizer: Any) -> tuple[str, ...]:
    """Some versions of transformers make tokenizers of GGUF files that have most merges missing."""
    if type(tokenizer.backend_tokenizer.model).__name__ != "BPE":  # others have no merges
        return ()
    ids = tokenizer.get_vocab()
    words = [word for word in ids if len(word) > 2 and word[0] == SPACE and word[1:].isalpha()]
    words = random.Random(0).sample(sorted(words), min(WORDS_TRIED, len(words)))
    whole = sum(encode(tokenizer, f"a {word[1:]}")[-1:] == [ids[word]] for word in words)
    if 2 * whole >= len(words):
        return ()
    return (
        f"the tokenizer cuts {len(words) - whole} of {len(words)} of its own words into pieces, so merges"
        " are missing, and the model will not understand what it reads: take tokenizer.json of the"
        " original model.",
    )


def to_huggingface(
    source: str | Path,
    dest: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> Conversion:
    """Writes a checkpoint back as a Hugging Face directory.

    Args:
        source: a checkpoint of `convert`.
        dest: the directory to write.
        dtype: "bfloat16" or "float32"; that of the checkpoint by default.
        overwrite: replace the Hugging Face directory at `dest`.
        on_progress: as in `convert`.

    Raises:
        InputError: `source` is no checkpoint, or the disk is full.
        CorruptError: `source` is damaged.
        UsageError: `dest` exists.
    """
    source, dest = store.absolute(source), store.absolute(dest)
    store.require_place(dest, source=source, overwrite=overwrite, belongs=_in_huggingface)
    config = store.read_config(source)
    store.check(source)
    entries = huggingface.table(config)
    total = sum(entry.size for entry in entries)
    dtype = dtype or config.dtype
    store.require_space(dest, total * _numpy_dtype(dtype).itemsize + TOKENIZER_BYTES)
    with store.new_directory(dest) as content:
        _write_shards(content, _tensors(source, entries, config, dtype, on_progress, total))
        _copy(source, content, TOKENIZER_FILES)
        _copy(source / store.ORIGINAL, content, ORIGINAL_FILES)
        _correct_config(content / ORIGINAL_FILES[0], config, dtype)
    left_out = config.memory.rule not in ("off", "linear")
    notice = f"the parameters of memory rule {config.memory.rule} have no place there: left out."
    return Conversion(config, total, notices=(notice,) if left_out else ())


def _tensors(
    source: Path,
    entries: tuple[huggingface.Entry, ...],
    config: GemmaConfig,
    dtype: str,
    on_progress: OnProgress | None,
    total: int,
) -> Iterator[tuple[str, np.ndarray]]:
    done = 0
    for entry in entries:
        array = store.load_array(source / store.PARAMS, entry.path)
        if config.quantized and entry.is_matrix:
            scale = store.load_array(source / store.PARAMS, _scale_path(entry))
            array = array.astype(np.float32) * scale[:, None]
        for name, tensor in entry.split(array).items():
            yield name, tensor.astype(np.float32 if entry.is_gate else _numpy_dtype(dtype))
        done += entry.size
        if on_progress:
            on_progress(done, total)


def _numpy_dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _write_shards(directory: Path, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    from safetensors.numpy import save_file

    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}

    def flush() -> None:
        if held:
            save_file(held, directory / f"{len(shards)}.shard", metadata={"format": "pt"})
            shards.append(list(held))
            held.clear()

    for name, tensor in tensors:
        if sum(other.nbytes for other in held.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        held[name] = tensor
    flush()
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(files) == 1:
        files = [SAFETENSORS]
    for i, file in enumerate(files):
        (directory / f"{i}.shard").rename(directory / file)
    if len(files) > 1:
        homes = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        size = sum((directory / file).stat().st_size for file in files)
        index = {"metadata": {"total_size": size}, "weight_map": homes}
        _write_json(directory / f"{SAFETENSORS}.index.json", index)


def _correct_config(path: Path, config: GemmaConfig, dtype: str) -> None:
    """What was written is a text model, of this dtype, with or without a head of its own."""
    content = read_json(path)
    if "text_config" in content:
        import transformers

        text = transformers.Gemma3Config.from_dict(content).text_config.to_dict()
        content = text | {"architectures": ["Gemma3ForCausalLM"]}
    content.pop("torch_dtype", None)
    content |= {"dtype": dtype, "tie_word_embeddings": config.tied_embeddings}
    _write_json(path, content)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
