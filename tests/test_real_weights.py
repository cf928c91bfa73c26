"""Real Gemma against Hugging Face transformers. Names a directory with a small model to run:

GEMMA_JAX_REAL_MODEL=path/to/gemma-3-270m python -m pytest tests/test_real_weights.py
"""

import csv
import os
from pathlib import Path

import pytest

SOURCE = os.environ.get("GEMMA_JAX_REAL_MODEL")
if not SOURCE:
    pytest.skip("GEMMA_JAX_REAL_MODEL names no model", allow_module_level=True)
torch = pytest.importorskip("torch")

import transformers  # noqa: E402

import gemma_jax  # noqa: E402
from gemma_jax.checkpoint import adapter as adapters  # noqa: E402
from gemma_jax.checkpoint.convert import convert  # noqa: E402
from gemma_jax.checkpoint.verify import PROMPT  # noqa: E402
from gemma_jax.text import encode  # noqa: E402

ADAPTER = Path(gemma_jax.__file__).parent / "adapters" / "gemma-3-270m"
PAGE = Path(__file__).parents[1] / "docs" / "memory_rules.md"
NEW_TOKENS = 32
PROMPTS = [
    ("Call me Ishmael.", 5),
    ("The capital of France is", 6),
    ("def fibonacci(n):\n    ", 9),
    ("In the beginning God created the heaven and the earth. And the earth was", 16),
    ("Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist", 19),
    (PROMPT, 60),
    (PROMPT, 300),
    (PROMPT, 513),
    (PAGE.read_text(), 900),
    (PAGE.read_text() * 2, 1200),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("converted") / "model"
    done = convert(SOURCE, path, dtype="float32", verify=True)
    assert done.verification.max_kl < 1e-3 and done.verification.tokens >= 450
    print(done.verification)
    return gemma_jax.load(path)


@pytest.fixture(scope="module")
def reference():
    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(SOURCE, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("text, length", PROMPTS, ids=[str(length) for _, length in PROMPTS])
def test_greedy_continuation_is_the_references(model, reference, text, length):
    ids = [model.config.bos_id, *encode(model.tokenizer, text)][:length]
    assert len(ids) == length
    with torch.no_grad():
        expected = reference.generate(
            torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )[0, len(ids) :].tolist()
    from gemma_jax.inference import reader
    from gemma_jax.inference.sampling import Greedy

    reading = reader.read(model, [ids])
    found = reader.write(model, reading, max_new_tokens=NEW_TOKENS, sampling=Greedy())
    assert list(found) == expected


def test_the_adapter_recalls_what_local_attention_has_lost(model, tmp_path):
    from gemma_jax.evaluate.command import main

    if adapters.params_hash(model.params) != adapters.read(ADAPTER).base_hash:
        pytest.skip("the adapter is of other weights of this model")
    given = [
        "--model",
        str(model.path),
        "--adapter",
        str(ADAPTER),
        "--output",
        str(tmp_path / "grid"),
    ]
    asked = [
        "--task",
        "passkey",
        "--lengths",
        "6K",
        "--depths",
        "20",
        "--trials",
        "2",
        "--baseline",
    ]
    assert main([*given, *asked, "--filler", "books", "--shared", "never", "--quiet"]) == 0
    with open(tmp_path / "grid" / "trials.csv", newline="") as file:
        right = [(row["setting"], row["correct"]) for row in csv.DictReader(file)]
    assert sorted(right) == [("off", "False")] * 2 + [("ours", "True")] * 2
