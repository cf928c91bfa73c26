"""Batches: pure in the seed and the step, of constant size, and true to what they are made of."""

import argparse
import dataclasses
import json
import lzma
import random
import re

import numpy as np
import pytest

from gemma_jax.errors import InputError, UsageError
from gemma_jax.text import batch_encoder, control_tokens, load_tokenizer
from gemma_jax.train import command, corpus, sources
from gemma_jax.train.data import FRESH, Feeder, Mixture, choose_length, make_batch
from gemma_jax.train.noise import LONGEST_MARK, MOST_MARKS, Noise, print_list
from gemma_jax.train.plan import Ramp
from gemma_jax.train.tokenizer import SMALLEST, learn_tokenizer, save_tokenizer

BOS = 2
LANGUAGE = Ramp(0.25, 0.25, (512, 2048))
TASKS = ("passkey", "niah_multikey_1", "niah_multivalue", "variable_tracking", "babilong_qa3")


@pytest.fixture
def make_task(book, tokenizer):
    def make(name="passkey", density=8.0):
        density = density if isinstance(density, Ramp) else Ramp(density, density, (512, 2048))
        return sources.TaskSource(
            name, (book,), batch_encoder(tokenizer), BOS, LANGUAGE, density, 256
        )

    return make


@pytest.fixture
def mixture(book, make_task):
    text = sources.TextSource((book,), BOS, LANGUAGE)
    return Mixture(
        sources=(text, make_task()),
        weights=(Ramp(1.0, 1.0, (512, 2048)), Ramp(3.0, 3.0, (512, 2048))),
        seed=7,
        segment_length=128,
        segments=(4, 16),
        tokens_per_step=8192,
        carry=0.5,
        carried_rows=4,
    )


def same(one, other):
    fields = [field.name for field in dataclasses.fields(one)]
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in fields)


def test_a_batch_depends_on_seed_step_and_progress_alone(mixture):
    first = make_batch(mixture, 3, 0.5)
    assert same(first, make_batch(dataclasses.replace(mixture), 3, 0.5))
    assert not same(first, make_batch(mixture, 4, 0.5))
    assert not same(first, make_batch(dataclasses.replace(mixture, seed=8), 3, 0.5))


def test_other_processes_make_the_same_batches(mixture):
    def first(workers):
        with Feeder(mixture, 5, lambda step: step / 100, workers) as batches:
            return [next(batches) for _ in range(3)]

    for one, other in zip(first(0), first(2), strict=True):
        assert same(one, other)


def test_a_step_always_reads_as_many_tokens(mixture):
    assert mixture.lengths == (512, 1024, 2048)
    shapes = {make_batch(mixture, step, 1.0).weights.shape for step in range(20)}
    assert shapes == {(16, 512), (8, 1024), (4, 2048)}


def test_rows_are_a_multiple_of_the_parts(mixture):
    odd = dataclasses.replace(mixture, parts=3, tokens_per_step=3 * 2048 + 600)
    assert [odd.rows(length) for length in odd.lengths] == [12, 6, 3]


def test_sequences_grow_and_short_ones_stay(mixture):
    def share_of(length, progress):
        return np.mean([choose_length(mixture, step, progress) == length for step in range(200)])

    assert share_of(512, 0.0) == 1.0
    assert share_of(1024, 0.35) > 0.8 and share_of(2048, 0.35) == 0.0
    assert share_of(2048, 1.0) > 0.7 and 0.05 < share_of(512, 1.0) < 0.2
    at_once = dataclasses.replace(mixture, growth=0.0, short_share=0.0)
    assert choose_length(at_once, 0, 0.0) == 2048


def test_some_sequences_start_from_a_kept_memory(mixture):
    start = np.concatenate([make_batch(mixture, step, 1.0).start for step in range(40)])
    assert 0.4 < np.mean(start != FRESH) < 0.6 and set(start) == {FRESH, 0, 1, 2, 3}
    never = dataclasses.replace(mixture, carried_rows=0)
    assert (make_batch(never, 0, 1.0).start == FRESH).all()


@pytest.mark.parametrize("name", TASKS)
def test_answers_follow_their_questions_and_come_after_the_facts(make_task, tokenizer, name):
    source, asked_far, asked_near = make_task(name), 0, 0
    for seed in range(6):
        row = source.row(np.random.default_rng(seed), 4096)
        assert row.ids.shape == row.answers.shape == (4096,) and row.ids[0] == BOS
        assert (row.weights[~row.answers] == 0.25).all()
        edges = np.flatnonzero(np.diff(row.answers.astype(int))) + 1
        assert len(edges) >= 2 and len(edges) % 2 == 0
        for start, end in edges.reshape(-1, 2):
            assert row.weights[start:end] == pytest.approx(max(1.0, 3.0 / (end - start)))
            answer, before = (tokenizer.decode(row.ids[a:b]) for a, b in ((start, end), (0, start)))
            question = before[before.rindex("\n\n") :]
            stop = tokenizer.decode(row.ids[end : end + 1])
            assert not answer.endswith(".") and stop == "." and re.search(r"\S$", question)
            told = before[: -len(question)]
            for value in answer.strip(" .").split(", "):
                assert value in told, (question, answer)
            distance = len(tokenizer(told[told.rindex(value) :])["input_ids"])
            asked_near += distance < 256
            asked_far += distance > 512
        assert edges[-1] > 4096 - 256 // 2 - 40  # the last question is near the end
    assert asked_near and asked_far


def test_facts_are_to_be_kept_and_texts_are_not(make_task, tokenizer, book):
    row = make_task("niah_multikey_1").row(np.random.default_rng(1), 4096)
    edges = np.flatnonzero(np.diff(row.wanted.astype(int))) + 1
    pieces = np.split(row.ids, edges)
    said = [int(part[0]) for part in np.split(row.wanted, edges)]
    by_kind = {kind: "" for kind in (sources.KEEP, sources.LEAVE, sources.UNSAID)}
    for kind, ids in zip(said, pieces, strict=True):
        by_kind[kind] += tokenizer.decode(ids)
    told, passed, asked = (set(re.findall(r"\d{7}", text)) for text in by_kind.values())
    assert told >= asked and len(asked) > 4 and not passed
    assert by_kind[sources.UNSAID].count("?") > 4 and "?" not in by_kind[sources.KEEP]
    assert (row.wanted[row.answers] == sources.UNSAID).all()
    text = sources.TextSource((book,), BOS, LANGUAGE).row(np.random.default_rng(1), 512)
    assert (text.wanted == sources.LEAVE).all()
    copied = make_task("copy").row(np.random.default_rng(1), 4096)
    assert (copied.wanted == sources.UNSAID).all()


def test_what_is_to_be_kept_is_said_of_what_is_read(mixture, tokenizer):
    batch, facts = make_batch(mixture, 3, 1.0), 0
    assert batch.wanted.shape == batch.weights.shape and batch.wanted.dtype == np.int8
    for ids, wanted in zip(batch.ids[:, :-1], batch.wanted, strict=True):
        kept = np.flatnonzero(np.diff(np.pad(wanted == sources.KEEP, 1).astype(int)))
        for start, end in kept.reshape(-1, 2):
            fact = tokenizer.decode(ids[start:end])
            assert fact.startswith(" ") and fact.endswith("."), fact
            facts += 1
    assert facts > 10


def test_facts_stand_between_whole_sentences_of_one_stretch(make_task, tokenizer, home):
    row = make_task(density=1.0).row(np.random.default_rng(0), 2048)
    text = tokenizer.decode(row.ids[1:])
    pieces = [piece for piece in re.split(r"(?<=[.])(?= )", text) if not re.search(r"\d{5}", piece)]
    book = (home / "book.txt").read_text()
    pieces = [piece for piece in pieces[3:-1] if piece.strip() and "\n" not in piece]
    assert len(pieces) > 50 and sum(piece in book for piece in pieces) > 0.9 * len(pieces)


def test_more_questions_than_a_text_can_have_are_spread_over_several(make_task):
    source = make_task()
    assert source.most_questions < 8 * 16_384 / 1000
    rows = [source.row(np.random.default_rng(seed), 16_384) for seed in range(4)]
    asked = [np.sum(np.diff(row.answers.astype(int)) == 1) for row in rows]
    assert max(asked) > source.most_questions


def test_what_has_no_room_for_a_question_is_text(make_task, tokenizer):
    source = make_task("babilong_qa3")
    for length, asked in ((700, True), (100, False)):
        rows = [source.row(np.random.default_rng(seed), length) for seed in range(6)]
        assert all(len(row.ids) == length for row in rows)
        assert {bool(row.answers.any()) for row in rows} == {asked}
    assert 100 < source.shortest < 700
    with pytest.raises(UsageError, match="too few to ask about babilong_qa3"):
        source.asked_at_the_end(np.random.default_rng(0), 100, 1, 0)


def test_records_are_whole_and_their_answers_count(tmp_path, tokenizer):
    file = tmp_path / "qa.jsonl"
    rows = [{"prompt": f"the word {i} is", "answer": f" not {i}"} for i in range(20)]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = corpus.tokenize_jsonl(file, tokenizer, tmp_path / "ids", bos_id=BOS, end_id=1)
    row = sources.RecordSource(found).row(np.random.default_rng(0), 70)
    texts = tokenizer.decode(row.ids).split("<bos>")
    records = {row["prompt"] + row["answer"] + "<eos>" for row in rows}
    assert len(texts) > 4 and texts[0] == ""
    assert all(text.replace("<pad>", "") in records for text in texts[1:])
    answers = tokenizer.decode(row.ids[row.answers]).split("<eos>")[:-1]
    assert {f" not {i}" for i in range(20)} >= set(answers) and len(answers) == len(texts) - 1
    np.testing.assert_array_equal(row.weights, row.answers)
    assert (row.wanted == sources.UNSAID).all()


@pytest.mark.parametrize(
    "lines, line",
    [
        (['{"text": "the people"}', '{"prompt": "a", "answer": "b"}'], 2),
        (['{"prompt": "a"}'], 1),
        (['{"text": 3}'], 1),
        (["the people"], 1),
        (['{"text": "the people"}', '{"text": "caf\udce9"}'], 2),
    ],
)
def test_lines_that_are_no_records_are_named(tmp_path, tokenizer, lines, line):
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(lines), errors="surrogateescape")  # a byte that is no UTF-8
    with pytest.raises(InputError, match=f"line {line} "):
        corpus.tokenize_jsonl(file, tokenizer, tmp_path, bos_id=BOS, end_id=1)


def test_a_text_is_tokenised_once(home, tmp_path, tokenizer, monkeypatch):
    found = corpus.tokenize_text(home / "book.txt", tokenizer, tmp_path)
    ids, starts = np.load(found.ids), np.load(found.starts)
    assert tokenizer.decode(ids) == (home / "book.txt").read_text()
    assert all(tokenizer.decode(ids[at - 1 : at]).endswith(".") for at in starts[1:])
    assert len(starts) == 800
    monkeypatch.setattr(corpus, "encode_stream", None)
    assert corpus.tokenize_text(home / "book.txt", tokenizer, tmp_path) == found
    with pytest.raises(TypeError):
        corpus.tokenize_text(home / "other.txt", tokenizer, tmp_path)


def test_a_compressed_text_is_the_same_text(home, tmp_path, tokenizer):
    text = (home / "book.txt").read_text()
    (tmp_path / "book.txt.xz").write_bytes(lzma.compress(text.encode()))
    found = corpus.tokenize_text(tmp_path / "book.txt.xz", tokenizer, tmp_path)
    assert tokenizer.decode(np.load(found.ids)) == text


def test_the_books_that_come_with_the_package_are_the_default_filler():
    found = command.filler(argparse.Namespace(data=[("task", "passkey", 1.0)], filler=None))
    assert len(found) > 1 and all(file.parent.name == "train" for file in found)
    assert command.matches("books") == found


def test_a_stretch_goes_on_in_the_next_text(home, tmp_path, tokenizer):
    texts = [
        corpus.tokenize_text(home / name, tokenizer, tmp_path) for name in ("book.txt", "other.txt")
    ]
    haystack = corpus.Haystack(texts)
    book, other = (np.load(text.ids) for text in texts)
    ids, starts = haystack.cut(np.random.default_rng(0), 3 * haystack.tokens)
    assert len(ids) == 3 * haystack.tokens
    both = np.concatenate([book, other])
    np.testing.assert_array_equal(np.roll(np.tile(both, 3), -_offset(ids, both)), ids)
    assert starts[0] == 0 and (np.diff(starts) > 0).all()


def _offset(ids, both):
    twice = np.concatenate([both, both])
    return next(i for i in range(len(both)) if np.array_equal(twice[i : i + 60], ids[:60]))


def test_what_cannot_be_made_is_said_before(mixture):
    with pytest.raises(UsageError, match="--tokens-per-step"):
        dataclasses.replace(mixture, tokens_per_step=2047).check()
    stories = dataclasses.replace(mixture, sources=mixture.sources[1:] * 2)
    with pytest.raises(UsageError, match="choose --segments from 5 on"):
        dataclasses.replace(stories, segments=(1, 16), segment_length=32).check()
    mixture.check()


def test_what_needs_longer_sequences_waits_for_them(mixture, make_task):
    stories = dataclasses.replace(
        mixture, sources=(mixture.sources[0], make_task("babilong_qa3")), segments=(1, 16)
    )
    stories.check()
    assert stories.shares(128).tolist() == [1.0, 0.0] and stories.shares(2048)[1] == 0.75
    with pytest.raises(UsageError, match="choose --segments from"):
        dataclasses.replace(stories, segments=(1, 1)).check()


def test_weights_change_by_constant_factors_with_the_length(mixture):
    lengths = (512, 2048)
    growing = dataclasses.replace(mixture, weights=(Ramp(8, 0.5, lengths), Ramp(2, 2, lengths)))
    np.testing.assert_allclose(growing.shares(512), [0.8, 0.2])
    np.testing.assert_allclose(growing.shares(1024), [0.5, 0.5])
    np.testing.assert_allclose(growing.shares(2048), [0.2, 0.8])
    assert Ramp(3, 7, (512, 512)).at(512) == 7


@pytest.mark.parametrize("length, density", [(2048, 4.0), (4096, 2.0), (8192, 1.0)])
def test_questions_are_as_dense_as_the_length_has_it_but_some_are_alone(make_task, length, density):
    source = make_task(density=Ramp(4.0, 1.0, (2048, 8192)))
    rows = [source.row(np.random.default_rng(seed), length) for seed in range(80)]
    questions = [int(np.sum(np.diff(row.answers.astype(int)) == 1)) for row in rows]
    assert 0.5 < questions.count(1) / len(rows) / sources.ALONE < 1.6
    others = [count for count in questions if count > 1]
    # Half of the mean to one and a half times of it, all equally often.
    mean = density * length / 1000
    assert abs(np.mean(others) / mean - 1) < 0.15
    assert min(others) >= int(0.5 * mean) and max(others) <= 1.5 * mean + 1


def save_text(directory, ids, sentence=10):
    """A text of these ids, with a sentence start at every tenth."""
    directory.mkdir()
    text = corpus.Text(directory / "ids.npy", directory / "starts.npy")
    np.save(text.ids, np.asarray(ids, np.int32))
    np.save(text.starts, np.arange(0, len(ids), sentence))
    return text


def test_questions_fill_the_room_there_is_for_them(make_task, tmp_path):
    length, hay = 1000, 1_000_000  # an id that nothing else has
    source = dataclasses.replace(
        make_task("niah_multikey_1"),
        density=Ramp(60, 60, (length, length)),
        texts=(save_text(tmp_path / "hay", np.full(5000, hay)),),
    )
    rows = [source.row(np.random.default_rng(seed), length) for seed in range(40)]
    shares = [np.mean(row.ids != hay) for row in rows]
    full = [share for share in shares if share > 0.3]  # others ask one question alone
    assert len(full) > 20 and np.mean(full) > 0.9 * sources.SHARE_OF_ITEMS
    assert max(shares) <= sources.SHARE_OF_ITEMS + 0.01


def test_packed_sequences_have_as_many_questions_as_there_is_room_for(make_task):
    """A share that belongs to their length; stories are asked about more than once."""
    few = make_task("babilong_qa1", density=0.25)
    asked = dataclasses.replace(few, more_questions=3)
    packed = dataclasses.replace(asked, packed=Ramp(0.999, 0.001, (2048, 4096)))

    def answers(source, length):
        rows = [source.row(np.random.default_rng(seed), length + 1).answers for seed in range(60)]
        return np.mean([np.sum(np.diff([0, *row]) == 1) for row in rows])

    assert answers(few, 2048) < 1.2 < 2 < answers(asked, 2048)
    assert answers(packed, 2048) > 2 * answers(asked, 2048)
    assert answers(packed, 4096) < 1.2 * answers(asked, 4096)


def test_strange_haystacks_are_full_of_numbers_as_the_tokenizer_reads_them(home, tmp_path):
    learnt = learn_tokenizer([(home / "book.txt").read_text()], SMALLEST + 100)
    found = load_tokenizer(save_tokenizer(learnt, tmp_path / "tokenizer"))
    text = corpus.tokenize_text(home / "book.txt", found, tmp_path)
    source = sources.TaskSource(
        "passkey",
        (text,),
        batch_encoder(found),
        BOS,
        LANGUAGE,
        Ramp(1, 1, (4096, 4096)),
        256,
        noise=Noise(1.0, batch_encoder(found)),
    )
    rows = [source.row(np.random.default_rng(seed), 4096).ids for seed in range(8)]
    control = set(control_tokens(found).values())
    assert len(control) > 2
    assert not control & {token for row in rows for token in row[1:].tolist()}
    row = max(rows, key=lambda row: len(set(row.tolist())))  # blocks of any tokens, and of numbers
    assert len(set(row.tolist())) > 0.4 * (len(found) - len(control))
    numbers = [token for token in found.convert_ids_to_tokens(row) if token.isdecimal()]
    count = [sum(len(number) == digits for number in numbers) for digits in (1, 2, 3)]
    assert 0 < count[0] < count[1] < count[2] and count[2] > 0.8 * len(numbers) > 300


def test_strange_marks_stand_again_and_again_in_a_text(tokenizer):
    noise = Noise(1.0, batch_encoder(tokenizer))
    hay = np.full(4096, 1_000_000, np.int32)
    made = [noise._marked(np.random.default_rng(seed), hay) for seed in range(40)]
    strange = [ids[ids != hay] for ids in made]
    marked = [ids for ids in strange if len(ids)]
    assert len(marked) > 30 and 0.1 * len(hay) < max(map(len, marked)) < 0.3 * len(hay)
    counted = set(
        np.concatenate(batch_encoder(tokenizer)([f" {number}" for number in range(2000)]))
    )
    others = [[token for token in ids if token not in counted] for ids in marked]
    most = MOST_MARKS * LONGEST_MARK
    assert all(len(np.unique(ids)) <= most for ids in others)
    assert all(len(np.unique(ids)) < len(ids) / 3 for ids in others if len(ids) > 300)
    shares = [1 - len(other) / len(ids) for ids, other in zip(marked, others, strict=True)]
    assert min(shares) < 0.2 and max(shares) > 0.8  # of numbers


def test_strange_lists_count_or_do_not():
    rng = random.Random(0)
    lists = [print_list(rng) for _ in range(300)]
    assert len(set(lists)) == 300
    numbers = [[int(number) for number in re.findall(r"\b\d+\b", text)] for text in lists]
    steps = [set(np.diff(found)) for found in numbers if len(found) > 8]
    counting = sum(len(step) == 1 for step in steps)
    assert 40 < counting < len(steps) - 40
    named = sum(bool(re.search(r"[A-Za-z]{2} ", text)) for text in lists)
    assert 40 < named < 140


def test_strange_texts_are_not_to_be_predicted(tokenizer, tmp_path):
    text = save_text(tmp_path / "hay", np.full(5000, 1_000_000))
    noise = Noise(0.5, batch_encoder(tokenizer))
    source = sources.TextSource((text,), BOS, LANGUAGE, noise)
    rows = [source.row(np.random.default_rng(seed), 1024) for seed in range(40)]
    whole = [row for row in rows if row.weights.any()]
    assert 10 < len(whole) < 30
    assert all((row.weights == 0.25).all() and (row.ids[1:] == 1_000_000).all() for row in whole)
    strange = [row for row in rows if not row.weights.any()]
    assert sum((row.ids[1:] != 1_000_000).any() for row in strange) > 0.8 * len(strange)
    assert all(row.ids[0] == BOS and len(row.ids) == 1024 for row in rows)


def test_some_facts_are_worded_as_no_form_has_them(make_task, tokenizer):
    source = make_task("niah_single_2")

    def facts(loose):
        worded = dataclasses.replace(source, loose=loose)
        return [worded.episode(seed, [0.5]).facts[0].text for seed in range(40)]

    plain, some, all_ = facts(0.0), facts(0.5), facts(1.0)
    assert 5 < sum(a != b for a, b in zip(plain, some, strict=True)) < 25
    assert 20 < sum(a != b for a, b in zip(plain, all_, strict=True))


def test_other_texts_are_as_strange(make_task, tokenizer, tmp_path):
    other = save_text(tmp_path / "other", np.full(5000, 1_000_001))
    noise = Noise(1.0, batch_encoder(tokenizer), (other,))
    source = dataclasses.replace(make_task(), noise=noise)
    rows = [source.row(np.random.default_rng(seed), 1024) for seed in range(30)]
    hidden_in_it = [np.mean(row.ids == 1_000_001) > 0.5 for row in rows]
    assert 0.1 < np.mean(hidden_in_it) < 0.6
    assert all((row.weights[~row.answers] == 0).all() and row.answers.any() for row in rows)
    assert source.files[-1] == other.ids.name and len(source.files) == 2


def test_facts_are_worded_in_all_the_forms_that_are_named(make_task, tokenizer):
    classic = "special magic"

    def worded(forms):
        source = dataclasses.replace(make_task("niah_single_2"), forms=forms)
        rows = [source.row(np.random.default_rng(seed), 600).ids for seed in range(8)]
        return {f"{classic} number for" in tokenizer.decode(ids) for ids in rows}

    assert worded(("train",)) == {False} and worded(("classic",)) == {True}
    assert worded(("train", "classic")) == {True, False}
