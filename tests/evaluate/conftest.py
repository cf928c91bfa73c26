"""The tiny random model that is asked, and the command that asks it."""

import dataclasses
import sys

import pytest

from gemma_jax import random_model
from gemma_jax.evaluate import command


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


@dataclasses.dataclass
class Finished:
    code: int
    out: str
    err: str


@pytest.fixture
def evaluate(capsys, monkeypatch):
    """Runs the command in this process, as if it was typed."""

    def call(*arguments) -> Finished:
        arguments = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
        try:
            code = command.main()
        except SystemExit as exit_:
            code = exit_.code
        return Finished(code, *capsys.readouterr())

    return call
