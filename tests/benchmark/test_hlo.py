"""Compiled loops are searched for instructions that move whole weights; decoding has none."""

import jax
import jax.numpy as jnp
import pytest
from reference import random_params, tiny_config

import gemma_jax
from gemma_jax.benchmark.hlo import weight_moves
from gemma_jax.config import GLOBAL, SLIDING

MODULE = """
HloModule m

%turn (p: f32[3,5]) -> f32[5,3] {
  %p = f32[3,5]{1,0} parameter(0)
  ROOT %t = f32[5,3]{1,0} transpose(%p), dimensions={1,0}
}

%sum (p: f32[3,5]) -> f32[5] {
  %p = f32[3,5]{1,0} parameter(0)
  %t = f32[5,3]{1,0} transpose(%p), dimensions={1,0}
  ROOT %r = f32[5]{0} reduce(%t), to_apply=%add
}

%window (p: f32[9,5]) -> f32[15] {
  %p = f32[9,5]{1,0} parameter(0)
  %s = f32[3,5]{1,0} slice(%p), slice={[0:3], [0:5]}
  ROOT %b = f32[15]{0} bitcast(%s)
}

%inner (p: f32[3,5]) -> f32[3,5] {
  %p = f32[3,5]{1,0} parameter(0)
  ROOT %copied = f32[3,5]{0,1:T(8)} copy(%p)
}

%body (w: (s32[], f32[3,5])) -> (s32[], f32[3,5]) {
  %w = (s32[], f32[3,5]{1,0}) parameter(0)
  %g = f32[3,5]{1,0} get-tuple-element(%w), index=1
  %turned = f32[5,3]{1,0} fusion(%g), kind=kLoop, calls=%turn
  %summed = f32[5]{0} fusion(%g), kind=kInput, calls=%sum
  %cut = f32[15]{0} fusion(%stack), kind=kLoop, calls=%window
  %small = f32[3,4]{1,0} slice(%g), slice={[0:3], [0:4]}
  %start = (f32[3,5]{1,0}, f32[3,5]{1,0}, u32[]) copy-start(%g)
  %called = f32[3,5]{1,0} call(%g), to_apply=%inner
  %either = f32[3,5]{1,0} conditional(%i, %g, %g), branch_computations={%inner, %other}
  ROOT %out = (s32[], f32[3,5]{1,0}) tuple(%i, %g)
}

ENTRY %main (w: f32[3,5]) -> f32[3,5] {
  %w = f32[3,5]{1,0} parameter(0)
  %outside = f32[3,5]{0,1} copy(%w)
  ROOT %loop = (s32[], f32[3,5]{1,0}) while(%w), condition=%cond, body=%body
}
"""


def test_a_vector_is_no_matrix():
    assert weight_moves(MODULE, {"w": jnp.zeros((15, 1)), "b": jnp.zeros(15)}) == []


def test_what_a_loop_moves_is_found_once_wherever_it_stands():
    found = weight_moves(MODULE, {"w": jnp.zeros((3, 5)), "b": jnp.zeros(12)})
    names = [line.partition(" =")[0].removeprefix("ROOT ") for line in found]
    assert sorted(names) == ["%copied", "%cut", "%start", "%turned"]
    state = {"keys": jnp.zeros((5, 1, 3)), "memory": jnp.zeros(15)}
    assert weight_moves(MODULE, {"w": jnp.zeros((3, 5))}, state) == []


@pytest.mark.parametrize("stacked", [True, False])
def test_layers_cut_out_of_a_stack_are_found_in_what_this_compiler_makes(stacked):
    weights = jnp.ones((4, 24, 24)) if stacked else [jnp.ones((24, 24)) for _ in range(4)]

    @jax.jit
    def loop(x, weights):
        def layer(x, weight):
            return jnp.tanh(weight @ x), None

        def step(x, _):
            return jax.lax.scan(layer, x, weights)[0] if stacked else apart(x), None

        def apart(x):
            for weight in weights:
                x, _ = layer(x, weight)
            return x

        return jax.lax.scan(step, x, None, length=7)[0]

    text = loop.lower(jnp.ones(24), weights).compile().as_text()
    moves = weight_moves(text, {"w": jnp.zeros((24, 24))})
    assert bool(moves) == stacked, moves


@pytest.mark.parametrize("rule", ["off", "linear", "gated_delta"])
@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_moves_no_weights(rule, batch):
    config = tiny_config(
        rule=rule, width=28, mlp_dim=52, vocab_size=97, layer_types=(GLOBAL, SLIDING)
    )
    params = random_params(config)
    program = gemma_jax.decode_block.lower(
        params,
        jnp.zeros((batch, config.vocab_size)),
        gemma_jax.init_state(config, batch),
        config=config,
        sampling=gemma_jax.Greedy(),
        key=jax.random.key(0),
        num_tokens=5,
    ).compile()
    assert " while(" in program.as_text()
    state = gemma_jax.init_state(config, batch)
    assert weight_moves(program.as_text(), params, state) == []
