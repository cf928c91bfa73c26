"""A book's facts are asked from far back: answers are counted, beside those with memory off."""

import json

import pytest

from benchmarks import book_questions
from benchmarks.book_questions import QUESTIONS, Question, read_questions, without
from gemma_jax import demo
from gemma_jax.inference.documents import read_text
from gemma_jax.tasks.haystacks import shipped

FILES = {"book": "book.txt", "questions": "questions.jsonl"}
MOBY_DICK, SHAKESPEARE = shipped("held_out")
FACT = "The pass key is 69890. Do not forget that 69890 is the pass key."
ASKED = '{"question": "What is the pass key?", "answers": ["69890"]}\n'
WRONG = '{"question": "What is the pass key?", "answers": ["bedroom of 1851"]}\n'


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def files(tmp_path):
    """A book with a fact in it, and questions."""
    text = "".join(read_text(MOBY_DICK))[20_000:24_000]
    (tmp_path / "book.txt").write_text(f"{text[:2000]} {FACT} {text[2000:]}")
    (tmp_path / "questions.jsonl").write_text(ASKED + WRONG)
    return tmp_path


def options(directory, **changed):
    given = {name: directory / file for name, file in FILES.items()} | {"tokens": "3K"} | changed
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


# --- what is asked --------------------------------------------------------------------------------


def test_the_questions_are_thirty_and_the_book_has_their_answers():
    questions, book = read_questions(QUESTIONS), "".join(read_text(MOBY_DICK))
    assert len(questions) == len({question.question for question in questions}) == 30
    for question in questions:
        assert question.question.endswith("?") and all(map(str.strip, question.answers))
        assert question.is_right(book)
        assert not question.is_right(question.question), "to repeat it would be an answer"


@pytest.mark.parametrize(
    "answer, right",
    [
        ("Peter Coffin", True),
        ("It was old\nPETER  coffin, the landlord.", True),
        ("Mr. Coffin's wife", True),
        ("a coffins-maker", False),
        ("Peter", False),
        ("", False),
        ("six feet five", True),
        ("six feet fivefold", False),
        ("He was 1,300 years old", True),
        ("11300", False),
    ],
)
def test_an_answer_counts_that_holds_an_expected_one_as_whole_words(answer, right):
    question = Question("Who?", ("Peter Coffin", "Coffin", "six feet five", "1300"))
    assert question.is_right(answer) is right


def test_the_book_itself_is_not_among_those_behind_it(tmp_path):
    for file, others in ((MOBY_DICK, [SHAKESPEARE]), (SHAKESPEARE, [MOBY_DICK])):
        assert without([MOBY_DICK, SHAKESPEARE], file) == others
    excerpt, stranger = tmp_path / "excerpt.txt", tmp_path / "stranger.txt"
    excerpt.write_text("".join(read_text(MOBY_DICK))[500_000:505_000].upper())
    stranger.write_text("A book.")
    assert without([MOBY_DICK, SHAKESPEARE], str(excerpt)) == [SHAKESPEARE]
    assert without([MOBY_DICK, SHAKESPEARE], str(stranger)) == [MOBY_DICK, SHAKESPEARE]


# --- what comes of it -----------------------------------------------------------------------------


@pytest.mark.skipif(not demo.MODEL.is_dir(), reason="the small model is not there")
def test_a_fact_of_the_book_is_known_with_memory_and_not_without(files, monkeypatch, capsys):
    monkeypatch.setattr(book_questions, "FORM", "\n\n{} The pass key is")
    file = files / "answers.json"
    assert book_questions.main(options(files, tokens="3K", output=file)) == 0
    said, found = capsys.readouterr(), json.loads(file.read_text())
    assert found["tokens"] == 3072 > 1000 + found["reach"] and 900 < found["book_tokens"] < 2000
    assert found["book"] == "book.txt" and found["behind"] == ["shakespeare.txt.xz"]
    right, wrong = found["questions"]
    assert right["answers"] == ["69890"] and "69890" in right["with_memory"]["answer"]
    assert right["with_memory"]["right"] and not right["memory_off"]["right"]
    assert wrong["with_memory"] == {"answer": right["with_memory"]["answer"], "right": False}
    counts = found["counts"]
    assert [counts[name]["right"] for name in ("with_memory", "memory_off")] == [1, 0]
    for one in counts.values():
        assert one["trials"] == 2 and one["low"] <= one["right"] / 2 <= one["high"] < 1
    assert found["command"].startswith("python -m benchmarks.book_questions")
    assert {"device", "versions", "date"} < set(found)
    for word in ("What is the pass key?", "✓ 69890", "✗", "1 of 2", "0 of 2", "95 % interval"):
        assert word in said.out
    assert "warning" not in said.err


@pytest.mark.skipif(not demo.MODEL.is_dir(), reason="the small model is not there")
def test_the_text_has_so_many_tokens_and_the_others_begin_again(files):
    model = book_questions.load(None, None)
    (files / "behind.txt").write_text("The sea.")
    book, behind = str(files / "book.txt"), [str(files / "behind.txt")]
    ids, book_tokens = book_questions.compose(model, book, behind, 2500)
    assert ids.shape == (2500,) and ids[0] == model.config.bos_id
    text = model.tokenizer.decode(ids[1:])
    assert text.startswith((files / "book.txt").read_text() + "\n\nThe sea.\n\nThe sea.\n\n")
    shorter, _ = book_questions.compose(model, book, behind, book_tokens)
    assert shorter.tolist() == ids[:book_tokens].tolist()


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "Who is Ishmael?",
        '["Who?", "Ishmael"]',
        '{"question": "Who?"}',
        '{"question": "Who?", "answers": []}',
        '{"question": "Who?", "answers": [" "]}',
        '{"question": "Who?", "answers": "Ishmael"}',
        '{"question": 1, "answers": ["Ishmael"]}',
    ],
)
def test_a_line_that_is_no_question_is_named(line, files, capsys):
    (files / "questions.jsonl").write_text(ASKED + "\n" + line + "\n")
    assert book_questions.main(options(files)) == 3
    said = capsys.readouterr().err
    assert "line 3 is no question" in said and '{"question": "...", "answers": ["..."]}' in said


@pytest.mark.parametrize(
    "changed, code, words",
    [
        ({"book": "no-such.txt"}, 3, ("no-such.txt", "name a text file")),
        ({"behind": "no-such.txt"}, 3, ("no-such.txt", "name a text file")),
        ({"questions": "no-such.jsonl"}, 3, ("no-such.jsonl", "name a file of questions")),
        ({"questions": "/dev/null"}, 3, ("has no questions", "one a line")),
        ({"output": "/dev/null/answers.json"}, 3, ("/dev/null",)),
        ({"adapter": "no-such-adapter"}, 2, ("--adapter", "--model")),
        ({"model": "no-such-model"}, 3, ("no-such-model",)),
        ({"tokens": "0"}, 2, ("--tokens",)),
    ],
    ids=str,
)
def test_what_is_missing_is_said_with_what_to_do(changed, code, words, files, capsys):
    try:
        found = book_questions.main(options(files, **changed))
    except SystemExit as exit_:
        found = exit_.code
    said = capsys.readouterr().err
    assert found == code and said.startswith("error: ") and all(word in said for word in words)


@pytest.mark.skipif(not demo.MODEL.is_dir(), reason="the small model is not there")
def test_fewer_tokens_than_the_book_has_are_refused(files, capsys):
    assert book_questions.main(options(files, tokens="500")) == 2
    said = capsys.readouterr().err
    assert "--tokens 500 is fewer than" in said and "or more, or a shorter --book" in said


def test_a_model_without_memory_is_refused(files, random_checkpoint, capsys):
    assert book_questions.main(options(files, model=random_checkpoint)) == 2
    assert "has no memory" in capsys.readouterr().err
