"""Configurations: every published model, every spelling of config.json, and what is refused."""

import dataclasses
import json
import math

import jax
import pytest

from gemma_jax import PRESETS, GemmaConfig, abstract_params
from gemma_jax.checkpoint.huggingface import table
from gemma_jax.config import MemoryConfig, Rope
from gemma_jax.errors import InputError, UsageError

GEMMA1 = {"model_type": "gemma", "vocab_size": 256_000, "head_dim": 256}
GEMMA2 = {
    "model_type": "gemma2",
    "vocab_size": 256_000,
    "head_dim": 256,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "vocab_size": 262_144,
    "head_dim": 256,
    "sliding_window": 512,
    "query_pre_attn_scalar": 256,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window_pattern": 6,
}
GEMMA3_VISION = GEMMA3 | {
    "vocab_size": 262_208,
    "sliding_window": 1024,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
}


def shape(width, mlp, layers, heads, kv_heads):
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


SMALL_HEADS = {"head_dim": 128}
PUBLISHED = {  # name: config.json as published, parameters of the language model
    "gemma-2b": (GEMMA1 | shape(2048, 16384, 18, 8, 1), 2_506_172_416),
    "gemma-7b": (GEMMA1 | shape(3072, 24576, 28, 16, 16), 8_537_680_896),
    "gemma-2-2b": (GEMMA2 | shape(2304, 9216, 26, 8, 4), 2_614_341_888),
    "gemma-2-9b": (GEMMA2 | shape(3584, 14336, 42, 16, 8), 9_241_705_984),
    "gemma-2-27b": (
        GEMMA2 | shape(4608, 36864, 46, 32, 16) | SMALL_HEADS | {"query_pre_attn_scalar": 144},
        27_227_128_320,
    ),
    "gemma-3-270m": (GEMMA3 | shape(640, 2048, 18, 4, 1), 268_098_176),
    "gemma-3-1b": (GEMMA3 | shape(1152, 6912, 26, 4, 1), 999_885_952),
    "gemma-3-4b": (GEMMA3_VISION | shape(2560, 10240, 34, 8, 4), 3_880_263_168),
    "gemma-3-12b": (GEMMA3_VISION | shape(3840, 15360, 48, 16, 8), 11_766_034_176),
    "gemma-3-27b": (
        GEMMA3_VISION
        | shape(5376, 21504, 62, 32, 16)
        | SMALL_HEADS
        | {"query_pre_attn_scalar": 168},
        27_009_346_304,
    ),
}


def plain(config):
    """What counts of a configuration that was read, beside its name."""
    return dataclasses.replace(config, name="", eos_ids=(1,))


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_configurations(name):
    fields, parameters = PUBLISHED[name]
    preset = PRESETS[name]
    assert plain(GemmaConfig.from_hf(fields)) == plain(preset)
    assert sum(entry.size for entry in table(preset)) == parameters
    ours = jax.tree.leaves(abstract_params(preset))
    assert sum(math.prod(leaf.shape) for leaf in ours) == parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_those_of_transformers(name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    fields, parameters = PUBLISHED[name]
    kinds = {
        "gemma": transformers.GemmaConfig,
        "gemma2": transformers.Gemma2Config,
        "gemma3_text": transformers.Gemma3TextConfig,
    }
    config = kinds[fields["model_type"]].from_dict(fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    expected = {key: tuple(value.shape) for key, value in model.named_parameters()}
    found = {
        key: size
        for entry in table(PRESETS[name])
        for key, size in zip(entry.names, entry.shapes, strict=True)
    }
    assert found == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    attention = model.model.layers[0].self_attn
    assert PRESETS[name].query_scale == pytest.approx(attention.scaling)


ONE_TO_ONE, FIVE_TO_ONE = 2, 6  # every so many-th layer is global
PLAIN = Rope(10_000.0)
HIDDEN = {  # name: query scale, RoPE of global layers, window, global layers
    "gemma-2b": (1 / 16, PLAIN, None, range(18)),
    "gemma-7b": (1 / 16, PLAIN, None, range(28)),
    "gemma-2-2b": (1 / 16, PLAIN, 4096, range(1, 26, ONE_TO_ONE)),
    "gemma-2-9b": (1 / 16, PLAIN, 4096, range(1, 42, ONE_TO_ONE)),
    "gemma-2-27b": (1 / 12, PLAIN, 4096, range(1, 46, ONE_TO_ONE)),
    "gemma-3-270m": (1 / 16, Rope(1e6), 512, (5, 11, 17)),
    "gemma-3-1b": (1 / 16, Rope(1e6), 512, (5, 11, 17, 23)),
    "gemma-3-4b": (1 / 16, Rope(1e6, 8.0), 1024, (5, 11, 17, 23, 29)),
    "gemma-3-12b": (1 / 16, Rope(1e6, 8.0), 1024, range(5, 48, FIVE_TO_ONE)),
    "gemma-3-27b": (168**-0.5, Rope(1e6, 8.0), 1024, range(5, 62, FIVE_TO_ONE)),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_the_tensors_do_not_show(name):
    query_scale, rope, window, global_layers = HIDDEN[name]
    config = PRESETS[name]
    assert config.query_scale == pytest.approx(query_scale, rel=1e-12)
    assert config.rope("global") == rope and config.rope("sliding") == PLAIN
    assert config.sliding_window == window
    found = [i for i, kind in enumerate(config.layer_types) if kind == "global"]
    assert found == list(global_layers)
    assert (config.attention_softcap, config.final_softcap) == (
        (50.0, 30.0) if name.startswith("gemma-2-") else (None, None)
    )
    assert config.memory.rule == "off" and config.dtype == "bfloat16"


def test_no_preset_is_left_out():
    assert set(PRESETS) == set(PUBLISHED) == set(HIDDEN)
    assert all(config.name == name for name, config in PRESETS.items())


TINY = shape(24, 40, 6, 4, 2) | {"head_dim": 8, "vocab_size": 100}


def test_new_spelling_is_the_same_as_the_old():
    old = GEMMA3_VISION | TINY | {"torch_dtype": "bfloat16"}
    new = {key: value for key, value in old.items() if not key.startswith(("rope", "sliding_w"))}
    new |= {
        "dtype": "bfloat16",
        "sliding_window": 1024,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    }
    config = GemmaConfig.from_hf(new)
    assert config == GemmaConfig.from_hf(old)
    assert config.global_rope == Rope(1_000_000.0, 8.0)
    old_gemma = GEMMA1 | TINY | {"rope_theta": 5000.0, "hidden_act": "gelu"}
    assert GemmaConfig.from_hf(old_gemma).global_rope == Rope(5000.0)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_linear_rope_scaling_in_either_spelling(family, spelling):
    fields = TINY | {
        "model_type": family,
        "rope_theta": 7000.0,
        "rope_scaling": {spelling: "linear", "factor": 4.0},
    }
    config = GemmaConfig.from_hf(fields)
    assert config.global_rope == Rope(7000.0, 4.0)
    local = PLAIN if family == "gemma3_text" else config.global_rope
    assert config.sliding_rope == local


def test_bases_and_pattern_in_the_old_spelling():
    old = {"rope_theta": 9000.0, "rope_local_base_freq": 700.0, "sliding_window_pattern": 3}
    config = GemmaConfig.from_hf(GEMMA3 | TINY | old)
    assert (config.global_rope, config.sliding_rope) == (Rope(9000.0), Rope(700.0))
    assert config.layer_types == ("sliding", "sliding", "global") * 2


def test_layer_types_that_are_named_count():
    kinds = ["full_attention", "sliding_attention"] * 3
    config = GemmaConfig.from_hf(GEMMA2 | TINY | {"layer_types": kinds})
    assert config.layer_types == ("global", "sliding") * 3
    config = GemmaConfig.from_hf(GEMMA2 | TINY | {"layer_types": kinds[:1] * 6})
    assert config.sliding_window is None  # no layer has one


@pytest.mark.parametrize(
    "field, value, name, expected",
    [
        ("eos_token_id", [1, 106], "eos_ids", (1, 106)),
        ("eos_token_id", 7, "eos_ids", (7,)),
        ("eos_token_id", None, "eos_ids", ()),
        ("bos_token_id", None, "bos_id", 2),
        ("bos_token_id", 5, "bos_id", 5),
        ("tie_word_embeddings", False, "tied_embeddings", False),
        ("rms_norm_eps", 1e-5, "norm_eps", 1e-5),
        ("final_logit_softcapping", None, "final_softcap", None),
        ("attn_logit_softcapping", 9.0, "attention_softcap", 9.0),
        ("query_pre_attn_scalar", 64, "query_scale", 1 / 8),
        ("torch_dtype", "float32", "dtype", "bfloat16"),  # the user's choice, not the file's
    ],
)
def test_fields_are_read(field, value, name, expected):
    assert getattr(GemmaConfig.from_hf(GEMMA2 | TINY | {field: value}), name) == expected


def multimodal(text=None, **fields):
    return {"model_type": "gemma3", "text_config": text or {}, "vision_config": {}} | fields


def test_multimodal_configurations_give_their_language_model():
    text = GEMMA3_VISION | TINY
    assert GemmaConfig.from_hf(multimodal(text)) == GemmaConfig.from_hf(text)


def test_multimodal_configurations_as_they_are_published():
    """They leave most of the text part out, and name its stop tokens outside it."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    content = multimodal(text, eos_token_id=[1, 106], torch_dtype="bfloat16")
    before = json.dumps(content)
    config = GemmaConfig.from_hf(content)
    assert plain(config) == plain(PRESETS["gemma-3-4b"])
    assert config.eos_ids == (1, 106)
    assert json.dumps(content) == before  # what was given is left as it was


def test_multimodal_configurations_tie_the_head_from_outside():
    """As transformers does: the text part's own `tie_word_embeddings` does not count."""
    assert not GemmaConfig.from_hf(multimodal(tie_word_embeddings=False)).tied_embeddings
    assert GemmaConfig.from_hf(multimodal({"tie_word_embeddings": False})).tied_embeddings


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text"])
def test_omitted_fields_are_those_of_transformers(family):
    transformers = pytest.importorskip("transformers")
    kinds = {
        "gemma": transformers.GemmaConfig,
        "gemma2": transformers.Gemma2Config,
        "gemma3_text": transformers.Gemma3TextConfig,
    }
    config, expected = GemmaConfig.from_hf({"model_type": family}), kinds[family]()
    assert config.width == expected.hidden_size
    assert config.num_layers == expected.num_hidden_layers
    assert config.vocab_size == expected.vocab_size
    assert config == GemmaConfig.from_hf(expected.to_dict())


def test_a_directory_or_a_file_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GEMMA2 | TINY))
    expected = GemmaConfig.from_hf(GEMMA2 | TINY)
    assert GemmaConfig.from_hf(tmp_path) == GemmaConfig.from_hf(tmp_path / "config.json")
    assert GemmaConfig.from_hf(tmp_path) == expected
    changed = GemmaConfig.from_hf(tmp_path, dtype="float32", name="mine")
    assert (changed.dtype, changed.name) == ("float32", "mine")


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0}


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"model_type": "llama"}, "model_type is 'llama': supported are gemma"),
        ({}, "model_type is None"),
        (GEMMA1 | {"rope_parameters": YARN}, "rope_type is 'yarn'"),
        (GEMMA1 | {"attention_bias": True}, "attention_bias is true"),
        (GEMMA2 | {"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA1 | {"hidden_act": "relu"}, "hidden_activation is 'relu'"),
        (GEMMA2 | {"rope_scaling": YARN}, "rope_type is 'yarn'"),
        (GEMMA3 | {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        (GEMMA3 | {"rope_scaling": {"rope_type": "linear"}}, "factor"),
        (GEMMA1 | {"rope_theta": None}, "rope_parameters"),
        (GEMMA1 | {"rope_theta": 0}, "rope_theta is 0.0"),
        (GEMMA1 | {"num_key_value_heads": 3}, "num_attention_heads"),
        (GEMMA1 | {"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        (GEMMA1 | {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        (GEMMA1 | {"head_dim": 7}, "head_dim"),
        (GEMMA1 | {"head_dim": 0}, "head_dim is 0"),
        (GEMMA3 | {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        (GEMMA2 | {"sliding_window": None}, "sliding_window is None"),
        (GEMMA2 | {"sliding_window": -1}, "sliding_window is -1"),
        (GEMMA2 | {"num_hidden_layers": "many"}, "valid gemma2 configuration.*num_hidden_layers"),
        (GEMMA2 | {"num_hidden_layers": 2, "layer_types": ["full_attention"]}, "layer_types"),
        (
            GEMMA2 | {"num_hidden_layers": 1, "layer_types": ["chunked_attention"]},
            "layer_types has chunked_attention",
        ),
        (multimodal({"model_type": "llama"}), "text_config.model_type is 'llama'"),
        (multimodal("text"), "text_config"),
        (multimodal(eos_token_id="end"), "eos_token_id"),
        ({"model_type": ["gemma"]}, "model_type is "),
    ],
)
def test_what_is_not_supported_is_named(fields, sentence):
    with pytest.raises(InputError, match=sentence):
        GemmaConfig.from_hf(fields)


@pytest.mark.parametrize("content", ["{", "[1]", "\udcff"])
def test_broken_files_are_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match="config.json"):
        GemmaConfig.from_hf(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        GemmaConfig.from_hf(tmp_path / "nowhere")


def test_configurations_are_static_arguments():
    config = PRESETS["gemma-3-4b"]
    assert hash(config) == hash(dataclasses.replace(config)) and config != PRESETS["gemma-3-1b"]
    widen = jax.jit(lambda x, config: x * config.width, static_argnames="config")
    assert widen(1, config=config) == 2560 and widen(1, config=PRESETS["gemma-3-1b"]) == 1152
    widen(1, config=GemmaConfig.from_json(config.to_json()))
    assert widen._cache_size() == 2  # an equal configuration is the same one
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.width = 1


def test_with_memory_changes_nothing_else():
    config = PRESETS["gemma-3-4b"]
    changed = config.with_memory(rule="linear", segment_length=512, local_attention="segment")
    assert changed.memory == MemoryConfig("linear", "segment", 512)
    assert dataclasses.replace(changed, memory=config.memory) == config
    again = changed.with_memory(sink=False)
    assert (again.memory.rule, again.memory.sink) == ("linear", False)
    with pytest.raises(TypeError):
        config.with_memory(segments=3)


@pytest.mark.parametrize("form, reach", [("transformer_xl", 1400), ("segment", 700)])
def test_reach(form, reach):
    assert MemoryConfig(local_attention=form, segment_length=700).reach == reach


@pytest.mark.parametrize("name", PRESETS)
def test_json_and_back(name):
    config = dataclasses.replace(PRESETS[name], eos_ids=(1, 106), dtype="float32")
    config = config.with_memory(rule="gated_delta", sink=False, write_gate="sigmoid")
    assert GemmaConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "3", "null", "{", '{"family": "gemma", "surprise": 1}']
)
def test_other_json_is_no_configuration(text):
    with pytest.raises(InputError, match="convert the model again"):
        GemmaConfig.from_json(text)


@pytest.mark.parametrize(
    "field, value",
    [
        ("surprise", 1),
        ("vocab_size", "many"),
        ("vocab_size", 1.5),
        ("width", True),
        ("width", None),
        ("num_kv_heads", 0),
        ("num_heads", "4"),
        ("head_dim", 7),
        ("query_scale", None),
        ("qk_norm", "no"),
        ("layer_types", "global"),
        ("layer_types", ["banana"]),
        ("layer_types", []),
        ("layer_types", None),
        ("eos_ids", ["x"]),
        ("eos_ids", 1),
        ("sliding_window", -1),
        ("attention_softcap", "50"),
        ("global_rope", {}),
        ("global_rope", {"theta": "x"}),
        ("global_rope", {"theta": -1.0}),
        ("dtype", "int8"),
        ("memory", None),
        ("memory", {"rule": 3}),
        ("memory", {"segment_length": 8.5}),
        ("memory", {"segment_length": 0}),
        ("memory", {"local_attention": "everything"}),
        ("memory", {"surprise": 1}),
    ],
    ids=str,
)
def test_a_damaged_configuration_is_refused(field, value):
    fields = json.loads(PRESETS["gemma-3-1b"].to_json())
    with pytest.raises(InputError, match="convert the model again"):
        GemmaConfig.from_json(json.dumps(fields | {field: value}))


@pytest.mark.parametrize("field", ["family", "width", "layer_types", "memory", "global_rope"])
def test_a_field_that_is_missing_is_named(field):
    fields = json.loads(PRESETS["gemma-3-1b"].to_json())
    del fields[field]
    with pytest.raises(InputError, match=field):
        GemmaConfig.from_json(json.dumps(fields))


@pytest.mark.parametrize(
    "changes",
    [
        {"segment_length": 0},
        {"segment_length": -8},
        {"local_attention": "global"},
        {"write_gate": "hard"},
    ],
    ids=str,
)
def test_memory_settings_out_of_range(changes):
    (name, value), *_ = changes.items()
    with pytest.raises(UsageError, match=f"{name} is {value!r}"):
        PRESETS["gemma-2b"].with_memory(**changes)


def test_dtypes_out_of_range():
    with pytest.raises(UsageError, match="dtype is 'int8': choose one of bfloat16, float32"):
        dataclasses.replace(PRESETS["gemma-2b"], dtype="int8")
