"""The page of recall shows every record there is, and heatmaps made of them alone."""

import dataclasses
import hashlib

import pytest

from benchmarks import recall
from gemma_jax.benchmark import records
from gemma_jax.evaluate import heatmap
from gemma_jax.evaluate.report import FULL_ATTENTION, SAME, Recall
from gemma_jax.evaluate.statistics import wilson

RECORD = Recall(
    model="gemma3_270m",
    rule="gated_delta",
    task="passkey",
    tokens=8192,
    depth=0.5,
    trials=20,
    accuracy=0.8512,
    low=0.6402,
    high=0.9477,
    effective_trials=16.8,
    chance=1e-5,
    baseline=0.05,
    within_reach=True,
    failed=0,
    haystacks=2,
    repeated_share=0.125,
    seed=3,
    forms="classic",
    trials_sha256="ab" * 32,
    read_tokens_per_second=1234.5,
    peak_bytes=2_500_000_000,
    state_bytes=1000,
    command="python -m gemma_jax.evaluate --task passkey",
    device="NVIDIA H200",
    versions={"jax": "0.11.2"},
    date="2026-11-25",
    haystack="books",
)


def changed(**changes):
    return dataclasses.replace(RECORD, **changes)


def test_page_of_made_up_records(tmp_path):
    file = tmp_path / "recall.json"
    content = [
        RECORD,
        changed(depth=None, within_reach=False, accuracy=0.5, failed=2),
        changed(tokens=10_000_000, within_reach=False, accuracy=0.25),
        changed(rule=FULL_ATTENTION, baseline=None),
        changed(forms="held_out"),
        changed(haystack="grass", tokens=4096, accuracy=0.75),
        changed(haystack=None, tokens=2048),  # of a time when it was not noted
    ]
    records.append(file, content, SAME)
    recall.main([str(file)])
    text = (tmp_path / "recall.md").read_text()
    assert "| 8,192 | 50% | ~0.851 | 0.640 to 0.948 | 20 (2) | 1e-05 | 0.05 | 12.5% |" in text
    assert "| 8,192 | pooled | 0.500 | 0.640 to 0.948 | 20 (2), 2 failed |" in text
    assert "| 10,000,000 | 50% | 0.250 |" in text
    assert "## passkey in books: gemma3_270m, full attention" in text and RECORD.command in text
    assert "## passkey in books: gemma3_270m, memory gated_delta, held_out wording" in text
    (grass,) = [s for s in text.split("\n## ") if s.startswith("passkey in grass")]
    assert "| 4,096 | 50% | ~0.750 |" in grass and "8,192" not in grass
    assert "## passkey: gemma3_270m, memory gated_delta\n" in text
    assert "1,234 tokens/s, peak 2.50 GB" in text
    pictures = sorted(path.name for path in (tmp_path / "recall").iterdir())
    assert len(pictures) == 5 and all(f"(recall/{name})" in text for name in pictures)


def test_a_cell_is_shown_as_it_was_found_last(tmp_path):
    file = tmp_path / "recall.json"
    records.append(file, [RECORD], SAME)
    records.append(file, [changed(accuracy=0.9)], SAME)  # the same command again
    assert [record.accuracy for record in records.read(file, Recall)] == [0.9]
    records.append(file, [changed(accuracy=0.95, command="another")], SAME)
    ((cell,),) = recall.by_series(records.read(file, Recall)).values()
    assert [record.accuracy for record in cell] == [0.95]


def test_what_was_measured_in_pieces_is_shown_as_a_whole(tmp_path):
    file = tmp_path / "recall.json"
    of_another_seed = changed(
        seed=4,
        trials=60,
        accuracy=0.9012,
        effective_trials=50.0,
        baseline=0.1,
        within_reach=False,
        repeated_share=0.005,
        haystacks=4,
        failed=1,
        trials_sha256="cd" * 32,
        command="python -m gemma_jax.evaluate --task passkey --seed 4",
    )
    # The same trials among others, so that the hash of all is another.
    again = changed(accuracy=0.5, trials_sha256="ef" * 32, command=f"{RECORD.command},copy")
    records.append(file, [again, RECORD, of_another_seed], SAME)
    recall.main([str(file)])
    text = (tmp_path / "recall.md").read_text()
    low, high = wilson((20 * 0.8512 + 60 * 0.9012) / 80, 66.8)
    row = f"~0.889 | {low:.3f} to {high:.3f} | 80 (6), 1 failed | 1e-05 | 0.0875 | 3.5% |"
    assert f"| 8,192 | 50% | {row}" in text
    assert all(f"\n{record.command}\n" in text for record in (RECORD, of_another_seed))
    without_control = dataclasses.replace(of_another_seed, baseline=None)
    assert recall.pooled([RECORD, without_control]).baseline is None


def test_other_books_are_other_pieces(tmp_path):
    file = tmp_path / "recall.json"
    commands = [
        f"{RECORD.command} --haystack {books} --baseline" for books in ("a.txt", "b.txt c.txt")
    ]
    found = [RECORD, *(changed(command=command) for command in commands)]
    records.append(file, [*found, changed(command=f"{commands[1]} --batch-size 3")], SAME)
    ((cell,),) = recall.by_series(records.read(file, Recall)).values()
    assert [recall.books(record.command) for record in cell] == [(), ("a.txt",), ("b.txt", "c.txt")]


def test_the_same_squares_give_the_same_picture(tmp_path):
    squares = [
        heatmap.Square(tokens, depth, accuracy, tokens < 5000)
        for tokens in (4096, 10_000_000)
        for depth, accuracy in [(0.0, 1.0), (0.5, None), (1.0, 0.1)]
    ]
    hashes = set()
    for name in ("a.png", "b.png"):
        heatmap.draw(tmp_path / name, "task\nmodel", 0.1, squares)
        hashes.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(hashes) == 1


@pytest.mark.parametrize(
    "tokens, text",
    [(4096, "4K"), (131_072, "128K"), (1_000_000, "1M"), (2_500_000, "2.5M"), (5000, "5,000")],
)
def test_lengths_are_written_as_they_are_given(tokens, text):
    assert heatmap.short(tokens) == text
