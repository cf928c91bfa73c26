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


@pytest.mark.parametrize(
    "name, query_scale, rope, sliding_rope, window, global_layers",
    [
        ("gemma-7b", 1 / 16, Rope(10_000.0), None, None, range(28)),
        ("gemma-2-27b", 1 / 12, Rope(10_000.0), Rope(10_000.0), 4096, range(1, 46, 2)),
        ("gemma-3-1b", 1 / 16, Rope(1e6), Rope(10_000.0), 512, (5, 11, 17, 23)),
        ("gemma-3-27b", 168**-0.5, Rope(1e6, 8.0), Rope(10_000.0), 1024, range(5, 62, 6)),
    ],
)
def test_what_the_tensors_do_not_show(name, query_scale, rope, sliding_rope, window, global_layers):
    config = PRESETS[name]
    assert config.query_scale == pytest.approx(query_scale)
    assert config.rope("global") == rope and config.sliding_window == window
    assert sliding_rope is None or config.rope("sliding") == sliding_rope
    found = [i for i, kind in enumerate(config.layer_types) if kind == "global"]
    assert found == list(global_layers)
    assert (config.attention_softcap, config.final_softcap) == (
        (50.0, 30.0) if name.startswith("gemma-2-") else (None, None)
    )


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


def test_multimodal_configurations_give_their_language_model():
    text = GEMMA3_VISION | TINY
    outer = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    assert plain(GemmaConfig.from_hf(outer)) == plain(GemmaConfig.from_hf(text))


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
        (GEMMA1 | {"num_key_value_heads": 3}, "num_attention_heads"),
        (GEMMA1 | {"head_dim": 7}, "head_dim"),
        (GEMMA2 | {"num_hidden_layers": "many"}, "valid gemma2 configuration"),
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
    assert GemmaConfig.from_json(config.to_json()) == config
    changed = config.with_memory(rule="linear", segment_length=512, local_attention="segment")
    assert changed.memory == MemoryConfig("linear", "segment", 512)
    assert (config.memory.reach, changed.memory.reach) == (2048, 512)


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"family": "gemma", "surprise": 1}'])
def test_other_json_is_no_configuration(text):
    with pytest.raises(InputError, match="convert the model again"):
        GemmaConfig.from_json(text)


@pytest.mark.parametrize(
    "changes",
    [{"segment_length": 0}, {"local_attention": "global"}, {"write_gate": "hard"}],
    ids=str,
)
def test_memory_settings_out_of_range(changes):
    with pytest.raises(UsageError):
        PRESETS["gemma-2b"].with_memory(**changes)
    with pytest.raises(UsageError, match="dtype"):
        dataclasses.replace(PRESETS["gemma-2b"], dtype="int8")
