"""Conversations: history is in the State, once; what is stopped or fails leaves it right."""

import io
import os
import re
import signal
import threading

import numpy as np
import pytest

import gemma_jax
from gemma_jax import random_model, text
from gemma_jax.errors import GemmaError, InputError
from gemma_jax.inference import chat as chat_module
from gemma_jax.inference import reader, remember
from gemma_jax.inference.chat import Chat
from gemma_jax.inference.console import Console
from gemma_jax.inference.terminal import Terminal
from gemma_jax.text import Place

CHUNK = 16
TURNS = ("who was it", " the people\n called  him ", "how many 漢<end_of_turn>")


@pytest.fixture(scope="module")
def model(random_checkpoint):
    return gemma_jax.load(random_checkpoint, segment_length=CHUNK)


def talk(model, memory=None, **options):
    return Chat(model, memory, **({"max_new_tokens": 6, "chunk_tokens": CHUNK} | options))


def ids_of_turn(model, content, first):
    """What the template puts around a text of the user, as Gemma's does."""
    start, end = (
        model.tokenizer.convert_tokens_to_ids(f"<{name}_of_turn>") for name in ("start", "end")
    )
    encode = lambda content: text.encode(model.tokenizer, content)  # noqa: E731
    begin = [model.config.bos_id] if first else [end, *encode("\n")]
    user = [start, *encode("user\n" + content.strip()), end]
    return [*begin, *user, *encode("\n"), start, *encode("model\n")]


def answers(model, chat, turns, monkeypatch):
    """Answers of a chat, and all ids that its State has been given."""
    ids = []
    monkeypatch.setattr(Chat, "_block", spy := Spy(Chat._block))
    said = []
    for i, content in enumerate(turns):
        spy.tokens.clear()
        said.append("".join(chat.say(content)))
        ids += ids_of_turn(model, content, first=i == 0) + spy.tokens
    return said, ids


class Spy:
    def __init__(self, method):
        self._method, self.tokens = method, []

    def __get__(self, instance, owner):
        def call(*arguments):
            block, reading = self._method(instance, *arguments)
            self.tokens += block
            return block, reading

        return call


def test_history_is_what_one_reading_of_all_turns_gives(model, monkeypatch):
    chat = talk(model)
    said, ids = answers(model, chat, TURNS, monkeypatch)
    assert (chat.turns, chat.memory.tokens, chat.memory.place) == (3, len(ids), Place.ANSWER)
    for content in ("and now",):
        expected = reader.read(
            model, [[*ids, *ids_of_turn(model, content, False)]], chunk_tokens=CHUNK
        )
        found = remember.recall(
            model, remember.fork(chat.memory), content, template=True, chunk_tokens=CHUNK
        )
        np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
        assert found.state.length.tolist() == expected.state.length.tolist()


def test_nothing_is_read_again(model):
    chat = talk(model)
    for content in TURNS:
        list(chat.say(content))
        assert chat.last.read <= len(ids_of_turn(model, content, False))


def test_a_turn_that_the_model_ended_is_not_ended_twice(model, monkeypatch):
    first = "".join(talk(model).say("who"))
    chat = talk(model)
    end = model.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    block = Chat._block

    def ends(self, reading, stops):
        _, reading = block(self, reading, stops)
        return [end], reading

    monkeypatch.setattr(Chat, "_block", ends)
    assert list(chat.say("who")) == []
    assert chat.memory.place == Place.END
    monkeypatch.undo()
    ids = list(remember._Stream(model, "who", chat.memory, True).all_ids())
    assert ids[0][0] == text.encode(model.tokenizer, "\n")[0]
    assert first


def test_a_conversation_goes_on_from_what_was_read(model):
    def about(book):
        return remember.remember(model, book, template=True, chunk_tokens=CHUNK)

    whole = reader.generate(
        model, "the book\nwho", template=True, max_new_tokens=6, chunk_tokens=CHUNK
    )
    assert "".join(talk(model, about("the book")).say("who")) == "".join(whole)


def test_reset_goes_back_to_the_beginning(model):
    memory = remember.remember(model, "the book", template=True, chunk_tokens=CHUNK)
    chat = talk(model, memory)
    first = list(chat.say("who"))
    assert list(chat.say("who")) != [] and chat.turns == 2
    chat.reset()
    assert list(chat.say("who")) == first and chat.turns == 1


def test_a_stopped_answer_stays_in_the_conversation_as_far_as_it_was_shown(model):
    chat = talk(model, max_new_tokens=50)
    shown = ""
    for piece in chat.say("who"):
        shown += piece
        if len(shown) > 10:
            chat.stop()
    written = chat.last.written
    assert 0 < written < 50
    assert chat.memory.tokens == len(ids_of_turn(model, "who", True)) + written
    assert "".join(talk(model, max_new_tokens=50).say("who")).startswith(shown)


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(model, monkeypatch):
    chat = talk(model)
    list(chat.say("who"))
    before = chat.memory
    for bad in ("", " \n", "\ud800"):
        with pytest.raises(InputError):
            list(chat.say(bad))
    monkeypatch.setattr(chat_module, "require_finite", fail)
    with pytest.raises(GemmaError):
        list(chat.say("who"))
    monkeypatch.undo()
    assert chat.memory is before and not chat.is_writing
    assert list(chat.say("how"))


def fail(*_):
    raise GemmaError("not finite")


def test_stop_texts_end_answers(model):
    whole = "".join(talk(model, max_new_tokens=20).say("who"))
    stop = whole[6:9]
    chat = talk(model, max_new_tokens=20, stop=[stop])
    assert "".join(chat.say("who")) == whole[: whole.index(stop)]
    assert chat.last.written < 20


def test_models_without_a_template_are_refused(model):
    class Plain:
        config, params, tokenizer = model.config, model.params, model.tokenizer

    for template in ("no user text", "{{ messages[0]['content'] + '<end_of_turn>' }}"):
        Plain.tokenizer = type(model.tokenizer)(
            tokenizer_object=random_model.make_tokenizer(), chat_template=template
        )
        with pytest.raises(InputError, match="instruction-tuned"):
            talk(Plain)


# --- the terminal ---


@pytest.fixture
def terminal(model, monkeypatch, capsys):
    """Runs a conversation of lines; gives standard output and standard error."""

    def run(lines: str, **options):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        chat = talk(model, **options)
        Terminal(chat, model, Console()).run()
        return chat, *capsys.readouterr()

    return run


def test_answers_are_on_standard_output_and_nothing_else(model, terminal):
    chat, out, err = terminal("who\n\n/stats\n/help\nhow\n/quit\nnever\n")
    reference = talk(model)
    expected = ["".join(reference.say(content)) for content in ("who", "how")]
    assert out == "".join(answer + "\n" for answer in expected)
    assert chat.turns == 2
    assert "1 answers" in err and "/save FILE" in err


@pytest.mark.parametrize("lines", ['"""\nwho\n\nwas\n"""\n', "who\\\n\\\nwas\n"])
def test_several_lines_are_one_message(model, terminal, lines):
    _, out, _ = terminal(lines)
    assert out == "".join(talk(model).say("who\n\nwas")) + "\n"


def test_a_conversation_is_saved_and_gone_on_with(model, terminal, tmp_path):
    _, straight, _ = terminal("who\nhow\n")
    _, first, err = terminal(f"who\n/save {tmp_path}/talk.mem\n")
    assert "are kept in" in err
    _, second, err = terminal(f"other\n/load {tmp_path}/talk.mem\nhow\n")
    assert first + second.partition("\n")[2] == straight


def test_reset_forgets(terminal):
    _, out, _ = terminal("who\nhow\n/reset\nwho\n")
    first, _, third, _ = out.split("\n")
    assert first == third


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/frob", "/frob is no command"),
        ("/save", "needs the name of a file"),
        ("/load nowhere.mem", "cannot be read"),
        ("/save nowhere/\0.mem", "error: "),
        ("a \ud800 b", "not characters"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_conversation_goes_on(terminal, line, words):
    chat, out, err = terminal(f"{line}\nwho\n")
    assert words in err and "Traceback" not in err
    assert chat.turns == 1


def test_ctrl_c_ends_the_answer_and_not_the_program(terminal):
    def press():
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(1.0, press)
    timer.start()
    chat, out, _ = terminal("who\n/stats\n", max_new_tokens=10**9)
    timer.join()
    assert chat.turns == 1 and 0 < chat.last.written
    assert re.fullmatch(r"[^\n]+\n", out) or out.endswith("\n")


def test_ctrl_c_at_the_prompt_is_no_end(model, monkeypatch, capsys):
    lines = iter([KeyboardInterrupt, "who\n", ""])

    class Stdin:
        def isatty(self):
            return False

        def readline(self):
            line = next(lines)
            if line is KeyboardInterrupt:
                raise KeyboardInterrupt
            return line

    monkeypatch.setattr("sys.stdin", Stdin())
    chat = talk(model)
    Terminal(chat, model, Console()).run()
    assert chat.turns == 1
    assert "(stopped; /quit leaves)" in capsys.readouterr().err
