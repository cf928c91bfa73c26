"""The tiny random model that is asked."""

import pytest

from gemma_jax import random_model


@pytest.fixture(scope="session")
def tokenizer():
    import transformers

    return transformers.PreTrainedTokenizerFast(tokenizer_object=random_model.make_tokenizer())


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """The random model as Hugging Face and as we have it."""
    from gemma_jax.checkpoint.convert import convert

    directory = tmp_path_factory.mktemp("evaluate")
    source = random_model.write_hugging_face(directory / random_model.NAME)
    convert(source, directory / "model", dtype="float32")
    return source, directory / "model"
