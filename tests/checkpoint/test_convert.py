"""Conversion from Hugging Face and back: what is kept, what is refused, and that nothing is left."""

import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gemma_jax
from gemma_jax.checkpoint import convert as conversion
from gemma_jax.checkpoint import store
from gemma_jax.checkpoint.convert import convert, to_huggingface
from gemma_jax.config import GemmaConfig
from gemma_jax.errors import CorruptError, InputError, UsageError

UNTIED = {"tie_word_embeddings": False}
GATE = "model.layers.2.self_attn.gate"


def left_behind(directory):
    """What a failed conversion left beside its source."""
    return sorted(path.name for path in directory.iterdir() if path.name != "source")


def source_of(params, config):
    """Hugging Face's tensors of a parameter tree, through the table."""
    from gemma_jax.checkpoint.huggingface import table

    tensors = {}
    for entry in table(config):
        node = params
        for key in entry.path:
            node = node[key]
        tensors |= entry.split(np.asarray(node))
    return tensors


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_number_arrives(make_model, tmp_path, dtype, shards):
    source, tensors = make_model(dtype=dtype, shards=shards)
    done = convert(source, tmp_path / "dest", dtype="float32")
    model = gemma_jax.load(tmp_path / "dest")
    assert done.parameters == sum(tensor.size for tensor in tensors.values())
    found = source_of(model.params, model.config)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor.astype(np.float32))


@pytest.mark.parametrize("fields", [{}, UNTIED], ids=["tied", "untied"])
def test_int8_there_and_back(make_model, tmp_path, fields):
    source, tensors = make_model(fields=fields)
    done = convert(source, tmp_path / "dest", quantize="int8")
    assert done.parameters == sum(tensor.size for tensor in tensors.values())
    assert done.config.quantization == "int8" and done.config.dtype == "bfloat16"
    model = gemma_jax.load(tmp_path / "dest")
    qkv = model.params["layers_0"]["attention"]
    assert qkv["qkv"].dtype == np.int8 and qkv["qkv_scale"].dtype == np.float32
    assert model.params["final_norm"]["scale"].dtype == ml_dtypes.bfloat16
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) < 1.2 * done.parameters
    to_huggingface(tmp_path / "dest", tmp_path / "back", dtype="float32")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        step = np.abs(tensor).max(axis=-1, keepdims=True) / (127 if tensor.ndim == 2 else 128)
        assert (np.abs(found[name] - tensor) <= 0.51 * step).all()
    assert len(list(gemma_jax.generate(model, "the ship", max_new_tokens=4))) > 0


def test_what_cannot_be_quantised_to_is_refused(make_model, tmp_path):
    source, _ = make_model()
    with pytest.raises(UsageError, match="int4"):
        convert(source, tmp_path / "dest", quantize="int4")
    assert left_behind(tmp_path) == []


def test_bfloat16_is_the_default_and_rounds(make_model, tmp_path):
    source, tensors = make_model()
    convert(source, tmp_path / "dest")
    model = gemma_jax.load(tmp_path / "dest")
    assert model.config.dtype == "bfloat16"
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)} == {"bfloat16"}
    name = "model.layers.0.mlp.down_proj.weight"
    expected = tensors[name].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(source_of(model.params, model.config)[name], expected)
    widened = gemma_jax.load(tmp_path / "dest", dtype="float32")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(widened.params)} == {"float32"}


def test_configuration_tokenizer_and_stops_come_along(make_model, tmp_path):
    source, _ = make_model()
    convert(source, tmp_path / "dest")
    model = gemma_jax.load(tmp_path / "dest")
    read = GemmaConfig.from_hf(source)
    assert model.config.eos_ids == (1, 5) and model.config.name == "source"
    assert model.config.layer_types == read.layer_types
    assert model.config.memory.rule == "off"
    assert len(model.tokenizer) == read.vocab_size
    (source / "generation_config.json").write_text('{"eos_token_id": 7}')
    convert(source, tmp_path / "other")
    assert store.read_config(tmp_path / "other").eos_ids == (7,)
    (source / "generation_config.json").unlink()
    convert(source, tmp_path / "third")
    assert store.read_config(tmp_path / "third").eos_ids == (1,)


def with_head(tensors, change=0.0):
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + np.float32(change)}


@pytest.mark.parametrize(
    "fields, change, tied",
    [
        ({}, lambda tensors: tensors, True),
        ({}, with_head, True),  # a head equal to the embedding is tied
        (UNTIED, lambda tensors: with_head(tensors), True),
        (UNTIED, lambda tensors: with_head(tensors, 1.0), False),
        ({}, lambda tensors: with_head(tensors, 1.0), False),  # the tensors know better
    ],
)
def test_the_head_is_tied_when_it_is_the_embedding(make_model, tmp_path, fields, change, tied):
    source, tensors = make_model(fields=fields, change=change)
    convert(source, tmp_path / "dest", dtype="float32")
    model = gemma_jax.load(tmp_path / "dest")
    assert model.config.tied_embeddings == tied
    assert ("head" in model.params["embedder"]) == (not tied)
    if not tied:
        np.testing.assert_array_equal(model.params["embedder"]["head"], tensors["lm_head.weight"])


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    "fields, change, sentence",
    [
        ({}, without(DOWN), f"missing: {DOWN}"),
        (UNTIED, without("lm_head.weight"), "missing: lm_head.weight"),
        ({}, lambda t: t | {"model.extra.weight": t[DOWN]}, "unexpected: model.extra.weight"),
        (
            {},
            lambda t: t | {DOWN: t[DOWN].T.copy()},
            f"{DOWN} is \\[40, 24\\], expected \\[24, 40\\]",
        ),
        ({}, lambda t: t | {DOWN: np.full_like(t[DOWN], np.nan)}, f"{DOWN} has .* not finite"),
        ({}, lambda t: t | {DOWN: t[DOWN].astype(np.int8)}, f"{DOWN} is I8"),
        ({"model_type": "llama"}, None, "model_type is 'llama'"),
    ],
)
def test_other_tensors_are_named_and_nothing_is_written(
    make_model, tmp_path, fields, change, sentence
):
    if fields.get("model_type"):
        source, _ = make_model()
        content = json.loads((source / "config.json").read_text()) | fields
        (source / "config.json").write_text(json.dumps(content))
    else:
        source, _ = make_model(fields=fields, change=change)
    with pytest.raises(InputError, match=sentence):
        convert(source, tmp_path / "dest")
    assert left_behind(tmp_path) == []


def test_what_is_missing_by_the_dozen_is_counted(make_model, tmp_path):
    source, _ = make_model(change=lambda t: {"model.norm.weight": t["model.norm.weight"]})
    with pytest.raises(InputError, match=r"and \d+ more"):
        convert(source, tmp_path / "dest")


@pytest.mark.parametrize(
    "prefix, vision",
    [
        ("language_model.model.", "vision_tower.embeddings.weight"),
        ("model.language_model.", "model.vision_tower.embeddings.weight"),
    ],
)
def test_the_language_model_of_a_multimodal_checkpoint(make_model, tmp_path, prefix, vision):
    def rename(tensors):
        renamed = {n.replace("model.", prefix, 1): t for n, t in tensors.items()}
        return renamed | {vision: np.ones((2, 3), np.float32)}

    source, tensors = make_model(change=rename)
    text = json.loads((source / "config.json").read_text())
    content = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    (source / "config.json").write_text(json.dumps(content))
    done = convert(source, tmp_path / "dest", dtype="float32")
    assert done.skipped == (vision,)
    model = gemma_jax.load(tmp_path / "dest")
    np.testing.assert_array_equal(
        model.params["final_norm"]["scale"], tensors[f"{prefix}norm.weight"]
    )
    to_huggingface(tmp_path / "dest", tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["model_type"] == "gemma3_text" and "text_config" not in written


@pytest.mark.parametrize("gate", [-100.0, 0.5])
def test_gates_of_the_original_become_rule_linear(make_model, tmp_path, gate):
    shape = (1, 4, 1, 1)
    source, _ = make_model(change=lambda t: t | {GATE: np.full(shape, gate, np.float32)})
    done = convert(source, tmp_path / "dest")
    model = gemma_jax.load(tmp_path / "dest")
    assert model.config.memory.rule == "linear"
    found = model.params["layers_2"]["attention"]["memory"]["gate"]
    assert found.dtype == np.float32 and found.tolist() == [gate] * 4
    assert ("never read" in done.notices[0]) == (gate == -100.0)
    off = gemma_jax.load(tmp_path / "dest", memory="off")
    assert "memory" not in off.params["layers_2"]["attention"]
    assert off.config.memory.rule == "off"
    to_huggingface(tmp_path / "dest", tmp_path / "back")
    written = load_file(tmp_path / "back" / "model.safetensors")
    np.testing.assert_array_equal(written[GATE], np.full(shape, gate, np.float32))


@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
@pytest.mark.parametrize("fields", [{}, UNTIED], ids=["tied", "untied"])
def test_there_and_back_is_the_same(make_model, tmp_path, monkeypatch, fields, shard_bytes):
    monkeypatch.setattr(conversion, "SHARD_BYTES", shard_bytes)
    source, tensors = make_model(fields=fields, dtype=ml_dtypes.bfloat16)
    convert(source, tmp_path / "dest")
    to_huggingface(tmp_path / "dest", tmp_path / "back")
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes < 10**9)
    found = {}
    for file in files:
        found |= load_file(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name].view(np.uint16), tensor.view(np.uint16))
    convert(tmp_path / "back", tmp_path / "again")  # and it is a model to be converted
    first, again = gemma_jax.load(tmp_path / "dest"), gemma_jax.load(tmp_path / "again")
    assert again.config == first.config.__class__(**{**vars(first.config), "name": "back"})
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), first.params, again.params))


def test_transformers_reads_what_is_written_back(make_model, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    source, _ = make_model()
    convert(source, tmp_path / "dest", dtype="float32")
    to_huggingface(tmp_path / "dest", tmp_path / "back")
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        first, back = (
            transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens)
            for path in (source, tmp_path / "back")
        )
    np.testing.assert_array_equal(first.logits.numpy(), back.logits.numpy())


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_torch_files(make_model, tmp_path, kind):
    torch = pytest.importorskip("torch")
    source, tensors = make_model()
    (source / "model.safetensors").unlink()
    state = {name: torch.from_numpy(tensor).bfloat16() for name, tensor in tensors.items()}
    if kind == "whole":
        torch.save(state, source / "pytorch_model.bin")
    else:
        homes = {}
        for i, names in enumerate((sorted(state)[::2], sorted(state)[1::2])):
            torch.save({name: state[name] for name in names}, source / f"part{i}.bin")
            homes |= dict.fromkeys(names, f"part{i}.bin")
        index = source / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": homes}))
    convert(source, tmp_path / "dest", dtype="float32")
    model = gemma_jax.load(tmp_path / "dest")
    for name, tensor in source_of(model.params, model.config).items():
        np.testing.assert_array_equal(tensor, state[name].float().numpy())


def test_torch_files_that_run_code_are_refused(make_model, tmp_path):
    torch = pytest.importorskip("torch")
    source, _ = make_model()
    (source / "model.safetensors").unlink()
    torch.save({"model.norm.weight": pathlib.PurePosixPath("x")}, source / "pytorch_model.bin")
    with pytest.raises(CorruptError, match="more than tensors"):
        convert(source, tmp_path / "dest")


def test_only_tokenizer_model(make_model, tmp_path):
    """A model without tokenizer.json is read through sentencepiece, to the same ids."""
    spm = pytest.importorskip("sentencepiece")
    source, _ = make_model()
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the whale and the sea and the ship that sails upon it\n" * 50)
    spm.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tiny"), vocab_size=320, model_type="bpe",
        byte_fallback=True, pad_id=0, eos_id=1, bos_id=2, unk_id=3, add_dummy_prefix=False,
        remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    (source / "tokenizer.json").unlink()
    shutil.move(tmp_path / "tiny.model", source / "tokenizer.model")
    for extra in ("corpus.txt", "tiny.vocab"):
        (tmp_path / extra).unlink()
    convert(source, tmp_path / "dest")
    text = "the whale ate  the ship\nœ"
    expected = spm.SentencePieceProcessor(model_file=str(source / "tokenizer.model")).encode(text)
    from gemma_jax.text import encode

    assert encode(gemma_jax.load(tmp_path / "dest").tokenizer, text) == expected


@pytest.mark.parametrize(
    "damage, error, sentence",
    [
        (lambda d: (d / "tokenizer.json").unlink(), InputError, "neither tokenizer.json"),
        (lambda d: (d / "tokenizer.json").write_text("{"), InputError, "cannot be read"),
        (lambda d: (d / "config.json").unlink(), InputError, "config.json does not exist"),
        (lambda d: (d / "config.json").write_text("{"), InputError, "cannot be read as JSON"),
        (lambda d: (d / "model.safetensors").unlink(), InputError, "has neither model.safetensors"),
        (lambda d: truncate(d / "model.safetensors", 5000), CorruptError, "is damaged"),
        (lambda d: truncate(d / "model.safetensors", 4), CorruptError, "is damaged"),
        (lambda d: (d / "model.safetensors").write_bytes(b"x" * 999), CorruptError, "is damaged"),
        (
            lambda d: (d / "generation_config.json").write_text('{"eos_token_id": ["x"]}'),
            InputError,
            "holds no token ids",
        ),
    ],
)
def test_damaged_sources_are_named_and_nothing_is_written(
    make_model, tmp_path, damage, error, sentence
):
    source, _ = make_model()
    damage(source)
    with pytest.raises(error, match=sentence):
        convert(source, tmp_path / "dest")
    assert left_behind(tmp_path) == []


def truncate(file, size):
    file.write_bytes(file.read_bytes()[:size])


def test_a_missing_shard_is_named(make_model, tmp_path):
    source, _ = make_model(shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match="model-00002-of-00003.safetensors is missing"):
        convert(source, tmp_path / "dest")


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a/b", "..", "", 7])
def test_shards_outside_the_directory_are_refused(make_model, tmp_path, shard):
    source, tensors = make_model()
    save_file(tensors, tmp_path / "secret.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, shard)}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="outside the directory"):
        convert(source, tmp_path / "dest")


def test_a_full_disk_is_known_first(make_model, tmp_path, monkeypatch):
    source, _ = make_model()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match="GB of disk"):
        convert(source, tmp_path / "dest")
    assert left_behind(tmp_path) == []


def test_an_interruption_leaves_nothing(make_model, tmp_path):
    source, _ = make_model()

    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "dest", on_progress=interrupt)
    assert left_behind(tmp_path) == []


def test_what_exists_is_replaced_only_when_asked_and_only_a_checkpoint(make_model, tmp_path):
    source, _ = make_model()
    dest = tmp_path / "dest"
    convert(source, dest)
    with pytest.raises(UsageError, match="--overwrite"):
        convert(source, dest)
    convert(source, dest, dtype="float32", overwrite=True)
    assert store.read_config(dest).dtype == "float32"
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="not replaced"):
        convert(source, precious, overwrite=True)
    assert (precious / "letter.txt").read_text() == "dear"
    assert left_behind(tmp_path) == ["dest", "home"]
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty")


def test_verification(make_model, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    source, _ = make_model()
    done = convert(source, tmp_path / "dest", dtype="float32", verify=True)
    assert done.verification.max_kl < 1e-6 and done.verification.top5_agreement == 1.0
    assert done.verification.tokens == 500
    rounded = convert(source, tmp_path / "rounded", verify=True)
    assert rounded.verification.max_kl < 1e-6
    quantised = convert(source, tmp_path / "quantised", quantize="int8", verify=True)
    assert quantised.verification.max_kl < 1e-6

    from gemma_jax.checkpoint.huggingface import Entry

    join = Entry.join  # a conversion with a fault: one norm is forgotten
    monkeypatch.setattr(
        Entry, "join", lambda self, t: join(self, t) * (self.path[-2] != "pre_mlp_norm")
    )
    with pytest.raises(gemma_jax.errors.GemmaError, match="differs from the reference"):
        convert(source, tmp_path / "broken", verify=True)
    assert not (tmp_path / "broken").exists()


@pytest.mark.parametrize("kept", [1.0, 0.1])
def test_a_tokenizer_that_cannot_make_its_own_words_is_told_of(make_model, tmp_path, kept):
    """As those are that some versions of transformers make of GGUF files: most of the merges are missing."""
    source, _ = make_model()
    file = source / "tokenizer.json"
    content = json.loads(file.read_text())
    merges = content["model"]["merges"]
    assert len(merges) > 100
    content["model"]["merges"] = merges[: int(kept * len(merges))]
    file.write_text(json.dumps(content))
    notices = convert(source, tmp_path / "dest").notices
    assert any("merges are missing" in notice for notice in notices) == (kept < 1)
