"""Hugging Face directories of tiny models, written by hand so that most tests need no torch."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from gemma_jax import random_model
from gemma_jax.checkpoint.huggingface import table
from gemma_jax.config import GemmaConfig

GEMMA3 = {
    "model_type": "gemma3_text",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session")
def tokenizer_json():
    return random_model.make_tokenizer().to_str()


@pytest.fixture
def make_model(tmp_path, tokenizer_json):
    """Writes a Hugging Face directory; returns its path and its tensors."""

    def make(
        name="source", *, fields=None, dtype=np.float32, change=lambda tensors: tensors, **save
    ):
        directory = tmp_path / name
        directory.mkdir()
        vocabulary = len(json.loads(tokenizer_json)["model"]["vocab"])
        content = GEMMA3 | {"vocab_size": vocabulary} | (fields or {})
        config = GemmaConfig.from_hf(content)
        rng = np.random.default_rng(0)
        tensors = {
            name: rng.normal(0.0, 0.3, shape).astype(dtype)
            for entry in table(config)
            for name, shape in zip(entry.names, entry.shapes, strict=True)
        }
        tensors = change(tensors)
        write_weights(directory, tensors, **save)
        (directory / "config.json").write_text(json.dumps(content))
        (directory / "tokenizer.json").write_text(tokenizer_json)
        (directory / "tokenizer_config.json").write_text("{}")
        stops = {"eos_token_id": [1, 5]}
        (directory / "generation_config.json").write_text(json.dumps(stops))
        return directory, tensors

    return make


def write_weights(directory, tensors, *, shards=1):
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    homes = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        names = sorted(tensors)[i::shards]
        save_file({n: tensors[n] for n in names}, directory / file, metadata={"format": "pt"})
        homes |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": homes}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
