"""The journal gives back what was finished, whatever happened to the process that wrote it."""

import dataclasses
import errno
import os

import pytest

from gemma_jax.errors import InputError, UsageError
from gemma_jax.evaluate.journal import JOURNAL, Journal, Reading, Trial

SETTINGS = {"seed": 1, "lengths": (4096,), "task": ("passkey",)}
TRIAL = Trial(
    "ours", "passkey", 4096, 0.5, "passkey-4096-0", 0, 3, ("12 \N{SNOWMAN}", "b"), "12\n", 0.5
)
READING = Reading("ours", 4090, 1.5, 0.5, 20, 0.25, None)


def test_what_was_finished_comes_back(tmp_path):
    journal = Journal(tmp_path / "new" / "one", SETTINGS)
    journal.add([TRIAL, READING])
    again = Journal(tmp_path / "new" / "one", SETTINGS)
    assert again.trials == {TRIAL.key: TRIAL} and again.readings == [READING]


def test_a_journal_cut_anywhere_keeps_its_whole_lines(tmp_path):
    others = [dataclasses.replace(TRIAL, question=number) for number in range(3)]
    Journal(tmp_path, SETTINGS).add(others)
    data = (tmp_path / JOURNAL).read_bytes()
    for size in range(0, len(data), 7):
        (tmp_path / JOURNAL).write_bytes(data[:size])
        journal = Journal(tmp_path, SETTINGS)
        assert len(journal.trials) == max(data[:size].count(b"\n") - 1, 0)
        journal.add(trial for trial in others if trial.key not in journal.trials)
        journal.close()
        assert (tmp_path / JOURNAL).read_bytes() == data


def test_a_failed_trial_is_kept_until_it_is_tried_again(tmp_path):
    failed = dataclasses.replace(TRIAL, answered=None, score=None, failed="out of memory")
    journal = Journal(tmp_path, SETTINGS)
    journal.add([failed])
    assert journal.failed == {TRIAL.key: failed} and not journal.trials
    journal.add([TRIAL])
    again = Journal(tmp_path, SETTINGS)
    assert again.trials == {TRIAL.key: TRIAL} and not again.failed


def test_other_settings_are_refused_by_name(tmp_path):
    Journal(tmp_path, SETTINGS)
    with pytest.raises(UsageError, match=r"\(seed was 1, now 2\): choose another --output"):
        Journal(tmp_path, SETTINGS | {"seed": 2})
    with pytest.raises(UsageError, match=r"\(lengths was 4096, now 4096 8192\)"):
        Journal(tmp_path, SETTINGS | {"lengths": (4096, 8192)})


def test_settings_may_come_later_and_are_then_kept(tmp_path):
    Journal(tmp_path, SETTINGS).add([TRIAL])
    journal = Journal(tmp_path, SETTINGS | {"peer": "a"})
    assert journal.trials == {TRIAL.key: TRIAL}
    Journal(tmp_path, SETTINGS)
    with pytest.raises(UsageError, match="peer was a, now b"):
        Journal(tmp_path, SETTINGS | {"peer": "b"})


def test_a_full_disk_ends_the_run_and_names_the_journal(tmp_path, monkeypatch):
    journal = Journal(tmp_path, SETTINGS)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"trials.jsonl cannot be written \(No space left"):
            journal.add([TRIAL])


def test_resuming_nothing_is_refused(tmp_path):
    with pytest.raises(UsageError, match="nothing to resume"):
        Journal(tmp_path, SETTINGS, must_exist=True)


def test_another_file_of_that_name_is_refused(tmp_path):
    (tmp_path / JOURNAL).write_text('["something else"]\n')
    with pytest.raises(InputError, match="no journal of this command"):
        Journal(tmp_path, SETTINGS)
