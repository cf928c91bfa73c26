"""A model so small that it learns while one waits, a task that it can learn, and texts to hide it in."""

import dataclasses
import random

import compiling
import pytest
from reference import tiny_config
from teaching import add_digits

from gemma_jax import random_model
from gemma_jax.text import load_tokenizer
from gemma_jax.train import command as train_command
from gemma_jax.train.corpus import tokenize_text

SEGMENT = 16
WORDS = (
    "the of and to in that it is was for on are with as his they be at one have this from".split()
)


@dataclasses.dataclass
class Finished:
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(compiled):
    """What is compiled once is kept for all tests of training."""
    with compiling.quick_compilation(compiled):
        yield


@pytest.fixture(autouse=True)
def tasks_with_digits(monkeypatch):
    add_digits(monkeypatch)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A directory with a tokenizer, a configuration and two texts."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = random_model.make_tokenizer()
    tokenizer.save(str(home / "tokenizer.json"))
    (home / "tokenizer_config.json").write_text("{}")
    config = tiny_config(
        vocab_size=tokenizer.get_vocab_size(),
        width=32,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        layer_types=("global",),
        rule="gated_delta",
        segment_length=SEGMENT,
    )
    (home / "tiny.json").write_text(config.to_json())
    rng = random.Random(0)
    for name, sentences in (("book.txt", 800), ("other.txt", 300)):
        text = (" ".join(rng.choices(WORDS, k=rng.randint(4, 9))) for _ in range(sentences))
        (home / name).write_text(" ".join(f"{words.capitalize()}." for words in text))
    return home


@pytest.fixture(scope="session")
def tokenizer(home):
    return load_tokenizer(home)


@pytest.fixture(scope="session")
def book(home, tokenizer):
    return tokenize_text(home / "book.txt", tokenizer, home / "ids")


@pytest.fixture
def command(capsys):
    """Runs the command in this process."""

    def call(*arguments) -> Finished:
        try:
            code = train_command.main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = exit_.code
        return Finished(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def scratch(home):
    """Options that train the tiny model from scratch."""
    return [
        *("--config", home / "tiny.json", "--tokenizer", home),
        *("--segments", 4, "--tokens-per-step", 1024, "--density", 12, "--language-weight", 0),
        *("--learning-rate", 1e-2, "--memory-learning-rate", 3e-2, "--warmup", 20),
        *("--data-workers", 0, "--data", "task:digits", "--filler", home / "book.txt"),
    ]
