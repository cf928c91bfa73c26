"""Text in, answer out: nothing is lost at any seam, and what goes wrong is said in a sentence."""

import itertools
import threading
import time

import jax
import numpy as np
import pytest

import gemma_jax
from gemma_jax import text
from gemma_jax.errors import GemmaError, InputError, UsageError
from gemma_jax.inference import pieces, reader, reading
from gemma_jax.inference.progress import Progress, Rate, Tokenized
from gemma_jax.inference.streaming import StreamDecoder

CHUNK = 16
PROMPT = "the people called him and then there was only water for a long way"


@pytest.fixture(scope="session")
def model(random_checkpoint):
    return gemma_jax.load(random_checkpoint)


def ids_of(model, content: str) -> list[int]:
    return [model.config.bos_id, *text.encode(model.tokenizer, content)]


def answer(model, content=PROMPT, **options):
    options = {"max_new_tokens": 12, "chunk_tokens": CHUNK} | options
    result = reader.generate(model, content, **options)
    assert "".join(result) == result.text
    return result


@pytest.fixture
def compilations():
    """Counts programs that XLA compiles from here on."""
    names = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **__: names.append(name) if "backend_compile" in name else None
    )
    return names


# --- reading ---


@pytest.mark.parametrize("count", [1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 3])
def test_a_text_of_n_tokens_is_read_whole(model, count):
    ids = np.random.default_rng(count).integers(6, model.config.vocab_size, count).tolist()
    reading = reader.read(model, [ids], chunk_tokens=CHUNK)
    assert reading.tokens == count
    assert reading.state.length.tolist() == [count]


def test_how_ids_are_grouped_does_not_matter(model):
    ids = ids_of(model, PROMPT * 3)
    one = reader.read(model, [ids], chunk_tokens=CHUNK)
    for size in (1, 7, CHUNK, 50):
        groups = [ids[i : i + size] for i in range(0, len(ids), size)]
        np.testing.assert_array_equal(
            reader.read(model, groups, chunk_tokens=CHUNK).logits, one.logits
        )


def test_reading_goes_on_from_a_state(model):
    ids = ids_of(model, PROMPT * 3)
    one = reader.read(model, [ids], chunk_tokens=CHUNK)
    first = reader.read(model, [ids[:41]], chunk_tokens=CHUNK)
    both = reader.read(model, [ids[41:]], first.state, chunk_tokens=CHUNK)
    np.testing.assert_allclose(both.logits, one.logits, rtol=1e-4, atol=1e-4)
    assert both.state.length.tolist() == [len(ids)]


def test_texts_of_other_lengths_do_not_recompile(model, compilations):
    answer(
        model, PROMPT, chunk_tokens=24
    )  # a size of its own, so that there is something to compile
    assert compilations
    compilations.clear()
    for content in ("the", PROMPT * 2, PROMPT * 7):
        answer(model, content, chunk_tokens=24, max_new_tokens=20)
    assert compilations == []


@pytest.mark.parametrize("count", [1, 64, 65, 128, 129, 200, 256, 300])
@pytest.mark.parametrize("begin", [0, 13])
def test_a_long_text_is_read_in_large_pieces_and_what_is_left_in_a_small_one(
    random_checkpoint, monkeypatch, begin, count
):
    model = gemma_jax.load(random_checkpoint, segment_length=16)
    ids = np.random.default_rng(count).integers(6, model.config.vocab_size, begin + count).tolist()
    wanted = reader.read(model, [ids], chunk_tokens=CHUNK)
    before = reader.read(model, [ids[:begin]]).state if begin else None
    monkeypatch.setattr(reading, "piece_sizes", lambda config: (64, 128))
    shapes, prefill = [], reading.prefill

    def watched(params, piece, *given, **options):
        shapes.append(piece.shape[1])
        return prefill(params, piece, *given, **options)

    monkeypatch.setattr(reading, "prefill", watched)
    found = reader.read(model, [ids[begin:]], before)
    np.testing.assert_allclose(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    assert found.state.length.tolist() == [begin + count]
    large, left = divmod(count + begin, 128)  # what is read goes on within its segment
    assert shapes == [128] * large + ([64] if 0 < left <= 64 else [128] if left else [])


def test_nothing_to_read_is_refused(model):
    with pytest.raises(InputError, match="nothing to read"):
        reader.read(model, [[], []], chunk_tokens=CHUNK)
    with pytest.raises(InputError, match="empty"):
        reader.generate(model, "")


def test_an_id_beyond_the_vocabulary_is_refused(model):
    with pytest.raises(InputError, match="do not belong together"):
        reader.read(model, [[2, model.config.vocab_size]], chunk_tokens=CHUNK)


def test_what_goes_wrong_in_the_tokenizers_thread_reaches_the_caller(model):
    def pieces():
        yield "the people"
        raise InputError("no more")

    with pytest.raises(InputError, match="no more"):
        answer(model, pieces())


def test_the_tokenizers_thread_stays_a_little_ahead_and_ends_with_its_reader():
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield taken

    ahead = pieces.ahead(endless(), 4)
    assert next(ahead) == 1
    time.sleep(0.3)
    assert taken <= 8
    ahead.close()
    deadline = time.monotonic() + 5
    while any(thread.name == "gemma_jax tokenizer" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_progress_ends_with_the_exact_number_of_tokens(model):
    seen: list[Progress] = []
    ids = ids_of(model, PROMPT * 5)
    reader.read(model, [ids], chunk_tokens=CHUNK, on_progress=seen.append)
    assert [progress.tokens for progress in seen] == [*range(CHUNK, len(ids), CHUNK), len(ids)]
    assert (seen[-1].total_tokens, seen[-1].seconds_left) == (len(ids), 0.0)


def test_the_whole_is_estimated_from_the_share_that_is_tokenised():
    tokenized = Tokenized(share_read=lambda: 0.25)
    assert tokenized.progress(1, Rate()).total_tokens is None
    groups = tokenized.count([[1] * 30, [1] * 10])
    assert len(next(groups)) == 30
    rate = Rate()
    rate.update(10)
    assert tokenized.progress(10, rate).total_tokens == 120
    assert tokenized.progress(10, rate).seconds_left is None  # the first step includes compilation
    rate.update(20)
    assert tokenized.progress(20, rate).seconds_left > 0
    list(groups)
    assert tokenized.progress(40, rate).total_tokens == 40


# --- writing ---


def test_the_answer_does_not_depend_on_how_it_is_computed(model):
    expected = answer(model, temperature=1.0, seed=3)
    for options in (
        {"chunk_tokens": 64},
        {"block_tokens": 1},
        {"block_tokens": 5},
        {"block_tokens": 12},
    ):
        assert answer(model, temperature=1.0, seed=3, **options).tokens == expected.tokens, options


def test_the_same_seed_gives_the_same_text_and_another_another(model):
    texts = [answer(model, temperature=1.0, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_greedy_is_the_default_and_sampling_options_sample(model):
    greedy = answer(model).tokens
    assert answer(model, temperature=0, seed=5, top_p=0.5).tokens == greedy
    assert answer(model, top_k=1).tokens == greedy
    assert answer(model, top_p=1.0).tokens == answer(model, temperature=1.0).tokens


def test_pieces_of_text_are_the_decoded_tokens(model):
    result = answer(model, max_new_tokens=40, temperature=1.0)
    assert len(result.tokens) == 40
    decoder = StreamDecoder(model.tokenizer)
    assert result.text == "".join([*map(decoder.push, result.tokens), decoder.finish()])
    assert result.finish_reason == "length"


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9])
def test_exactly_as_many_tokens_as_asked_for(model, count):
    result = answer(model, max_new_tokens=count, block_tokens=4)
    assert (len(result.tokens), result.finish_reason) == (count, "length")


def test_a_stop_token_ends_the_answer_and_gives_no_text(model, monkeypatch):
    tokens = answer(model, temperature=1.0).tokens
    at = next(i for i in range(3, 12) if tokens[i] not in tokens[:i])
    monkeypatch.setattr(reader, "stop_token_ids", lambda _: (tokens[at],))
    result = answer(model, temperature=1.0, block_tokens=4)
    assert (result.tokens, result.finish_reason) == (tokens[: at + 1], "stop")
    decoder = StreamDecoder(model.tokenizer)
    assert result.text == "".join([*map(decoder.push, tokens[:at]), decoder.finish()])


def test_a_stop_text_ends_the_answer_before_it(model):
    whole = answer(model, temperature=1.0).text
    stop = whole[7:11]
    result = answer(model, temperature=1.0, stop=[stop, "never written"])
    assert (result.text, result.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert answer(model, temperature=1.0, stop=stop).text == result.text


def test_stop_tokens_are_the_models_list_and_the_templates_end_of_turn(model):
    end_of_turn = model.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert set(reader.stop_token_ids(model)) == {*model.config.eos_ids, end_of_turn}


def test_a_templated_text_is_one_user_turn(model):
    ids = itertools.chain.from_iterable(
        text.encode_prompt(model.tokenizer, [PROMPT], bos_id=model.config.bos_id, template=True)
    )
    result = answer(model, template=True)
    assert result.prompt_tokens == len(list(ids)) > answer(model).prompt_tokens


def test_the_report_has_the_keys_of_the_contract(model):
    report = answer(model).report()
    assert list(report) == [
        "text",
        "tokens",
        "prompt_tokens",
        "finish_reason",
        "seed",
        "model",
        "memory_rule",
        "state_bytes",
        "peak_memory_bytes",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
    ]
    assert report["prompt_tokens"] == len(ids_of(model, PROMPT))
    assert report["prefill_tokens_per_second"] > 0
    assert report["decode_tokens_per_second"] > 0
    assert (report["memory_rule"], report["seed"]) == ("off", 0)


def test_numbers_that_are_not_finite_are_an_error(model):
    class Broken:
        config, tokenizer = model.config, model.tokenizer
        params = jax.tree.map(lambda leaf: leaf * np.nan, model.params)

    with pytest.raises(GemmaError, match="not finite") as caught:
        answer(Broken)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": -1},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 2.0},
        {"min_p": -0.1},
        {"seed": -1},
        {"seed": 2**32},
        {"stop": [""]},
    ],
    ids=str,
)
def test_options_out_of_range_are_usage_errors_before_anything_is_read(model, options):
    with pytest.raises(UsageError):
        reader.generate(model, PROMPT, **options)


def test_nothing_is_read_before_the_first_piece_is_asked_for(model):
    def pieces():
        raise AssertionError
        yield

    reader.generate(model, pieces())
