"""`python -m gemma_jax.tasks` shows what is generated, and says what is wrong in one sentence."""

import re

import pytest

from gemma_jax import random_model
from gemma_jax.tasks.__main__ import main


def test_the_text_goes_to_standard_output_and_the_questions_beside_it(capsys):
    arguments = ["niah_multikey_1", "--length", "600", "--depths", "0", "100", "--questions", "2"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert 550 < len(out.split()) <= 600
    answers = re.findall(r"(?m)^=> (\d{7})$", err)
    assert len(answers) == 4 and all(answer in out for answer in answers)
    assert err.count("depth 0%") == err.count("depth 100%") == 2
    assert main(arguments) == 0
    assert capsys.readouterr() == (out, err)


def test_books_and_a_tokenizer_of_ones_own_are_used(capsys, tmp_path):
    random_model.make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "mine.txt").write_text("My own words stand here. " * 50)
    arguments = ["babilong_qa1", "--length", "1K", "--model", str(tmp_path)]
    assert main([*arguments, "--books", str(tmp_path / "mine.txt")]) == 0
    out, err = capsys.readouterr()
    assert out.count("My own words stand here.") > 10
    assert 900 < int(re.search(r"(\d+) tokens, ", err)[1]) <= 1024


@pytest.mark.parametrize(
    "arguments, code, says",
    [
        (["nothing"], 2, "choose passkey"),
        (["passkey", "--length", "20"], 2, "greater length"),
        (["passkey", "--haystack", "needles"], 2, "choose grass, books"),
        (["common_words", "--questions", "2", "--length", "4K"], 2, "one question"),
        (["niah_single_2", "--books", "/nonexistent/book.txt"], 3, "cannot be read"),
        (["niah_single_2", "--model", "/nonexistent"], 3, "tokenizer"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(capsys, arguments, code, says):
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("option", [["--depths", "101"], ["--length", "0"], ["--keys", "x"]])
def test_options_out_of_range_end_with_2(capsys, option):
    with pytest.raises(SystemExit) as caught:
        main(["passkey", *option])
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("error: ")
