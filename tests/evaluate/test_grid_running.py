"""Rows of a batch answer as single texts do, and forked States as texts read whole."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from reference import random_params, random_tokens, tiny_config

import gemma_jax
from gemma_jax import PRESETS, random_model
from gemma_jax.checkpoint.store import Model
from gemma_jax.evaluate.haystack import reach
from gemma_jax.evaluate.running import MOST_CHUNKS, Reader, chunk_tokens, fork, without_memory

LIMIT = 9


@functools.cache
def model():
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=random_model.make_tokenizer())
    config = tiny_config(
        rule="gated_delta",
        segment_length=8,
        layer_types=("global", "sliding"),
        vocab_size=tokenizer.vocab_size,
        tied_embeddings=False,  # a tied random model repeats its last token
    )
    return Model(config, random_params(config, seed=3), tokenizer, None)


def texts(count, length=90):
    """Texts of different lengths, in lists of ids as a generator gives them."""
    found = random_tokens(model().config, count, length).tolist()
    return [[row[:3], row[3 : length - 7 * i]] for i, row in enumerate(found)]


QUESTIONS = [[11, 12, 13], [21, 22, 23, 24, 25], [31], [41, 42]]


def joined(text):
    return [i for some in text for i in some]


def directly(text, question):
    """The greedy answer to a text and question read at once, alone."""
    found = model()
    ids = joined(text) + question
    tokens = np.zeros((1, 100), np.int32)
    tokens[0, : len(ids)] = ids
    logits, state = gemma_jax.prefill(
        found.params,
        tokens,
        gemma_jax.init_state(found.config),
        config=found.config,
        lengths=np.array([len(ids)], np.int32),
    )
    tokens, counts, _, _ = gemma_jax.decode_block(
        found.params,
        logits,
        state,
        config=found.config,
        sampling=gemma_jax.Greedy(),
        key=jax.random.key(1),
        num_tokens=LIMIT,
        stop_ids=(1, 5),
    )
    return tokens[0, : counts[0]].tolist()


def text_of(ids):
    from gemma_jax.evaluate.answers import to_text

    return to_text(model().tokenizer, ids, (1, 5))


def test_questions_on_a_forked_state_are_answered_as_if_it_was_read_for_each():
    reader = Reader(model(), rows=4, question_tokens=16)
    (text,) = texts(1)
    state = reader.read([text], 1, lambda count: None)
    for questions in (QUESTIONS, QUESTIONS[1:3]):  # the State is still there for a second batch
        answers = reader.answer(reader.fork(state), questions, [LIMIT] * len(questions))
        expected = [directly(text, question) for question in questions]
        assert [answer.text for answer in answers] == [text_of(ids) for ids in expected]
        assert [answer.tokens for answer in answers] == [len(ids) for ids in expected]
        assert all(answer.finite for answer in answers)
    assert len({answer.text for answer in answers}) > 1


def test_questions_are_asked_of_the_haystack_that_was_read_in_their_row():
    reader = Reader(model(), rows=4, question_tokens=16, beside=3)
    some = texts(2)  # of three that could be read
    state, read_in = reader.read(some, 3, lambda count: None), [1, 0, 0, 1]
    for used in (read_in, read_in[1:]):  # the State is still there for a second batch
        questions = QUESTIONS[-len(used) :]
        answers = reader.answer(reader.fork(state, used), questions, [LIMIT] * len(used))
        expected = [directly(some[row], q) for row, q in zip(used, questions, strict=True)]
        assert [answer.text for answer in answers] == [text_of(ids) for ids in expected]
    swapped = [directly(some[1 - row], q) for row, q in zip(used, questions, strict=True)]
    assert swapped != expected


def test_rows_of_a_batch_are_answered_as_single_texts():
    reader = Reader(model(), rows=4, question_tokens=16)
    some, told = texts(3), []
    state = reader.read(some, 4, told.append)
    assert state.length.tolist() == [*(len(joined(text)) for text in some), 0]
    assert sum(told) == sum(len(joined(text)) for text in some)
    answers = reader.answer(state, QUESTIONS[:3], [LIMIT, 4, LIMIT])
    expected = [directly(*pair) for pair in zip(some, QUESTIONS[:3], strict=True)]
    expected[1] = expected[1][:4]
    assert [answer.text for answer in answers] == [text_of(ids) for ids in expected]
    assert [answer.tokens for answer in answers] == [len(ids) for ids in expected]


@pytest.mark.parametrize("beside", [1, 3])
def test_a_grid_of_any_lengths_compiles_once(beside):
    reader = Reader(model(), rows=4, question_tokens=16, beside=beside)
    reader.warm_up([True, False])
    compiled = [f._cache_size() for f in (gemma_jax.prefill, gemma_jax.decode_block, fork)]
    for length in (30, 75):
        some = texts(2, length)
        reader.answer(reader.read(some, 4, print), QUESTIONS[:2], [20, 3])
        shared = reader.read(some[:beside], beside, print)
        reader.answer(reader.fork(shared, [beside > 1]), QUESTIONS[:1], [5])
    found = [f._cache_size() for f in (gemma_jax.prefill, gemma_jax.decode_block, fork)]
    assert found == compiled


def test_numbers_that_are_not_finite_are_told_row_by_row():
    found = model()
    broken = jax.tree.map(np.array, found.params)
    broken["embedder"]["embedding"][31] = np.nan
    reader = Reader(Model(found.config, broken, found.tokenizer, None), rows=4, question_tokens=16)
    some = [[[2, 7, 8]]] * 4
    answers = reader.answer(reader.read(some, 4, print), QUESTIONS, [2] * 4)
    assert [answer.finite for answer in answers] == [True, True, False, True]


def test_without_memory_is_the_model_with_memory_off():
    with_memory = model()
    plain = with_memory.config.with_memory(rule="off")
    params = jax.tree.map(lambda leaf: leaf, with_memory.params)
    for layer in params.values():
        layer.get("attention", {}).pop("memory", None)
    (text,) = texts(1)
    answers = []
    for found in (
        with_memory,
        without_memory(with_memory),
        Model(plain, params, with_memory.tokenizer, None),
    ):
        reader = Reader(found, rows=4, question_tokens=16)
        state = reader.read([text], 4, print)
        answers.append(reader.answer(state, QUESTIONS[:1], [LIMIT])[0].text)
    assert answers[0] != answers[1] == answers[2]


@pytest.mark.parametrize(
    "form, layers",
    [
        ("transformer_xl", ("global", "global")),
        ("transformer_xl", ("global", "sliding", "global")),
        ("segment", ("sliding", "global", "sliding")),
    ],
)
def test_nothing_comes_from_beyond_the_reach_of_local_attention(form, layers):
    """At the place of a segment that sees furthest, the token at the bound moves the logits; nowhere
    does one before it."""
    config = tiny_config(
        rule="off", local_attention=form, segment_length=4, layer_types=layers, sliding_window=3
    )
    params, bound = random_params(config, seed=5), reach(config)
    longest, furthest = bound + 7, 0
    for length in range(longest - 3, longest + 1):
        rows = np.repeat(np.asarray(random_tokens(config, 1, longest)), longest, axis=0)
        changed = np.arange(1, length)  # by row; the last rows are as they were
        rows[changed - 1, changed] = (rows[changed - 1, changed] + 17) % config.vocab_size
        logits, _ = gemma_jax.prefill(
            params,
            rows,
            gemma_jax.init_state(config, longest),
            config=config,
            lengths=np.full(longest, length, np.int32),
        )
        moved = np.any(np.asarray(logits) != np.asarray(logits)[-1], axis=1)[: length - 1]
        furthest = max(furthest, length - changed[moved][0])
    assert furthest == bound


def test_rows_of_a_small_model_are_read_in_chunks_that_keep_a_gpu_busy(monkeypatch):
    large = PRESETS["gemma-2b"].with_memory(segment_length=128)
    small = dataclasses.replace(large, width=256, mlp_dim=1024, layer_types=large.layer_types[:4])
    on_cpu = [chunk_tokens(config, 4) for config in (small, large)]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    alone = chunk_tokens(large, 1)
    assert on_cpu == [128, 128] and chunk_tokens(small, 1) == alone  # no more than alone
    assert chunk_tokens(large, 16) * 16 == alone
    assert chunk_tokens(small, 16) * 16 == MOST_CHUNKS * alone
    assert chunk_tokens(small, 10_000) == 128  # a segment at least
