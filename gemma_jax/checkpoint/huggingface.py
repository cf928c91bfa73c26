"""The table between Hugging Face's tensors and our parameters, read in both directions.

Every parameter is one `Entry`: its place in our tree, the tensors it is made of, and how. The check is
strict: what is missing, unexpected or of another shape is listed by name.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from gemma_jax.config import GLOBAL, GemmaConfig
from gemma_jax.errors import InputError

Place = tuple[str, ...]
Shape = tuple[int, ...]

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
GATE_SUFFIX = ".self_attn.gate"  # of the original gemma-2B-10M, for Infini-attention
NAMES_SHOWN = 8  # in an error

# Multimodal checkpoints hold the language model under other names, as do older files of them.
_LANGUAGE_PREFIXES = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
_VISION_PREFIXES = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)
_DERIVED_SUFFIX = ".rotary_emb.inv_freq"  # computed from the configuration; old files store it


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter: the tensors `names` joined along their first axis; a gate is a flat vector."""

    path: Place  # in the parameter tree
    names: tuple[str, ...]  # canonical Hugging Face names
    shapes: tuple[Shape, ...]  # theirs

    def join(self, tensors: Sequence[np.ndarray]) -> np.ndarray:
        """The parameter that the tensors make."""
        joined = tensors[0] if len(tensors) == 1 else np.concatenate(tensors, axis=0)
        return joined.reshape(-1) if self.is_gate else joined

    def split(self, parameter: np.ndarray) -> dict[str, np.ndarray]:
        """The tensors that the parameter is made of; the inverse of `join`."""
        joined = parameter.reshape(self.shapes[0]) if self.is_gate else parameter
        ends = np.cumsum([shape[0] for shape in self.shapes])[:-1]
        parts = np.split(joined, ends, axis=0) if len(self.names) > 1 else [joined]
        return {
            name: np.ascontiguousarray(part) for name, part in zip(self.names, parts, strict=True)
        }

    @property
    def is_matrix(self) -> bool:
        return len(self.shapes[0]) == 2

    @property
    def is_gate(self) -> bool:
        return self.names[0].endswith(GATE_SUFFIX)

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


def table(config: GemmaConfig) -> tuple[Entry, ...]:
    """All parameters of a model that Hugging Face's layouts can hold, in the order of the tree.

    Rule `linear` has its gates in it, as the original gemma-2B-10M stores them; the parameters of the
    other rules have no place in these layouts.
    """
    matrix = (config.vocab_size, config.width)
    entries = [Entry(("embedder", "embedding"), (EMBEDDING,), (matrix,))]
    if not config.tied_embeddings:
        entries.append(Entry(("embedder", "head"), (HEAD,), (matrix,)))
    entries.append(Entry(("final_norm", "scale"), ("model.norm.weight",), ((config.width,),)))

    for i in range(config.num_layers):
        entries += _layer(config, i)
    return tuple(entries)


def _layer(config: GemmaConfig, i: int) -> Iterator[Entry]:
    ours, theirs = f"layers_{i}", f"model.layers.{i}"
    width, mlp, dim = config.width, config.mlp_dim, config.head_dim
    queries, keys = (config.num_heads * dim, width), (config.num_kv_heads * dim, width)

    def matrix(path: Place, tensors: Mapping[str, Shape]) -> Entry:
        names = tuple(f"{theirs}.{name}.weight" for name in tensors)
        return Entry((ours, *path), names, tuple(tensors.values()))

    def scale(path: Place, name: str, size: int) -> Entry:
        return Entry((ours, *path, "scale"), (f"{theirs}.{name}.weight",), ((size,),))

    qkv = {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys}
    gate_up = {"mlp.gate_proj": (mlp, width), "mlp.up_proj": (mlp, width)}
    yield matrix(("attention", "qkv"), qkv)
    yield matrix(("attention", "out"), {"self_attn.o_proj": queries[::-1]})
    yield matrix(("mlp", "gate_up"), gate_up)
    yield matrix(("mlp", "down"), {"mlp.down_proj": (width, mlp)})

    yield scale(("pre_attention_norm",), "input_layernorm", width)
    if config.post_norms:
        yield scale(("post_attention_norm",), "post_attention_layernorm", width)
        yield scale(("pre_mlp_norm",), "pre_feedforward_layernorm", width)
        yield scale(("post_mlp_norm",), "post_feedforward_layernorm", width)
    else:  # Gemma 1 calls the norm before the feed-forward post_attention_layernorm
        yield scale(("pre_mlp_norm",), "post_attention_layernorm", width)
    if config.qk_norm:
        yield scale(("attention", "query_norm"), "self_attn.q_norm", dim)
        yield scale(("attention", "key_norm"), "self_attn.k_norm", dim)
    if config.memory.rule == "linear" and config.layer_types[i] == GLOBAL:
        path = (ours, "attention", "memory", "gate")
        yield Entry(path, (theirs + GATE_SUFFIX,), ((1, config.num_heads, 1, 1),))


def canonical(name: str) -> str | None:
    """The name a tensor has in a text-only checkpoint; None for what is no part of the language model."""
    if name.startswith(_VISION_PREFIXES) or name.endswith(_DERIVED_SUFFIX):
        return None
    for prefix, replacement in _LANGUAGE_PREFIXES:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


def check(entries: Iterable[Entry], shapes: Mapping[str, Shape]) -> None:
    """Compares the table with the tensors that are there, by canonical name.

    Raises:
        InputError: listing what is missing, unexpected and of another shape.
    """
    expected = {
        name: shape
        for entry in entries
        for name, shape in zip(entry.names, entry.shapes, strict=True)
    }
    problems = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unexpected": sorted(shapes.keys() - expected.keys()),
        "of another shape": [
            f"{name} is {list(shapes[name])}, expected {list(expected[name])}"
            for name in sorted(expected.keys() & shapes.keys())
            if tuple(shapes[name]) != expected[name]
        ],
    }
    if found := [f"{what}: {_some(names)}" for what, names in problems.items() if names]:
        raise InputError(
            f"The weights are not those that config.json describes ({'; '.join(found)}):"
            " download the model again, or correct its config.json."
        )


def _some(names: Sequence[str]) -> str:
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
