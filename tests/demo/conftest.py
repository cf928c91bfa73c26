"""A tiny random model with a memory, in the place of the one that comes with the package."""

import pytest
from reference import random_params, tiny_config


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory):
    from gemma_jax import random_model
    from gemma_jax.train.tokenizer import save_tokenizer

    return save_tokenizer(random_model.make_tokenizer(), tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def small_model(tokenizer_directory, tmp_path_factory):
    """A checkpoint in bfloat16 whose memory says something."""
    from gemma_jax.text import load_tokenizer
    from gemma_jax.train.result import write_model

    vocab_size = len(load_tokenizer(tokenizer_directory))
    config = tiny_config(
        rule="gated_delta",
        layer_types=("sliding", "global"),
        vocab_size=vocab_size,
        tied_embeddings=False,  # a tied random model repeats its last token
        dtype="bfloat16",
    )
    path = tmp_path_factory.mktemp("models") / "small-demo"
    write_model(path, config, random_params(config, seed=3), tokenizer_directory, {})
    return path
