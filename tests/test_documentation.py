"""What the documentation tells its readers to do works, and what it names is there."""

import contextlib
import io
import re

import compiling
import numpy as np
import pytest
from desk import Belongings, Desk, cap, files_of_the_repository, options_of
from documented import PAGES, RECORDS, ROOT, Block, blocks, commands, prose

import gemma_jax

EVERYWHERE = [*PAGES, *RECORDS]


def name_of(page):
    return str(page.relative_to(ROOT))


def in_blocks(pages):
    return [command for page in pages for block in blocks(page) for command in block.commands]


def in_sentences(pages):
    """Commands within sentences that begin with `python`, or set something before it."""
    found = []
    for page in pages:
        texts = re.findall(r"`((?:\w+=\S+ )?python\s[^`]+)`", prose(page))
        found += [command for text in texts for command in commands(" ".join(text.split()))]
    return found


def links(page):
    """Places that a page links to, but for those elsewhere on the web."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target for target in found if not target.startswith("https://")]


def anchors(page):
    """What its headings are called in a link."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(scope="session")
def belongings(tmp_path_factory):
    return Belongings.make(tmp_path_factory.mktemp("documentation"))


@pytest.fixture(scope="session")
def given(belongings):
    """Names that the Python on the pages takes for granted."""
    model = gemma_jax.load(belongings.checkpoint)
    batch = np.full((1, model.config.memory.segment_length + 1), 300, np.int32)
    return {
        "model": model,
        "batches": [(batch, np.ones_like(batch[:, 1:], np.float32))],
        "answer_to": lambda question: "12345",
    }


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(tmp_path_factory):
    with compiling.quick_compilation(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture
def desk(tmp_path, belongings):
    with pytest.MonkeyPatch.context() as patch:
        yield Desk(tmp_path, belongings, patch)


# --- what can be done -----------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_can_be_worked_through_from_top_to_bottom(page, desk, given):
    before, wrong = files_of_the_repository(), []
    for block in blocks(page):
        try:
            desk.do(block, given)
        except Exception as error:
            wrong.append(f"{block}: {type(error).__name__}: {error}")
    assert wrong == []
    assert files_of_the_repository() == before


@pytest.mark.parametrize(
    "kind, text",
    [
        ("", "gemma-jax --prompt x"),
        ("", "python no_such_script.py"),
        ("", "python run.py --no-such-option"),
        ("", "python run.py --prompt x | less"),
        ("", "python run.py --context no-such-file.md"),
        ("", "python convert_weights.py HF_DIRECTORY DEST --verify --no-such-option"),
        ("", "python -m pytest tests/no_such_test.py"),
        ("console", "$ python run.py --no-such-option\nan answer"),
        ("text", "python run.py --prompt x"),
        ("python", "import gemma_jax\ngemma_jax.no_such_name"),
        ("python", "print(1 + 1)  # 3"),
        ("toml", "steps = 3"),
        ("bash", "python run.py --prompt x"),
    ],
)
def test_a_block_that_does_not_work_is_noticed(kind, text, desk, given, capsys):
    with pytest.raises((ValueError, AttributeError, FileNotFoundError)):
        desk.do(Block(ROOT / "docs" / "a.md", 1, kind, text + "\n"), given)


def test_commands_in_sentences_and_records_have_options_that_exist(desk):
    found = in_sentences(EVERYWHERE) + in_blocks(RECORDS)
    assert len(found) > 5
    for command in found:
        desk.parse(command)


def test_every_stand_in_is_needed(belongings):
    texts = "\n".join(block.text for page in PAGES for block in blocks(page))
    for name in belongings.stand_ins:
        assert name in texts, name


def test_what_the_checks_in_a_fresh_clone_run_is_on_one_line():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len([x for x in lines if re.match("python3 -m venv .*pytest", x)]) == 1


@pytest.mark.parametrize(
    "value, most, expected",
    [("4K,64K,1M", 700, "700,700,700"), ("4:32", 2, "2:2"), ("128", 300, "128"), ("0", 4, "0")],
)
def test_budgets_are_capped(value, most, expected):
    assert cap(value, most) == expected


# --- what is there --------------------------------------------------------------------------------


def test_every_option_that_is_named_exists():
    programs = {(c.program, c.words[1] == "-m") for c in in_blocks(PAGES) + in_sentences(PAGES)}
    programs = {(name, module) for name, module in programs if name not in (None, "pytest", "venv")}
    known = options_of("gemma_jax.evaluate", True, ["--text", "x"])
    with contextlib.redirect_stdout(io.StringIO()):
        for name, module in programs:
            known |= options_of(name if module else str(ROOT / name), module)
    for page in EVERYWHERE:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", prose(page)))
        assert named - known == set(), page


@pytest.mark.parametrize("page", EVERYWHERE, ids=name_of)
def test_what_a_page_links_to_is_there(page):
    for target in links(page):
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


@pytest.mark.parametrize("page", EVERYWHERE, ids=name_of)
def test_files_that_a_page_names_exist(page):
    for name in re.findall(
        r"(?<![\w/.])(?:gemma_jax|tests|benchmarks|docs)/[\w./-]*\w", prose(page)
    ):
        assert (ROOT / name).exists(), name


def test_every_page_can_be_reached_from_the_first():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        waiting += [(page.parent / link.partition("#")[0]).resolve() for link in links(page)]
    assert reached >= set(EVERYWHERE)
