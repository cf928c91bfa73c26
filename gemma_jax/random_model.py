"""A tiny Gemma with random weights as Hugging Face would have it, for tests and benchmarks.

It knows nothing: what it writes is noise.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from gemma_jax.train.tokenizer import CHARACTERS, CONTROL_TOKENS, assemble

NAME = "random-tiny-gemma"

_WORDS = (
    "the of and to in that it is was for on are with as his they be at one have this from or had"
    " by not but what all were when we there can an your which their said if do will each about"
    " how up out them then she many some so her would other into has more two like him see time"
    " could no make than first been its who now people my made over did down only way find use may"
    " water long little very after words called just where most know"
)
_CONFIG = {
    "architectures": ["GemmaForCausalLM"],
    "model_type": "gemma",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,  # a random tied model repeats its last word for ever
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "torch_dtype": "float32",
}


def write_hugging_face(directory: Path, seed: int = 0) -> Path:
    """Writes the model as Hugging Face would: configuration, weights and tokenizer."""
    import safetensors.numpy

    directory.mkdir(parents=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")},
        },
    )
    _write_json(directory / "config.json", _CONFIG | {"vocab_size": tokenizer.get_vocab_size()})
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": 2, "eos_token_id": [1, 5], "pad_token_id": 0},
    )
    weights = _random_weights(np.random.default_rng(seed), tokenizer.get_vocab_size())
    safetensors.numpy.save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def make_tokenizer() -> Any:
    """A small tokenizer built as Gemma's is: BPE over characters with ▁ for the space, bytes for
    the rest.
    """
    merges = [("\n", "\n")]
    for word in _WORDS.split():
        merges += [("▁" + word[:i], word[i]) for i in range(len(word))]
    return assemble(CHARACTERS, list(dict.fromkeys(merges)))


def _random_weights(rng: np.random.Generator, vocab_size: int) -> dict[str, np.ndarray]:
    width, mlp, head_dim = _CONFIG["hidden_size"], _CONFIG["intermediate_size"], _CONFIG["head_dim"]
    queries, keys = (
        _CONFIG["num_attention_heads"] * head_dim,
        _CONFIG["num_key_value_heads"] * head_dim,
    )

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.normal(0.0, columns**-0.5, (rows, columns)).astype(np.float32)

    def norm() -> np.ndarray:
        return rng.normal(0.0, 0.3, width).astype(np.float32)

    head_rows = 2 * matrix(vocab_size, width)
    head_rows[: len(CONTROL_TOKENS) + 256] *= (
        0.05  # control tokens and bytes would make unreadable noise
    )
    weights = {
        "model.embed_tokens.weight": matrix(vocab_size, width),
        "model.norm.weight": norm(),
        "lm_head.weight": head_rows,
    }
    for layer in range(_CONFIG["num_hidden_layers"]):
        shapes = {
            "self_attn.q_proj": (queries, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, queries),
            "mlp.gate_proj": (mlp, width),
            "mlp.up_proj": (mlp, width),
            "mlp.down_proj": (width, mlp),
        }
        prefix = f"model.layers.{layer}"
        weights |= {f"{prefix}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        weights |= {
            f"{prefix}.{name}.weight": norm()
            for name in ("input_layernorm", "post_attention_layernorm")
        }
    return weights


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
