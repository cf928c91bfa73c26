"""A text read at once, kept in between, or interrupted and gone on with: the same, bit by bit."""

import dataclasses
import itertools

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

import gemma_jax
from gemma_jax import text
from gemma_jax.checkpoint import memory_file
from gemma_jax.errors import GemmaError, InputError, UsageError
from gemma_jax.inference import reader, remember, saving
from gemma_jax.inference.documents import Documents
from gemma_jax.inference.saving import Autosave, Interrupted
from gemma_jax.text import Place

CHUNK = 16
SENTENCES = (
    "the people called him and then there was only water",
    "  an  odd   line\n\n\n",
    "漢字 and é and 🦀 <bos> <end_of_turn>",
    "\n",
    "how many of these words were in the second book",
)


@pytest.fixture(scope="module")
def model(random_checkpoint):
    return gemma_jax.load(random_checkpoint, segment_length=CHUNK)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(text, "PART_CHARS", 24)
    monkeypatch.setattr(text, "PARTS_PER_BATCH", 2)


def book(seed: int, lines: int) -> str:
    return "\n".join(np.random.default_rng(seed).choice(SENTENCES, lines).tolist()) + "end"


def whole(model, content, **options):
    return remember.recall(
        model, remember.new_memory(model), content, chunk_tokens=CHUNK, **options
    )


def parts(model, content, memory=None, **options):
    return remember.remember(model, content, memory, chunk_tokens=CHUNK, **options)


def kept(model, memory, path):
    memory_file.save(path, memory, model)
    return memory_file.load(path, model)


def assert_same(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def assert_same_reading(found, expected):
    assert_same((found.logits, found.state), (expected.logits, expected.state))


# --- memory files ---


@hypothesis.given(
    contents=st.lists(st.text("ab \n漢<", min_size=1, max_size=120), min_size=1, max_size=3),
    question=st.text("ab \n", min_size=1, max_size=20).filter(str.strip),
    template=st.booleans(),
)
@hypothesis.settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_asking_a_memory_gives_the_tokens_of_reading_everything(
    model, contents, question, template
):
    """Without the model: which ids it would be given."""
    if not template or contents[0].strip():
        ids, memory = [], remember.new_memory(model)
        for content in contents:
            stream = remember._Stream(model, content, memory, template)
            ids = list(itertools.chain.from_iterable(stream.ids()))
            memory = stream.finished(reader.Reading(None, memory.state, 0, 0.0), ids)
        stream = remember._Stream(model, question, memory, template)
        found = itertools.chain.from_iterable(stream.all_ids())
        everything = text.encode_prompt(
            model.tokenizer,
            ["\n".join([*contents, question])],
            bos_id=model.config.bos_id,
            template=template,
        )
        assert list(found) == list(itertools.chain.from_iterable(everything))


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("lines", [1, 3, 12])
def test_asking_a_saved_memory_is_reading_everything(model, tmp_path, lines, template):
    context, question = book(lines, lines), "who was it"
    expected = whole(model, f"{context}\n{question}", template=template)
    memory = parts(model, context, template=template)
    assert memory.place == (Place.TURN if template else Place.TEXT)
    for _ in range(2):  # it can be asked again and again
        loaded = kept(model, memory, tmp_path / "a.mem")
        assert_same_reading(remember.recall(model, loaded, question, chunk_tokens=CHUNK), expected)


def test_more_can_be_read_into_a_loaded_memory(model, tmp_path):
    texts = [book(seed, 6) for seed in range(3)]
    expected = whole(model, "\n".join(texts))
    memory = None
    for content in texts:
        memory = kept(model, parts(model, content, memory), tmp_path / "a.mem")
    assert_same_reading(remember.recall(model, memory, chunk_tokens=CHUNK), expected)


def test_a_fork_leaves_the_memory_as_it_was(model):
    memory = parts(model, book(0, 10))
    first, second = (
        remember.recall(model, remember.fork(memory), "who", chunk_tokens=CHUNK) for _ in range(2)
    )
    assert_same_reading(first, second)


def test_a_turn_on_top_of_plain_text_is_a_turn_of_its_own(model):
    memory = parts(model, "the people\n")
    found = remember._Stream(model, " who ", memory, True).all_ids()
    start, end = (
        model.tokenizer.convert_tokens_to_ids(f"<{name}_of_turn>") for name in ("start", "end")
    )
    encode = lambda content: text.encode(model.tokenizer, content)  # noqa: E731
    assert list(itertools.chain.from_iterable(found)) == [
        *[model.config.bos_id, *encode("the people\n"), start, *encode("user\nwho"), end],
        *[*encode("\n"), start, *encode("model\n")],
    ]


@pytest.mark.parametrize("template", [False, True])
def test_control_tokens_in_context_and_question_are_text_and_bos_comes_once(model, template):
    marks = "<bos><eos><start_of_turn>model\n<end_of_turn>"
    memory = remember.new_memory(model)
    ids = []
    for content in (marks, f"{marks} who"):
        stream = remember._Stream(model, content, memory, template)
        found = stream.ids() if not ids else stream.all_ids()
        ids += [list(itertools.chain.from_iterable(found))]
        memory = stream.finished(reader.Reading(None, memory.state, 0, 0.0), ids[-1])
    control = [i for i in ids[1] if i in text.control_tokens(model.tokenizer).values()]
    names = model.tokenizer.convert_ids_to_tokens(control)
    turn = ["<start_of_turn>", "<end_of_turn>", "<start_of_turn>"]
    assert names == ["<bos>", *(turn if template else [])]


def test_load_state_is_never_saved(model, tmp_path):
    content = book(1, 8)
    memory = parts(model, content)
    memory_file.save(tmp_path / "a.mem", memory, model)
    logits, state = gemma_jax.load_state(tmp_path / "a.mem", model)
    expected = whole(model, content)
    np.testing.assert_allclose(logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert state.length.tolist() == expected.state.length.tolist()


def test_nothing_but_white_space_in_a_turn_is_refused(model):
    with pytest.raises(InputError, match="white space"):
        parts(model, " \n " * 20, template=True)


def test_a_memory_of_an_answer_needs_a_question(model):
    memory = dataclasses.replace(remember.new_memory(model), place=Place.ANSWER)
    with pytest.raises(InputError, match="nothing to read"):
        remember.recall(model, memory)


# --- interruptions ---


class Leaves(Autosave):
    """Is interrupted after so many pieces."""

    def __init__(self, path, model, pieces):
        super().__init__(path, model)
        self._pieces = pieces

    def due(self):
        self._pieces -= 1
        self.interrupted = self._pieces == 0
        return self.interrupted


def documents(tmp_path, *contents, **options):
    paths = []
    for i, content in enumerate(contents):
        paths.append(str(tmp_path / f"{i}.txt"))
        (tmp_path / f"{i}.txt").write_text(content)
    return Documents(paths, **options)


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("pieces", [1, 2, 7, 20])
def test_a_reading_that_is_gone_on_with_is_one_that_was_not_interrupted(
    model, tmp_path, monkeypatch, pieces, template
):
    monkeypatch.setattr("gemma_jax.inference.documents.READ_BYTES", 50)
    contents = ["  \n" + book(0, 20), book(1, 3), book(2, 30)]
    expected = parts(model, documents(tmp_path, *contents), template=template)
    memory = None
    for _ in range(2):  # and interrupted again
        path = tmp_path / "partial.mem"
        keeper = Leaves(path, model, pieces)
        with pytest.raises(Interrupted, match="--resume"):
            parts(model, documents(tmp_path, *contents), memory, template=template, keeper=keeper)
        assert keeper.interrupted
        memory = saving.load_reading(str(path), model, resume=True)
        assert memory.unread
    found = parts(model, documents(tmp_path, *contents), memory, template=template)
    assert_same(found.state, expected.state)
    assert dataclasses.replace(found, state=None) == dataclasses.replace(expected, state=None)


def test_an_interruption_in_the_first_piece_keeps_nothing(model, tmp_path):
    keeper = Leaves(tmp_path / "partial.mem", model, 1)
    keeper.interrupted = True
    with pytest.raises(Interrupted, match="nothing was saved"):
        parts(model, documents(tmp_path, "a"), keeper=keeper)


def test_more_text_that_is_interrupted_goes_on_from_the_memory_it_follows(model, tmp_path):
    first, second = book(0, 6), book(1, 20)
    expected = parts(model, second, parts(model, first))
    memory = parts(model, first)
    with pytest.raises(Interrupted):
        keeper = Leaves(tmp_path / "partial.mem", model, 9)
        parts(model, documents(tmp_path, second), memory, keeper=keeper)
    memory = saving.load_reading(str(tmp_path / "partial.mem"), model, resume=True)
    found = parts(model, documents(tmp_path, second), memory)
    assert_same(found.state, expected.state)
    assert (found.ids, found.text) == (expected.ids, expected.text)


def test_files_that_changed_are_refused(model, tmp_path):
    with pytest.raises(Interrupted):
        keeper = Leaves(tmp_path / "partial.mem", model, 5)
        parts(model, documents(tmp_path, book(0, 20)), keeper=keeper)
    memory = memory_file.load(tmp_path / "partial.mem", model)
    with pytest.raises(InputError, match="does not begin with"):
        parts(model, documents(tmp_path, "A" + book(0, 20)[1:]), memory)


def test_complete_and_interrupted_readings_are_not_taken_for_each_other(model, tmp_path):
    with pytest.raises(Interrupted):
        keeper = Leaves(tmp_path / "partial.mem", model, 5)
        parts(model, documents(tmp_path, book(0, 20)), keeper=keeper)
    memory_file.save(tmp_path / "a.mem", parts(model, "abc"), model)
    with pytest.raises(UsageError, match="--resume"):
        saving.load_reading(str(tmp_path / "partial.mem"), model)
    with pytest.raises(UsageError, match="--load-memory"):
        saving.load_reading(str(tmp_path / "a.mem"), model, resume=True)
    with pytest.raises(InputError, match="not read to its end"):
        gemma_jax.load_state(tmp_path / "partial.mem", model)
    with pytest.raises(UsageError, match="needs its files"):
        memory = saving.load_reading(str(tmp_path / "partial.mem"), model, resume=True)
        parts(model, "only text", memory)


def test_an_interval_that_has_passed_saves_and_reading_goes_on(model, tmp_path):
    keeper = Autosave(tmp_path / "partial.mem", model, seconds=0.0)
    found = parts(model, documents(tmp_path, book(0, 20)), keeper=keeper)
    saved = saving.load_reading(str(tmp_path / "partial.mem"), model, resume=True)
    assert 0 < saved.tokens <= found.tokens


def test_what_is_held_of_a_text_does_not_grow_with_it(model, tmp_path, monkeypatch):
    """Neither with a keeper nor without."""
    monkeypatch.setattr("gemma_jax.inference.documents.READ_BYTES", 50)
    held = []
    advance = remember._Stream.advance

    def spy(stream, given):
        advance(stream, given)
        held.append(len(stream._parts) + len(stream._text._marks or ()))

    monkeypatch.setattr(remember._Stream, "advance", spy)
    for keeper in (None, Autosave(tmp_path / "partial.mem", model, seconds=1e9)):
        parts(model, documents(tmp_path, book(0, 400)), keeper=keeper)
    assert len(held) > 200 and max(held) < 40


def test_a_full_disk_while_reading_costs_a_warning(model, tmp_path):
    said = []
    (tmp_path / "file").touch()
    keeper = Autosave(tmp_path / "file" / "no.mem", model, seconds=0.0, say=said.append)
    parts(model, documents(tmp_path, book(0, 20)), keeper=keeper)
    assert "cannot be written" in said[0]


def test_autosaves_are_named_after_what_they_belong_to():
    assert str(saving.autosave_path(None, "a/b.mem", ["c.txt"])) == "a/b.partial.mem"
    assert str(saving.autosave_path(None, None, ["-", "a/c.txt"])) == "c.partial.mem"
    assert str(saving.autosave_path(None, None, ["-"])) == "reading.partial.mem"
    assert str(saving.autosave_path("d.mem", "b.mem", [])) == "d.mem"


def test_the_command_to_go_on_is_the_same_with_where_it_was_saved():
    arguments = ["run.py", "--context", "a b.txt", "--load-memory", "x", "--resume=y", "--json"]
    assert (
        saving.command_to_go_on(arguments, "p.mem")
        == "python run.py --context 'a b.txt' --json --resume p.mem"
    )


# --- numbers ---


def test_a_state_that_is_not_finite_stops_the_reading_and_names_layer_and_segment(model):
    def broken(state):
        layer = state.layers[1]
        bad = dataclasses.replace(layer, sink_value=layer.sink_value.at[0, 0, 0, 0].set(np.nan))
        return dataclasses.replace(state, layers=(state.layers[0], bad))

    for count, chunk_tokens, words in (
        (80, 2 * CHUNK, r"40 to 63 \(segments 2 to 3\)"),
        (80, CHUNK, r"40 to 47 \(segment 2\)"),  # from there on pieces begin where segments do
        (8, CHUNK, r"40 to 47 \(segment 2\)"),
    ):
        state = broken(reader.read(model, [[7] * 40], chunk_tokens=CHUNK).state)
        with pytest.raises(GemmaError, match=f"State of layer 1 .* tokens {words}") as caught:
            reader.read(model, [[7] * count], state, chunk_tokens=chunk_tokens)
        assert caught.value.exit_code == 1


def test_a_state_that_goes_wrong_at_the_end_is_not_kept(model):
    """What was written last shows in no logits yet."""
    state = gemma_jax.init_state(model.config)
    layer = state.layers[0]
    far = layer.sink_key.at[:].set(np.inf)  # not seen while the first segment is
    state = dataclasses.replace(
        state,
        length=state.length + 1,
        fill=state.fill + 1,
        layers=(dataclasses.replace(layer, sink_key=far), state.layers[1]),
    )
    with pytest.raises(GemmaError, match="State of layer 0"):
        reader.read(model, [[7] * 3], state, chunk_tokens=CHUNK)
