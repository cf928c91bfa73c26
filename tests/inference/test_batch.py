"""Many prompts: every line has its answer or its error, in order, all about the same memory."""

import json

import hypothesis
import pytest
from hypothesis import strategies as st

import gemma_jax
from gemma_jax.errors import InputError, OutOfMemoryError
from gemma_jax.inference import batch, reader, remember

CHUNK = 16
REPORT = {"text", "tokens", "prompt_tokens", "finish_reason", "seed", "model", "memory_rule"}


@pytest.fixture(scope="module")
def model(random_checkpoint):
    return gemma_jax.load(random_checkpoint, segment_length=CHUNK)


@pytest.fixture(scope="module")
def memory(model):
    return remember.remember(model, "the people called him " * 9, chunk_tokens=CHUNK)


def ask(model, memory, *lines, **options):
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    options = {"max_new_tokens": 5, "chunk_tokens": CHUNK} | options
    return list(batch.answers(model, lines, memory, **options))


def alone(model, memory, prompt, **options):
    options = {"max_new_tokens": 5, "chunk_tokens": CHUNK} | options
    answer = reader.generate(model, prompt, memory=remember.fork(memory), **options)
    return "".join(answer)


def test_every_line_is_answered_as_it_would_be_alone_and_in_order(model, memory):
    prompts = ["who", "how many", {"prompt": "was it", "id": [3]}, "who"]
    found = ask(model, memory, *prompts)
    assert [report["line"] for report in found] == [1, 2, 3, 4]
    texts = [alone(model, memory, prompt) for prompt in ("who", "how many", "was it", "who")]
    assert [report["text"] for report in found] == texts
    assert found[2]["id"] == [3] and set(found[0]) >= REPORT


def test_lines_have_options_of_their_own(model, memory):
    options = {"max_new_tokens": 3, "temperature": 1.0, "seed": 4, "top_k": 5}
    found = ask(model, memory, {"prompt": "who"} | options, "who")
    assert found[0]["text"] == alone(model, memory, "who", **options)
    assert found[1]["text"] == alone(model, memory, "who")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"\xff", "not JSON in UTF-8"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (3, "neither a string"),
        ({"id": 3}, "neither a string"),
        ({"prompt": 3}, "wrong type"),
        ({"prompt": "a", "seed": True}, "wrong type"),
        ({"prompt": "a", "stop": [1]}, "wrong type"),
        ({"prompt": "a", "stop": [""]}, "stop text is empty"),
        ({"prompt": "a", "prompts": "b"}, '"prompts"'),
        ({"prompt": ""}, "empty"),
        ({"prompt": "a", "seed": -1}, "seed is -1"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature"),
        ({"prompt": "\ud800"}, "not characters"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_line_has_an_error_and_the_others_their_answers(model, memory, line, words):
    found = ask(model, memory, "who", line, "who")
    assert [set(report) >= REPORT for report in found] == [True, False, True]
    assert words in found[1]["error"] and found[1]["line"] == 2
    assert found[0]["text"] == found[2]["text"] == alone(model, memory, "who")


def test_an_error_inside_is_the_lines_own_and_a_lack_of_memory_is_not(model, memory, monkeypatch):
    def fail(model, prompt, **_):
        raise MemoryError if prompt == "big" else ValueError("odd")

    monkeypatch.setattr(batch, "generate", fail)
    assert "ValueError: odd" in ask(model, memory, "who")[0]["error"]
    with pytest.raises(OutOfMemoryError):
        ask(model, memory, "big")


def test_without_a_memory_every_prompt_is_a_text_of_its_own(model):
    found = ask(model, remember.new_memory(model), "who", "who", template=True)
    expected = reader.generate(model, "who", template=True, max_new_tokens=5, chunk_tokens=CHUNK)
    assert [report["text"] for report in found] == ["".join(expected)] * 2


@hypothesis.given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from([*batch.FIELDS, "x"]), inner, max_size=4)
        ),
    )
)
@hypothesis.settings(max_examples=300, deadline=None)
def test_any_json_is_a_prompt_or_a_sentence(content):
    try:
        fields = batch._fields(json.dumps(content).encode(), "strict")
    except InputError as error:
        assert str(error)
    else:
        assert isinstance(fields["prompt"], str)


def test_prompts_that_cannot_be_read_are_input_errors(tmp_path):
    for path in (tmp_path, tmp_path / "no"):
        with pytest.raises(InputError, match="file of JSON lines"):
            batch.open_prompts(str(path))
