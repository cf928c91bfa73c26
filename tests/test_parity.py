"""Logits and greedy text against Hugging Face transformers, from random weights of every family."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import gemma_jax  # noqa: E402
from gemma_jax.checkpoint import huggingface  # noqa: E402

WINDOW = 24  # the models' own sliding window
SHORT, LONG = 15, 70  # prompts below it and above it
TOTAL = 140  # longer than any prompt with its continuation; local attention reaches 2 x 80
NEW_TOKENS = 64

COMMON = {
    "vocab_size": 151,
    "hidden_size": 36,
    "intermediate_size": 52,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "attn_implementation": "eager",
}
GEMMA2 = {"sliding_window": WINDOW, "query_pre_attn_scalar": 10}
MODELS = {
    "gemma-mqa": (
        transformers.GemmaConfig,
        {
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
        },
    ),
    "gemma-mha-untied": (
        transformers.GemmaConfig,
        {
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 10,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        },
    ),
    "gemma2-gqa": (
        transformers.Gemma2Config,
        GEMMA2
        | {
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 8,
        },
    ),
    "gemma2-hard-caps": (
        transformers.Gemma2Config,
        GEMMA2
        | {
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3-mqa": (
        transformers.Gemma3TextConfig,
        {
            "num_hidden_layers": 7,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 6,
        },
    ),
    "gemma3-gqa-scaled-rope": (
        transformers.Gemma3TextConfig,
        {
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 14,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "linear",
                    "factor": 8.0,
                    "rope_theta": 1_000_000.0,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
    ),
}


@functools.cache
def build(name):
    """The reference, our configuration and parameters, and a text [1, TOTAL]."""
    kind, fields = MODELS[name]
    config = kind(**(COMMON | fields))
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for parameter_name, parameter in reference.named_parameters():
            spread = 0.3 if "norm" in parameter_name else 2.0 * parameter.shape[-1] ** -0.5
            parameter.normal_(0.0, spread)
        reference.lm_head.weight.mul_(2.0 if "untied" in name else 1.0)
    ours = gemma_jax.GemmaConfig.from_hf(config.to_dict(), dtype="float32").with_memory(
        segment_length=80
    )
    weights = {key: value.numpy() for key, value in reference.state_dict().items()}
    params = {}
    for entry in huggingface.table(ours):
        node = params
        for key in entry.path[:-1]:
            node = node.setdefault(key, {})
        node[entry.path[-1]] = jnp.asarray(entry.join([weights[n] for n in entry.names]))
    tokens = np.random.default_rng(1).integers(3, COMMON["vocab_size"], (1, TOTAL))
    return reference, ours, params, tokens.astype(np.int32)


def reference_logits(reference, tokens):
    with torch.no_grad():
        return reference(torch.from_numpy(np.asarray(tokens)).long()).logits.numpy()


def agree(found, expected):
    limit = 1e-4 * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=limit)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_reference(name):
    reference, config, params, tokens = build(name)
    expected = reference_logits(reference, tokens)
    assert expected.std() >= 1.0
    state = gemma_jax.init_state(config)
    hidden, _ = gemma_jax.forward(params, tokens, state, config=config)
    agree(gemma_jax.logits(params, hidden, config=config), expected)


@pytest.mark.parametrize("name", MODELS)
def test_piece_by_piece_equals_the_reference(name):
    reference, config, params, tokens = build(name)
    expected = reference_logits(reference, tokens)[0]
    state, at = gemma_jax.init_state(config), 0
    for size in (1, 30, 7, 30, 30, 30, 12):
        piece = np.zeros((1, 30), np.int32)
        piece[:, :size] = tokens[:, at : at + size]
        logits, state = gemma_jax.prefill(
            params, piece, state, config=config, lengths=np.array([size], np.int32)
        )
        at += size
        agree(logits[0], expected[at - 1])
    assert at == TOTAL


@pytest.mark.parametrize("prompt", [SHORT, LONG], ids=["below the window", "above the window"])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_equals_the_reference(name, prompt):
    reference, config, params, tokens = build(name)
    padded = np.zeros((1, LONG), np.int32)
    padded[:, :prompt] = tokens[:, :prompt]
    logits, state = gemma_jax.prefill(
        params,
        padded,
        gemma_jax.init_state(config),
        config=config,
        lengths=np.array([prompt], np.int32),
    )
    found, counts, _, _ = gemma_jax.decode_block(
        params,
        logits,
        state,
        config=config,
        sampling=gemma_jax.Greedy(),
        key=jax.random.key(0),
        num_tokens=NEW_TOKENS,
    )
    assert counts.tolist() == [NEW_TOKENS]
    with torch.no_grad():
        expected = reference.generate(
            torch.from_numpy(tokens[:, :prompt]).long(),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )[0, prompt:].tolist()
    assert found[0].tolist() == expected


def test_beyond_local_reach_it_is_another_model():
    """That local attention is at work at all: short segments change what comes after them."""
    reference, config, params, tokens = build("gemma3-mqa")
    config = config.with_memory(segment_length=8)
    state = gemma_jax.init_state(config)
    hidden, _ = gemma_jax.forward(params, tokens, state, config=config)
    found = np.asarray(gemma_jax.logits(params, hidden, config=config))[0]
    expected = reference_logits(reference, tokens)[0]
    agree(found[:16], expected[:16])
    assert np.abs(found[16:] - expected[16:]).max() > 0.1
