"""Hugging Face models as they come: a local directory or a hub id, safetensors or torch files."""

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemma_jax.errors import CorruptError, InputError, UsageError

SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
WANTED_FILES = ("*.json", "*.safetensors", "tokenizer.model", "chat_template.jinja")
DTYPES = {"bfloat16", "float16", "float32"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve(source: str | Path, revision: str | None = None) -> Path:
    """The local directory of a model; a hub id is downloaded (and kept in Hugging Face's cache).

    Raises:
        InputError: there is no such directory or model, or it cannot be had.
        UsageError: `revision` is given with a directory.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise UsageError(f"{source} is a directory, and --revision is for models of the hub.")
        return path
    if path.exists():
        raise InputError(f"{source} is a file: name the directory that holds the model.")
    if not _HUB_ID.fullmatch(str(source)) or str(source).startswith("."):
        raise InputError(f"{source} does not exist: name a directory or a hub id (owner/name).")
    return _download(str(source), revision)


def _download(name: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        listed = huggingface_hub.list_repo_files(name, revision=revision)
        torch_only = not any(file.endswith(".safetensors") for file in listed)
        patterns = [*WANTED_FILES, *(["*.bin"] if torch_only else [])]
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
        )
    except errors.GatedRepoError as error:
        if huggingface_hub.get_token() is None:
            raise InputError(
                f"{name} needs a token, and none was found: run `hf auth login` (or set HF_TOKEN),"
                " and accept the model's terms on its page."
            ) from error
        raise InputError(
            f"{name} is gated, and your token has no access to it: accept the model's terms on its"
            " page, then try again."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{name} has no revision {revision!r}: check --revision.") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise InputError(
            f"There is no directory and no model on the hub named {name!r} (or it is private):"
            " check the name."
        ) from error
    except Exception as error:  # network libraries raise what they like
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{name} is no directory here, and it cannot be downloaded ({reason}): check the"
            " network, or name a directory."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file.

    Raises:
        InputError: the file is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}): download it again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object: download it again.")
    return content


class Weights:
    """The tensors of a model directory, each read when it is asked for.

    Attributes:
        shapes: shape of every tensor, by name.
    """

    def __init__(self, directory: Path):
        """Opens the headers of all shards.

        Raises:
            InputError: no weights, a missing shard, or a dtype that is not a floating point number.
            CorruptError: a shard cannot be read.
            UsageError: the weights are torch files, and torch is not installed.
        """
        self._kind, files = _find_files(directory)
        for file in files:
            if not file.is_file():
                raise InputError(f"{file} is missing: download the model again.")
        self._home: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            for name, shape, dtype in self._kind.describe(file):
                if name in self._home:
                    raise InputError(f"{name} is in two files: download the model again.")
                if dtype not in DTYPES:
                    raise InputError(
                        f"{name} is {dtype}: only {', '.join(sorted(DTYPES))} can be converted."
                    )
                self._home[name], self.shapes[name] = file, shape

    def read(self, name: str) -> np.ndarray:
        """One tensor in its own dtype; nothing of it is held here."""
        return self._kind.read(self._home[name], name)

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same numbers."""
        if self.shapes[first] != self.shapes[second]:
            return False
        return bool(np.array_equal(self.read(first), self.read(second)))


def _find_files(directory: Path) -> tuple[Any, list[Path]]:
    for name, kind in ((SAFETENSORS, _Safetensors), (TORCH, _Torch)):
        index = directory / f"{name}.index.json"
        if index.is_file():
            shards = read_json(index).get("weight_map", {})
            if not isinstance(shards, dict) or not shards:
                raise InputError(f"{index} names no shards: download it again.")
            return kind, sorted({_inside(directory, shard) for shard in shards.values()})
        if (directory / name).is_file():
            return kind, [directory / name]
    loose = sorted(directory.glob("*.safetensors"))
    if len(loose) > 1:
        raise InputError(f"{directory}/{SAFETENSORS}.index.json is missing: download it again.")
    if loose:
        return _Safetensors, loose
    raise InputError(
        f"{directory} has neither {SAFETENSORS} nor {TORCH} (or their index): name a directory that"
        " holds a whole Hugging Face model."
    )


def _inside(directory: Path, shard: str) -> Path:
    if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
        raise InputError(f"The index names a shard outside the directory ({shard!r}): refused.")
    return directory / shard


class _Safetensors:
    """Files are opened anew for every tensor, so that pages of those before it can be let go."""

    _NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

    @classmethod
    def describe(cls, file: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
        with cls._open(file) as tensors:
            for name in tensors.keys():
                part = tensors.get_slice(name)
                dtype = part.get_dtype()
                yield name, tuple(part.get_shape()), cls._NAMES.get(dtype, dtype)

    @classmethod
    def read(cls, file: Path, name: str) -> np.ndarray:
        with cls._open(file) as tensors:
            return tensors.get_tensor(name)

    @staticmethod
    def _open(file: Path) -> Any:
        import safetensors

        try:
            return safetensors.safe_open(file, framework="numpy")
        except (safetensors.SafetensorError, OSError) as error:
            raise CorruptError(f"{file} is damaged ({error}): download it again.") from error


class _Torch:
    @classmethod
    def describe(cls, file: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
        for name, tensor in cls._open(file).items():
            yield name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")

    @classmethod
    def read(cls, file: Path, name: str) -> np.ndarray:
        import torch

        tensor = cls._open(file)[name].detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
        return tensor.numpy().copy()

    @staticmethod
    def _open(file: Path) -> dict[str, Any]:
        torch = require_torch(f"{file.name} is a torch file")
        try:
            mapped = zipfile.is_zipfile(file)  # files of old versions of torch cannot be mapped
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # unpickling raises what it likes
            raise CorruptError(
                f"{file} is damaged, or holds more than tensors ({_line(error)}): download it again,"
                " or use safetensors."
            ) from error
        if not isinstance(content, dict) or not all(torch.is_tensor(t) for t in content.values()):
            raise InputError(f"{file} is not a state dict: use the files of a Hugging Face model.")
        return content


def require_torch(why: str) -> Any:
    """The torch module.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise UsageError(f"{why}, which needs torch: pip install torch.") from error
    return torch


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
