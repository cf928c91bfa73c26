"""Cross-entropy over a large vocabulary, with the logits of a few thousand tokens at a time."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LOSS_ROWS = 4096  # tokens whose logits exist at once; a row of 256,000 takes 1 MB


def cross_entropy(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    *,
    softcap: float | None = None,
    rows: int = LOSS_ROWS,
) -> tuple[Float[Array, ""], Float[Array, " N"], Bool[Array, " N"]]:
    """Weighted sum of -log p(target) in nats, with the logits of `rows` tokens at a time.

    Products have operands of `hidden`'s dtype and float32 sums. The gradient is computed along with the
    loss, so that no logits are kept or computed twice; that of `head` is summed in float32.

    Returns:
        The sum, which alone has a gradient; and token by token, -log p(target) and whether the target
        was the likeliest.
    """
    slices = max(-(-hidden.shape[0] // rows), 1)
    pad = slices * rows - hidden.shape[0] if slices > 1 else 0

    def cut(x: Array) -> Array:
        return jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)).reshape(slices, -1, *x.shape[1:])

    loss, nll, hits = _cross_entropy(softcap, cut(hidden), head, cut(targets), cut(weights))
    return loss, *(x.reshape(-1)[: hidden.shape[0]] for x in (nll, hits))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(
    softcap: float | None, hidden: Array, head: Array, targets: Array, weights: Array
) -> tuple[Array, Array, Array]:
    """Of slices [n, rows, ...]."""
    head = head.astype(hidden.dtype)

    def step(total: Array, part: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        hidden, targets, weights = part
        loss, each = _loss(softcap, _product("RD,VD->RV", hidden, head), targets, weights)
        return total + loss, each

    total, each = jax.lax.scan(step, jnp.float32(0), (hidden, targets, weights))
    return total, *each


def _loss_and_gradients(softcap, hidden, head, targets, weights):
    small = head.astype(hidden.dtype)

    def step(carry, part):
        total, of_head = carry
        hidden, targets, weights = part
        scores = _product("RD,VD->RV", hidden, small)
        (loss, each), slope = jax.value_and_grad(functools.partial(_loss, softcap), has_aux=True)(
            scores, targets, weights
        )
        slope = slope.astype(hidden.dtype)
        of_hidden = _product("RV,VD->RD", slope, small).astype(hidden.dtype)
        return (total + loss, of_head + _product("RV,RD->VD", slope, hidden)), (of_hidden, each)

    start = (jnp.float32(0), jnp.zeros(head.shape, jnp.float32))
    (total, of_head), (of_hidden, each) = jax.lax.scan(step, start, (hidden, targets, weights))
    return (total, *each), (of_hidden, of_head.astype(head.dtype))


def _scale_gradients(softcap, gradients, slopes):
    of_hidden, of_head = ((slopes[0] * x).astype(x.dtype) for x in gradients)
    return of_hidden, of_head, None, None


_cross_entropy.defvjp(_loss_and_gradients, _scale_gradients)


def _loss(
    softcap: float | None, scores: Array, targets: Array, weights: Array
) -> tuple[Array, tuple[Array, Array]]:
    """Weighted sum of -log p(target); and each, with whether it was the likeliest."""
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    # Not a gather, whose gradient would be a scatter into all logits.
    is_target = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) == targets[:, None]
    right = jnp.sum(jnp.where(is_target, scores, 0.0), axis=-1)
    nll = jax.nn.logsumexp(scores, axis=-1) - right
    return jnp.sum(weights * nll), (nll, right >= jnp.max(scores, axis=-1))


def _product(subscripts: str, x: Array, y: Array) -> Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)
