"""What is compiled while a model is loaded is what an answer runs."""

import dataclasses
import threading
import time

import jax
import pytest

import gemma_jax
from gemma_jax.inference import compiling
from gemma_jax.inference.compiling import Compiling
from gemma_jax.inference.sampling import Greedy, make_sampling

PROGRAMS = {"prefill", "decode_block"}


@pytest.fixture
def compiled():
    """Names of the functions that XLA compiles from here on."""
    names = []

    def note(event, _, **about):
        if "backend_compile" in event:
            names.append(about["fun_name"].removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(note)
    return names


@pytest.mark.parametrize(
    "drawn, segment", [({}, 20), ({"temperature": 0.7, "top_k": 5}, 22), ({"top_p": 0.5}, 24)]
)
def test_an_answer_compiles_none_of_it_again(random_checkpoint, compiled, drawn, segment):
    """Nor does a memory rule with fresh parameters; segments are of lengths of their own."""
    options = {"memory": "delta", "segment_length": segment}
    config = gemma_jax.load(random_checkpoint, **options).config
    compiled.clear()
    Compiling(config, make_sampling(**drawn)).wait()
    assert {*compiled} >= PROGRAMS
    compiled.clear()
    model = gemma_jax.load(random_checkpoint, **options)
    answer = gemma_jax.generate(model, "the people called him", max_new_tokens=4, **drawn)
    assert "".join(answer) == answer.text
    assert not PROGRAMS & {*compiled}


def test_where_nothing_is_written_only_reading_is_compiled(random_checkpoint, compiled):
    config = gemma_jax.load(random_checkpoint, segment_length=26).config
    compiled.clear()
    Compiling(config, None).wait()
    assert PROGRAMS & {*compiled} == {"prefill"}


def test_programs_are_traced_one_after_the_other(random_checkpoint, monkeypatch):
    """Or else they may differ from start to start, and those kept from the last one are not found."""
    config = gemma_jax.load(random_checkpoint).config
    busy, calls = threading.Lock(), []

    class Slow:
        def lower(self, *_, **__):
            calls.append(busy.acquire(blocking=False))
            time.sleep(0.1)
            busy.release()
            return self

        def compile(self):
            pass

    for name in PROGRAMS:
        monkeypatch.setattr(compiling, name, Slow())
    Compiling(config, Greedy()).wait()
    assert calls == [True, True]


def test_what_goes_wrong_in_a_thread_is_raised_where_it_is_waited_for(
    random_checkpoint, monkeypatch
):
    config = gemma_jax.load(random_checkpoint).config

    class Broken:
        def lower(self, *_, **__):
            raise RuntimeError(f"no room in {threading.current_thread().name}")

    monkeypatch.setattr(compiling, "prefill", Broken())
    with pytest.raises(RuntimeError, match="no room in gemma_jax compiler"):
        Compiling(dataclasses.replace(config, name="other"), Greedy()).wait()
