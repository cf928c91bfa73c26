"""Gemma that reads millions of tokens in constant memory, in JAX and Flax.

Axis letters, everywhere in this package:
    B batch, T tokens, N segments, S segment length, P history before a segment, J keys,
    D width, H query heads, K KV heads, G = H / K, C head dim, F memory feature dim,
    M mlp dim, V vocabulary, W sliding window, L length of a stream.
"""

from typing import Any

from gemma_jax.config import PRESETS, GemmaConfig, MemoryConfig

_HOMES = {
    "MemoryRule": "model.rule",
    "Parameter": "model.rule",
    "inspect": "model.memory",
    "State": "model.state",
    "init_state": "model.state",
    "state_bytes": "model.state",
    "Transformer": "model.transformer",
    "abstract_params": "model.transformer",
    "init_params": "model.transformer",
    "param_axes": "model.transformer",
    "forward": "model.scan",
    "logits": "model.scan",
    "prefill": "inference.prefill",
    "decode_block": "inference.decode",
    "Greedy": "inference.sampling",
    "Temperature": "inference.sampling",
    "TopK": "inference.sampling",
    "TopP": "inference.sampling",
    "MinP": "inference.sampling",
    "Chain": "inference.sampling",
    "generate": "inference.reader",
    "load": "checkpoint.store",
    "save_state": "inference.saving",
    "load_state": "inference.saving",
}

__all__ = ["PRESETS", "GemmaConfig", "MemoryConfig", *_HOMES]


def __getattr__(name: str) -> Any:
    """Imports what is asked for when it is asked for, so that `run.py --help` needs no JAX."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
