"""Plans of grids: what is read, how much, in which order, and what is refused."""

import dataclasses
import functools

import pytest
from numbers_task import FILLER, Numbers

from gemma_jax import PRESETS
from gemma_jax.errors import UsageError
from gemma_jax.evaluate import plan as planning
from gemma_jax.evaluate.haystack import EXTRA_TOKENS
from gemma_jax.text import encode_batch

BOS = 2
OPTIONS = planning.Options(
    tasks=(Numbers(),),
    lengths=(300, 400),
    depths=(0.0, 0.5, 1.0),
    trials=3,
    questions=4,
    haystacks=2,
    shared="never",
    seed=7,
    books=(),
    rows=4,
)


@pytest.fixture
def plan(tokenizer):
    def call(**changes):
        options = dataclasses.replace(OPTIONS, **changes)
        return planning.plan(options, functools.partial(encode_batch, tokenizer), BOS)

    return call


def read(grid, haystack):
    """The ids of a haystack, and what is known of its trials."""
    text = grid.text(haystack)
    ids = [i for some in text for i in some]
    return ids, [text.trial(asked) for asked in haystack.asked]


def longest_piece(tokenizer):
    return max(map(len, encode_batch(tokenizer, FILLER)))


@pytest.mark.parametrize("shared", ["never", "always"])
def test_a_length_is_all_that_is_read_and_missed_by_less_than_a_piece_of_filler(
    plan, tokenizer, shared
):
    grid = plan(shared=shared)
    for haystack in grid.haystacks:
        ids, trials = read(grid, haystack)
        longest = max(trial["tokens_read"] for trial in trials)
        assert haystack.tokens - longest_piece(tokenizer) < longest <= haystack.tokens
        assert ids[0] == BOS and BOS not in ids[1:]
        for asked, trial in zip(haystack.asked, trials, strict=True):
            assert trial["tokens_read"] == len(ids) + len(asked.ids)
            assert len(asked.ids) <= grid.question_tokens


def test_the_distance_is_counted_from_the_end_of_the_needed_fact(plan, tokenizer):
    (haystack, *_) = plan(shared="always").haystacks
    ids, trials = read(plan(shared="always"), haystack)
    for asked, trial in zip(haystack.asked, trials, strict=True):
        whole = ids + list(asked.ids)
        behind = tokenizer.decode(whole[len(whole) - trial["distance"] :])
        before = tokenizer.decode(whole[: len(whole) - trial["distance"]])
        fact = haystack.episode.facts[asked.question.facts[0]].text
        assert before.endswith(fact) and fact not in behind


def test_depths_that_differ_by_little_have_haystacks_of_their_own(plan):
    names = [haystack.name for haystack in plan(depths=(0.33333333, 0.33333334)).haystacks]
    assert len(set(names)) == len(names) == 2 * 2 * 3


def test_answers_may_be_as_long_as_the_reference_and_a_little_more(plan, tokenizer):
    for haystack in plan().haystacks:
        for asked in haystack.asked:
            (reference,) = encode_batch(tokenizer, [f" {asked.question.answers[0]}"])
            assert asked.limit == len(reference) + EXTRA_TOKENS


def test_the_repeated_share_is_that_of_filler_shown_before(plan):
    grid = plan(lengths=(100, 5000))
    shares = {h.tokens: read(grid, h)[1][0]["repeated_share"] for h in grid.haystacks}
    assert shares[100] == 0 and 0.5 < shares[5000] < 1


def test_every_trial_has_a_haystack_of_its_own_and_cells_are_full(plan):
    grid = plan()
    assert [len(group.haystacks) for group in grid.groups] == [3, 3, 3] * 2  # 9, evenly
    assert grid.rows == 3
    cells = [(h.tokens, h.asked[0].question.depth) for h in grid.haystacks]
    assert {cell: cells.count(cell) for cell in cells} == {
        (length, depth): 3 for length in OPTIONS.lengths for depth in OPTIONS.depths
    }
    assert len({h.episode.seed for h in grid.haystacks}) == 18


def test_shared_haystacks_hold_facts_at_all_depths_and_share_the_questions(plan):
    grid = plan(shared="always", questions=5)
    asked = [len(haystack.asked) for haystack in grid.haystacks]
    assert asked == [3 * 3, 3 * 2] * 2 and all(len(g.haystacks) == 1 for g in grid.groups)
    depths = [a.question.depth for a in grid.groups[0].haystacks[0].asked]
    assert {depth: depths.count(depth) for depth in depths} == dict.fromkeys(OPTIONS.depths, 3)
    assert grid.rows == 3  # nine questions, evenly in batches of at most four


def test_shared_haystacks_of_a_length_are_read_together_and_asked_about_together(plan):
    grid = plan(shared="always", questions=5, haystacks=5, beside=4, rows=4)
    assert [len(group.haystacks) for group in grid.groups] == [3, 2] * 2  # evenly
    assert all(len({h.tokens for h in group.haystacks}) == 1 for group in grid.groups)
    assert grid.beside == 3 and grid.rows == 3  # nine questions about three haystacks
    apart = plan(shared="always", questions=5, haystacks=5)
    assert [h.name for h in grid.haystacks] == [h.name for h in apart.haystacks]
    assert [read(grid, h) for h in grid.haystacks] == [read(apart, h) for h in apart.haystacks]


def test_only_small_models_read_shared_haystacks_side_by_side():
    large, medium = PRESETS["gemma-2b"], PRESETS["gemma-3-270m"]
    small = dataclasses.replace(large, width=256, mlp_dim=1024, layer_types=large.layer_types[:4])
    assert [planning.rows_to_be_busy(config, 16) for config in (large, medium, small)] == [1, 2, 16]
    assert planning.rows_to_be_busy(small, 3) == 3


def test_long_haystacks_are_shared_unless_the_task_cannot(plan):
    lengths = (300, planning.SHARED_FROM)
    assert [g.shared for g in plan(shared="auto", lengths=lengths, trials=1).groups] == [
        *[False],
        *[True] * 2,
    ]

    class Single(Numbers):
        most_questions = 1

    grid = plan(shared="auto", lengths=lengths, trials=1, tasks=(Single(),))
    assert not any(group.shared for group in grid.groups)


def test_a_haystack_does_not_depend_on_the_rest_of_the_grid(plan):
    whole = {h.name: read(plan(), h) for h in plan().haystacks}
    part = plan(lengths=(400,), depths=(0.5,), trials=2, rows=1)
    assert len(list(part.haystacks)) == 2
    for haystack in part.haystacks:
        assert whole[haystack.name] == read(part, haystack)


def test_seeds_differ_by_everything_that_names_a_haystack(plan):
    first = next(plan().haystacks)
    other = next(plan(seed=8).haystacks)
    assert first.name == other.name and first.episode.seed != other.episode.seed
    assert planning.seed_of(7, "passkey-300-0%-0") == 2_023_123_193  # the same on every machine


def test_lengths_too_short_are_refused_before_anything_is_read(plan):
    with pytest.raises(UsageError, match="10 tokens are too few for numbers, whose question"):
        plan(lengths=(10, 400))
    with pytest.raises(UsageError, match="--lengths 150 is too short: .* 127 tokens are"):
        plan(lengths=(150,), shared="always", questions=6, haystacks=1)


def test_more_haystacks_than_questions_are_refused(plan):
    with pytest.raises(UsageError, match="--haystacks 5 cannot share 4 questions"):
        plan(haystacks=5)
