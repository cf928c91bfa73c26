"""Local attention: pure functions.

Every query sees a window of the stream [history P | slots] (see `gemma_jax.model.state`), causally;
sliding layers see the last W tokens of it; recurrent layers also see the sink, the text's first
token, once it has left the window. Positions count from the sink (0) through the history (1 to P),
so they stay small whatever was read.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gemma_jax.config import Rope
from gemma_jax.model import determinism, kernels
from gemma_jax.model.kernels.lookup import Lookup
from gemma_jax.model.rope import rope_rows, rope_table, rotate
from gemma_jax.model.state import Span

Heads = Float[Array, "B T H C"]
KVHeads = Float[Array, "B J K C"]
Tables = tuple[Array | np.ndarray, Array | np.ndarray]  # cosines and sines
MASKED = -1e30
CUDNN_KEY_MULTIPLE = 64


def attend(
    q: Heads,
    k: KVHeads,
    v: KVHeads,
    mask: Bool[Array, "B T J"],
    *,
    scale: float,
    softcap: float | None,
    use_cudnn: bool = False,
) -> Heads:
    """Softmax attention of T queries over J keys, of which `mask` tells the visible ones."""
    mask = mask[:, None]
    if use_cudnn:
        pad = -k.shape[1] % CUDNN_KEY_MULTIPLE
        k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (k, v))
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, pad)))
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn")
    if softcap is None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="xla")
    batch, length, heads, dim = q.shape
    grouped = (q * scale).reshape(batch, length, k.shape[2], -1, dim)
    scores = jnp.einsum("BTKGC,BJKC->BKGTJ", grouped, k, preferred_element_type=jnp.float32)
    scores = softcap * jnp.tanh(scores / softcap)
    weights = jax.nn.softmax(jnp.where(mask[:, :, None], scores, MASKED)).astype(v.dtype)
    return jnp.einsum("BKGTJ,BJKC->BTKGC", weights, v).reshape(batch, length, heads, dim)


def cudnn_takes(head_dim: int) -> bool:
    """Whether cuDNN's attention runs here: from Ampere on, heads wider than 128 from Hopper on."""
    if determinism.is_asked():
        return False
    return kernels.compute_capability() >= (kernels.HOPPER if head_dim > 128 else kernels.AMPERE)


def local_attention(
    q: Heads,
    keys: Float[Array, "B L K C"],
    values: Float[Array, "B L K C"],
    sink: tuple[KVHeads, KVHeads] | None,
    span: Span,
    lookup: Lookup | None = None,
    *,
    history: int,
    window: int | None,
    rope: Rope,
    scale: float,
    softcap: float | None,
) -> Heads:
    """Attention of the slots over the streams of keys and values, neither of them rotated yet.

    Args:
        q: queries of the span's slots.
        keys, values: streams [history P | slots] as `state.lay` makes them.
        sink: key and value [B, 1, K, C] of the text's first token, or None.
        span: where the slots stand.
        lookup: a memory that is read too, if `segment_kernel_takes` the rest.
        history: P.
        window: W of a sliding layer, None elsewhere.
    """
    end = keys.shape[1] + 1
    rows = functools.partial(rope_rows, rope, q.shape[-1], end)
    keys = rotate(keys, *rows(1, end))
    if span.whole_segments:
        tables = rows(history + 1, history + 1 + span.slots)
    else:
        positions = jnp.arange(span.slots) + history + 1
        positions = jnp.minimum(positions + span.fill[:, None], keys.shape[1])
        tables = tuple(jnp.asarray(table)[positions] for table in rows(0, end))
    if sink is not None:
        # The sink stands just before the window, for each of the windows.
        at = np.arange(span.num_segments) * span.segment_length
        sink = rotate(sink[0].repeat(len(at), 1), *(table[at] for table in rows(0, end))), sink[1]

    options = {"tables": tables, "history": history, "scale": scale}
    if lookup is not None:
        return _attention_by_kernel(q, keys, values, sink, span, lookup, **options)
    only = {"window": window, "softcap": softcap}
    attention = functools.partial(_attention_by_masks, **only, **options)
    if segment_kernel_takes(q, span, has_sink=sink is not None, history=history, **only):
        kernel = functools.partial(_attention_by_kernel, **options)
        attention = kernels.with_gradient_of(attention, kernel)
    return attention(q, keys, values, sink, span)


def _attention_by_masks(
    q: Heads,
    keys: Array,
    values: Array,
    sink: tuple[Float[Array, "B N K C"], KVHeads] | None,
    span: Span,
    *,
    tables: Tables,
    history: int,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Heads:
    """Attention of each segment over its window cut out of the streams; `tables` rotate the queries."""
    q = rotate(q, *tables)
    starts = [n * span.segment_length for n in range(span.num_segments)]
    if span.whole_segments:
        length = history + span.segment_length
        q = q.reshape(-1, span.segment_length, *q.shape[2:])
        windows = [_windows(x, span, history) for x in (keys, values)]
    else:
        length = keys.shape[1]
        windows = [keys, values]
    mask = _window_mask(span, jnp.asarray(starts), length, history, window)
    if sink is not None:
        sink_keys, sink_values = sink[0], sink[1].repeat(len(starts), 1)
        fold = (-1, 1, *sink_keys.shape[2:])
        windows = [
            jnp.concatenate([first.reshape(fold), rest], axis=1)
            for first, rest in zip((sink_keys, sink_values), windows, strict=True)
        ]
        gone = jnp.broadcast_to(
            _sink_is_seen(span, history).reshape(-1, 1, 1), (*mask.shape[:2], 1)
        )
        mask = jnp.concatenate([gone, mask], axis=2)
    use_cudnn = (
        span.whole_segments
        and q.dtype == jnp.bfloat16
        and softcap is None
        and cudnn_takes(q.shape[-1])
    )
    out = attend(q, *windows, mask, scale=scale, softcap=softcap, use_cudnn=use_cudnn)
    return out.reshape(-1, span.slots, *out.shape[2:])


def segment_kernel_takes(
    q: Heads,
    span: Span,
    *,
    has_sink: bool,
    history: int,
    window: int | None,
    softcap: float | None,
    **_: Any,
) -> bool:
    """Whether whole segments attend by a kernel."""
    plain = (window, softcap, q.dtype) == (None, None, jnp.bfloat16) and has_sink
    if not (plain and span.whole_segments and kernels.wanted()):
        return False
    from gemma_jax.model.kernels import attention as kernel

    return kernel.takes(span.segment_length, history, q.shape[-1])


def _attention_by_kernel(
    q: Heads,
    keys: Array,
    values: Array,
    sink: tuple[Float[Array, "B N K C"], KVHeads],
    span: Span,
    lookup: Lookup | None = None,
    *,
    tables: Tables,
    history: int,
    scale: float,
) -> Heads:
    """The same without cutting and masking; with `lookup`, memory is read too."""
    from gemma_jax.model.kernels import attention as kernel

    return kernel.segment_attention(
        q,
        keys,
        values,
        *tables,
        sink[0],
        sink[1][:, 0],
        span.past,
        lookup,
        segment_length=span.segment_length,
        scale=scale,
    )


def decoding_kernel_takes(q: Heads, keys: KVHeads, span: Span) -> bool:
    """Whether `attention_of_one` can be used for such a step."""
    if span.slots != 1 or span.whole_segments or q.dtype != jnp.bfloat16 or not kernels.wanted():
        return False
    from gemma_jax.model.kernels import decode as kernel

    return kernel.takes(keys.shape[1], q.shape[2] // keys.shape[2], q.shape[3])


def attention_of_one(
    q: Heads,
    keys: Float[Array, "B L K C"],
    values: Float[Array, "B L K C"],
    sink: tuple[KVHeads, KVHeads] | None,
    span: Span,
    lookup: Lookup | None = None,
    *,
    history: int,
    window: int | None,
    rope: Rope,
    scale: float,
    softcap: float | None,
) -> Heads:
    """`local_attention` of one new token a row by kernels; with `lookup`, memory is read too."""
    from gemma_jax.model.kernels import decode as kernel

    cosine, sine = map(jnp.asarray, rope_table(rope, q.shape[-1], keys.shape[1] + 1))
    out = kernel.attend(
        q[:, 0],
        keys,
        values,
        (keys, values) if sink is None else sink,  # without one, nothing of it is seen
        seen_by_one(span, history, window, has_sink=sink is not None),
        cosine,
        sine,
        lookup,
        scale=scale,
        softcap=softcap,
    )
    return out[:, None]


def seen_by_one(
    span: Span, history: int, window: int | None, *, has_sink: bool
) -> Int[Array, "B 3"]:
    """What the one new token of each row sees: the first key of its window, the last, and the sink."""
    last = history + span.fill
    first = jnp.maximum(history - span.past, 0)
    if window is not None:
        first = jnp.maximum(first, last - window + 1)
    sees_sink = jnp.zeros_like(last)
    if has_sink:
        sees_sink = _sink_is_seen(span, history)[:, 0].astype(jnp.int32)
    return jnp.stack([first, last, sees_sink], axis=1)


def _sink_is_seen(span: Span, history: int) -> Bool[Array, "B N"]:
    """By segment: whether the first token has left the window, and is seen as the sink."""
    return span.past[:, None] + jnp.arange(span.num_segments) * span.segment_length > history


def _windows(stream: Float[Array, "B L K C"], span: Span, history: int) -> Array:
    """Overlapping windows of a stream, one per segment, folded into the batch: [B*N, P + S, K, C].

    A few slices of the whole stream, as one for each segment takes long to compile.
    """
    length = span.segment_length

    def segments(start: int) -> Array:
        """The segments of the stream's slots from `start` on: [B, N, S, K, C]."""
        slots = stream[:, start : start + span.slots]
        return slots.reshape(-1, span.num_segments, length, *stream.shape[2:])

    before = [segments(at)[:, :, : history - at] for at in range(0, history, length)]
    windows = jnp.concatenate([*before, segments(history)], axis=2)
    return windows.reshape(-1, *windows.shape[2:])


def _window_mask(
    span: Span, starts: Array, length: int, history: int, window: int | None
) -> Bool[Array, "BN T J"]:
    """Which keys of its window a query sees: those before it, not too far, and not before the text."""
    key = jnp.arange(length)
    query = history + jnp.arange(min(span.slots, span.segment_length))
    query = query if span.whole_segments else query + span.fill[:, None, None]  # else [B, 1, T]
    distance = jnp.expand_dims(query, -1) - key
    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    real = key + starts[:, None] >= (history - span.past)[:, None, None]  # [B, N, J]
    mask = visible & real[:, :, None, :]
    return mask.reshape(-1, *mask.shape[2:])
