"""Kills, damage and full disks: a few of each; `fault_injection.py` does many."""

import os
import random
import shutil

import fault_injection as faults
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import convert_weights
import gemma_jax
import run
from gemma_jax import random_model
from gemma_jax.checkpoint import adapter as adapters
from gemma_jax.checkpoint import memory_file, store
from gemma_jax.checkpoint.convert import convert
from gemma_jax.errors import CorruptError, GemmaError
from gemma_jax.inference import remember

FULL = bool(os.environ.get("GEMMA_JAX_FAULTS"))  # every fault as often as the records say
FLIPS, CUTS, PROMPTS = (200, 50, 1000) if FULL else (60, 15, 40)
SEGMENT = 64


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return random_model.write_hugging_face(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory):
    dest = tmp_path_factory.mktemp("models") / "model"
    convert(source, dest, dtype="float32")
    return dest


@pytest.fixture(scope="module")
def model(checkpoint):
    return gemma_jax.load(checkpoint, segment_length=SEGMENT)


@pytest.fixture
def command(capsys):
    """Runs a command in this process; gives its exit code and the last line of its errors."""

    def call(main, *arguments):
        try:
            code = main([*map(str, arguments)])
        except SystemExit as exit_:
            code = exit_.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, (err.strip().splitlines() or [""])[-1]

    return call


# --- kill -9 ---


def test_a_killed_conversion_leaves_a_whole_checkpoint(source, tmp_path):
    found = None
    for seed in range(4):
        found = found or faults.kill_a_conversion(source, tmp_path, random.Random(seed), 0.2)
    assert found


def test_a_killed_save_leaves_a_whole_memory(checkpoint, tmp_path):
    model = gemma_jax.load(checkpoint, segment_length=16384)
    faults.kill_a_save(checkpoint, tmp_path, random.Random(0), model)


# --- damage ---


def test_damaged_files_of_a_checkpoint_are_refused_with_their_name(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")

    def refuse(file):
        try:
            gemma_jax.load(tmp_path / "model")
        except CorruptError as error:
            faults.require(str(file) in str(error), error)
        else:
            faults.require(False, "it was loaded")

    parts = [file for file in (tmp_path / "model").rglob("*") if file.is_file()]
    parts = [file for file in parts if file.stat().st_size]
    faults.damage(parts, refuse, random.Random(0), FLIPS, CUTS)
    gemma_jax.load(tmp_path / "model")  # which is whole again


def test_damaged_memory_files_are_refused_with_their_name(model, tmp_path):
    memory = remember.remember(model, "the people called him " * 40)
    memory_file.save(tmp_path / "a.mem", memory, model)

    def refuse(file):
        with pytest.raises(CorruptError, match=str(file)):
            memory_file.load(file, model)

    faults.damage([tmp_path / "a.mem"], refuse, random.Random(0), FLIPS, CUTS)
    memory_file.load(tmp_path / "a.mem", model)


def test_damaged_files_of_an_adapter_are_refused_with_their_name(model, tmp_path):
    params = {"layers_0": {"attention": {"memory": {"gate": np.zeros(300, np.float32)}}}}
    adapter = adapters.Adapter("gemma", "0" * 64, model.config.memory, "memory", params)
    adapters.write(adapter, tmp_path)

    def refuse(file):
        with pytest.raises(CorruptError, match=str(file)):
            adapters.read(tmp_path)

    faults.damage(sorted(tmp_path.iterdir()), refuse, random.Random(0), FLIPS, CUTS)
    adapters.read(tmp_path)


def test_files_that_were_not_written_with_a_checkpoint_are_refused(checkpoint, tmp_path):
    for name in ("params/state/d/more", "chat_template.jinja", "added_tokens.json"):
        shutil.copytree(checkpoint, tmp_path / "model")
        (tmp_path / "model" / name).write_text("{}")
        with pytest.raises(CorruptError, match=f"{name} does not belong"):
            gemma_jax.load(tmp_path / "model")
        shutil.rmtree(tmp_path / "model")


def test_damage_has_its_exit_code(command, checkpoint, model, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    file.write_bytes(file.read_bytes().replace(b"people", b"peopla", 1))
    code, out, line = command(run.main, "--model", tmp_path / "model", "--prompt", "a")
    assert (code, out) == (4, "") and f"error: {file}" in line
    state = gemma_jax.init_state(model.config)
    gemma_jax.save_state(tmp_path / "a.mem", state, model=model)
    with open(tmp_path / "a.mem", "r+b") as stream:
        stream.truncate(1000)
    arguments = ("--model", checkpoint, "--load-memory", tmp_path / "a.mem", "--prompt", "a")
    code, out, line = command(run.main, *arguments)
    assert (code, out) == (4, "") and f"error: {tmp_path / 'a.mem'}" in line


def test_weights_that_are_not_finite_are_named(checkpoint, tmp_path, monkeypatch):
    load_params = store.load_params

    def broken(*arguments):
        params = load_params(*arguments)
        kernel = params["layers_1"]["mlp"]["gate_up"]
        params["layers_1"]["mlp"]["gate_up"] = kernel.at[0, 0].set(float("nan"))
        return params

    monkeypatch.setattr(store, "load_params", broken)
    with pytest.raises(GemmaError, match="layers_1/mlp/gate_up has numbers that are not") as caught:
        gemma_jax.load(checkpoint)
    assert caught.value.exit_code == 1
    gemma_jax.load(checkpoint, verify=False)


# --- a full disk ---


@pytest.fixture
def disk(tmp_path):
    """A file system of one megabyte."""
    try:
        with faults.small_disk(tmp_path / "disk", "1m") as place:
            yield place
    except OSError as error:
        pytest.skip(str(error))


def test_a_conversion_onto_a_full_disk_leaves_what_was_there(
    command, source, checkpoint, disk, monkeypatch
):
    (disk / "filler").write_bytes(b"\0" * 500_000)
    code, _, line = command(convert_weights.main, source, disk / "model")
    assert code == 3 and "are free" in line  # known before
    monkeypatch.setattr(store, "require_space", lambda *_: None)
    code, _, line = command(convert_weights.main, source, disk / "model", "--dtype", "float32")
    assert code == 3 and "The disk is full" in line
    assert os.listdir(disk) == ["filler"]


def test_saving_onto_a_full_disk_leaves_what_was_there(command, checkpoint, model, disk):
    path = disk / "a.mem"
    arguments = ("--model", checkpoint, "--prompt", "the people", "--max-new-tokens", 1)
    segment = ("--segment-length", SEGMENT, "--save-memory", path)
    assert command(run.main, *arguments, *segment)[0] == 0
    before = path.read_bytes()
    free = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(b"\0" * (free - 8192))
    code, out, line = command(run.main, *arguments, *segment)
    assert (code, out) == (3, "")
    assert "cannot be written (No space left on device)" in line
    assert path.read_bytes() == before and sorted(os.listdir(disk)) == ["a.mem", "filler"]


# --- prompts and options ---

TEXTS = st.text(max_size=40) | st.sampled_from(
    ["", "-", "--", "\\", "<bos>", "\0", "é" * 500, "/quit"]
)
NUMBERS = st.sampled_from(["0", "1", "3", "-1", "1.5", "nan", "inf", "", "x", "1e999", "٣", "0x1"])
OPTIONS = st.one_of(
    st.tuples(st.just("--prompt"), TEXTS),
    st.tuples(st.just("--stop"), TEXTS),
    st.tuples(
        st.sampled_from(
            [
                "--max-new-tokens",
                "--temperature",
                "--top-k",
                "--top-p",
                "--min-p",
                "--seed",
                "--autosave",
            ]
        ),
        NUMBERS,
    ),
    st.tuples(st.just("--segment-length"), st.sampled_from(["0", "64", "-3", "x"])),
    st.tuples(st.just("--memory"), st.sampled_from(["off", "delta", "nothing", ":", "a.py:B", ""])),
    st.tuples(st.just("--encoding-errors"), st.sampled_from(["strict", "replace", "ignore"])),
    st.tuples(
        st.sampled_from(["--json", "--quiet", "--template", "--chat", "--no-verify", "--frob"])
    ),
    st.tuples(
        st.sampled_from(
            ["--context", "--load-memory", "--resume", "--prompts", "--save-memory", "--model"]
        ),
        st.sampled_from(
            ["nowhere", "", "book", "old.mem", "new.mem", "p.jsonl", ".", "broken", "a\0b"]
        ),
    ),
)


@pytest.fixture
def place(model, tmp_path, monkeypatch):
    """A directory with some files, where models are loaded once."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book").write_text("the people called him\n" * 30)
    (tmp_path / "broken").write_bytes(b"the \xff people")
    (tmp_path / "p.jsonl").write_text('"who"\n{"prompt": 3}\n')
    memory_file.save("old.mem", remember.remember(model, "the people"), model)
    loaded, load = {}, store.load

    def once(path, **options):
        key = (str(path), *sorted(options.items()))
        if key not in loaded:
            loaded[key] = load(path, **options)
        return loaded[key]

    monkeypatch.setattr(store, "load", once)
    monkeypatch.setattr("sys.stdin", None)


@hypothesis.given(options=st.lists(OPTIONS, max_size=5), add_prompt=st.booleans())
@hypothesis.settings(
    max_examples=PROMPTS,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
def test_any_prompt_and_options_end_with_an_exit_code_of_the_contract(
    place, command, checkpoint, options, add_prompt
):
    arguments = [argument for option in options for argument in option]
    arguments += ["--prompt", "who"] if add_prompt else []
    for name, value in (("--max-new-tokens", "2"), ("--model", checkpoint)):
        if name not in arguments:
            arguments += [name, value]
    code, _, line = command(run.main, *arguments)
    assert code in {0, 2, 3, 4}, line
    assert "Internal error" not in line
