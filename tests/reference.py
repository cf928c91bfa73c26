"""What the tests compare with: tiny models, and Gemma written once more in NumPy, in float64.

`NumpyGemma` shares nothing with the package but the parameter tree. It works on a whole text, layer
by layer and segment by segment, with explicit lists of the tokens that are visible, and writes memory
one token or one segment at a time as the papers' equations read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import gemma_jax
from gemma_jax.config import GLOBAL, SLIDING, GemmaConfig, MemoryConfig, Rope

RULES = ("off", "linear", "delta", "gated_delta", "selective_delta", "slots")
FORMS = ("transformer_xl", "segment")


def tiny_config(**changes: Any) -> GemmaConfig:
    """A float32 model with every feature switched on: two KV heads, a sliding layer, all norms."""
    config = GemmaConfig(
        family="gemma3_text",
        vocab_size=41,
        width=20,
        mlp_dim=36,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        layer_types=(GLOBAL, SLIDING, GLOBAL),
        query_scale=0.3,
        global_rope=Rope(100_000.0, factor=2.0),
        sliding_rope=Rope(10_000.0),
        sliding_window=5,
        qk_norm=True,
        post_norms=True,
        dtype="float32",
        memory=MemoryConfig(segment_length=8, slots=13),
    )
    memory = {key: changes.pop(key) for key in list(changes) if key in _MEMORY_FIELDS}
    return dataclasses.replace(config, **changes).with_memory(**memory)


_MEMORY_FIELDS = {field.name for field in dataclasses.fields(MemoryConfig)}


def random_params(config: GemmaConfig, seed: int = 0, scale: float = 0.4) -> dict[str, Any]:
    """Parameters large enough for logits that matter: matrices N(0, scale), norms N(0, 0.3)."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        name, memory = path[-1].key, any(part.key == "memory" for part in path)
        spread = 1.0 if memory or name == "embedding" else 0.3 if name == "scale" else scale
        return jax.numpy.asarray(rng.normal(0.0, spread, leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(draw, gemma_jax.abstract_params(config))


def random_tokens(config: GemmaConfig, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape).astype(np.int32)


def all_logits(params: Any, tokens: np.ndarray, config: GemmaConfig, **options: Any) -> np.ndarray:
    """Logits [B, T, V] of a new text, read at once."""
    state = gemma_jax.init_state(config, tokens.shape[0])
    hidden, _ = gemma_jax.forward(params, tokens, state, config=config, **options)
    return np.asarray(gemma_jax.logits(params, hidden, config=config))


class NumpyGemma:
    """Gemma with local attention, sink and memory, for one text, in float64."""

    def __init__(self, params: Mapping[str, Any], config: GemmaConfig):
        self.params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), dict(params))
        self.config = config
        self.memories: dict[int, dict[str, np.ndarray]] = {}  # by layer, after the last call

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits [T, V] of a text [T]; leaves what was written in `memories`."""
        config, embedder = self.config, self.params["embedder"]
        x = embedder["embedding"][tokens] * np.sqrt(config.width)
        for i, kind in enumerate(config.layer_types):
            p = self.params[f"layers_{i}"]
            y = self.attention(i, kind, self.norm(p["pre_attention_norm"], x))
            x = x + (self.norm(p["post_attention_norm"], y) if config.post_norms else y)
            gate, up = np.split(self.norm(p["pre_mlp_norm"], x) @ p["mlp"]["gate_up"].T, 2, axis=-1)
            y = gelu(gate) * up @ p["mlp"]["down"].T
            x = x + (self.norm(p["post_mlp_norm"], y) if config.post_norms else y)
        head = embedder["embedding"] if config.tied_embeddings else embedder["head"]
        logits = self.norm(self.params["final_norm"], x) @ head.T
        cap = config.final_softcap
        return logits if cap is None else cap * np.tanh(logits / cap)

    def read_memory(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """The memory of a model of one layer after a text [T], without what attention makes of it."""
        config, p = self.config, self.params["layers_0"]
        x = self.params["embedder"]["embedding"][tokens] * np.sqrt(config.width)
        x = self.norm(p["pre_attention_norm"], x)
        p, length = p["attention"], config.memory.segment_length
        _, k, v = self.project(p, x)
        memory = make_memory(config, p.get("memory", {}))
        sight = 1 if config.memory.local_attention == "segment" else 2
        for start in range(0, len(x) // length * length - (sight - 1) * length, length):
            memory.write(*(y[start : start + length] for y in (x, k, v)))
        return memory.arrays

    def project(self, p: Mapping[str, np.ndarray], x: np.ndarray) -> tuple[np.ndarray, ...]:
        """Queries, keys and values [T, heads, C]."""
        config = self.config
        heads, kv_heads = config.num_heads, config.num_kv_heads
        q, k, v = np.split(
            (x @ p["qkv"].T).reshape(len(x), -1, config.head_dim), [heads, heads + kv_heads], axis=1
        )
        if config.qk_norm:
            q, k = self.norm(p["query_norm"], q), self.norm(p["key_norm"], k)
        return q, k, v

    def norm(self, p: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config.norm_eps) * (1 + p["scale"])

    def attention(self, layer: int, kind: str, x: np.ndarray) -> np.ndarray:
        config, p = self.config, self.params[f"layers_{layer}"]["attention"]
        length = config.memory.segment_length
        sight = 1 if config.memory.local_attention == "segment" else 2  # segments that are visible
        q, k, v = self.project(p, x)
        memory = make_memory(config, p.get("memory", {})) if kind == GLOBAL else None
        out = np.zeros_like(q)
        for start in range(0, len(x), length):
            segment = range(start, min(start + length, len(x)))
            if memory:  # what left sight was written before; reads see nothing newer
                leaves = start - sight * length
                if leaves >= 0:
                    old = slice(leaves, leaves + length)
                    memory.write(x[old], k[old], v[old])
            for t in segment:
                out[t] = self.attend(kind, q[t], k, v, t, start)
            if memory:
                for t in segment:
                    out[t] = memory.read(q[t], out[t])
        if memory:
            leaves = (
                len(x) // length - sight
            ) * length  # that the last complete segment pushed out
            if leaves >= 0 and leaves + length > memory.tokens:
                old = slice(leaves, leaves + length)
                memory.write(x[old], k[old], v[old])
            self.memories[layer] = memory.arrays
        return out.reshape(len(x), -1) @ p["out"].T

    def attend(
        self, kind: str, q: np.ndarray, k: np.ndarray, v: np.ndarray, t: int, start: int
    ) -> np.ndarray:
        """What the query [H, C] of token t, whose segment begins at `start`, sees."""
        config = self.config
        if kind == SLIDING:
            visible = list(range(max(0, t - config.sliding_window + 1), t + 1))
            places = list(visible)
        else:
            xl = config.memory.local_attention == "transformer_xl"
            first = max(0, start - config.memory.segment_length) if xl else start
            visible = list(range(first, t + 1))
            places = list(visible)
            if first > 0 and config.memory.sink:
                visible, places = [0, *visible], [first - 1, *places]
        rope, group = config.rope(kind), config.num_heads // config.num_kv_heads
        keys = np.repeat(rotate(k[visible], np.array(places), rope), group, axis=1)  # [J, H, C]
        values = np.repeat(v[visible], group, axis=1)
        q = rotate(q[None], np.array([t]), rope)[0]
        scores = np.einsum("hc,jhc->hj", q, keys) * config.query_scale
        if cap := config.attention_softcap:
            scores = cap * np.tanh(scores / cap)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("hj,jhc->hc", weights / weights.sum(-1, keepdims=True), values)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rotate(x: np.ndarray, positions: np.ndarray, rope: Rope) -> np.ndarray:
    """x [T, heads, C] turned by its positions [T]."""
    half = x.shape[-1] // 2
    angle = positions[:, None] / rope.factor * rope.theta ** (-np.arange(half) / half)
    cosine, sine = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def make_memory(config: GemmaConfig, p: Mapping[str, np.ndarray]) -> Any:
    kinds = {
        "linear": PaperMemory,
        "delta": PaperMemory,
        "gated_delta": GatedDeltaMemory,
        "selective_delta": SelectiveDeltaMemory,
        "slots": SlotsMemory,
    }
    kind = kinds.get(config.memory.rule)
    return kind(config, p) if kind else None


class PaperMemory:
    """Infini-attention's memory, Linear and Linear + Delta, one head after the other."""

    def __init__(self, config: GemmaConfig, p: Mapping[str, np.ndarray]):
        self.config, self.p, self.tokens = config, p, 0
        kv_heads, dim = config.num_kv_heads, config.head_dim
        self.arrays = {"M": np.zeros((kv_heads, dim, dim)), "z": np.zeros((kv_heads, dim))}

    @staticmethod
    def features(x: np.ndarray) -> np.ndarray:
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))  # ELU + 1

    def write(self, x: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        matrix, total = self.arrays["M"], self.arrays["z"]
        before, total_before = matrix.copy(), total.copy()
        for t in range(len(k)):
            for h in range(k.shape[1]):
                phi, value = self.features(k[t, h]), v[t, h]
                if self.config.memory.rule == "delta" and total_before[h].any():
                    value = value - phi @ before[h] / (phi @ total_before[h])
                matrix[h] += np.outer(phi, value)
                total[h] += phi
        self.tokens += len(k)

    def read(self, q: np.ndarray, attended: np.ndarray) -> np.ndarray:
        matrix, total, out = self.arrays["M"], self.arrays["z"], np.zeros_like(attended)
        for head in range(len(q)):
            h = head * self.config.num_kv_heads // len(q)
            phi, weight = self.features(q[head]), sigmoid(self.p["gate"][head])
            found = phi @ matrix[h] / (phi @ total[h]) if total[h].any() else 0.0
            out[head] = weight * found + (1 - weight) * attended[head]
        return out


class GatedDeltaMemory:
    """The delta rule one token after the other, with a write gate."""

    def __init__(self, config: GemmaConfig, p: Mapping[str, np.ndarray]):
        self.config, self.p, self.tokens = config, p, 0
        kv_heads, dim = config.num_kv_heads, config.head_dim
        self.arrays = {
            "M": np.zeros((kv_heads, dim, dim)),
            "written": np.zeros(kv_heads),
            "offered": np.zeros(kv_heads),
        }

    def write(self, x: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        logits = x @ self.p["write_kernel"] + self.p["write_bias"]
        if self.config.memory.write_gate == "sigmoid":
            gates = sigmoid(logits)
        else:
            gates = np.clip(logits / 4 + 0.5, 0, 1)
        self.write_gated(k, v, gates)

    def write_gated(self, k: np.ndarray, v: np.ndarray, gates: np.ndarray) -> None:
        matrix = self.arrays["M"]
        for t in range(len(k)):
            for h in range(k.shape[1]):
                key = k[t, h] / np.sqrt((k[t, h] ** 2).sum() + 1e-6)
                matrix[h] += gates[t, h] * np.outer(key, v[t, h] - key @ matrix[h])
        self.arrays["written"] += gates.sum(0)
        self.arrays["offered"] += len(k)
        self.tokens += len(k)

    def read(self, q: np.ndarray, attended: np.ndarray) -> np.ndarray:
        out = attended.copy()
        for head in range(len(q)):
            h = head * self.config.num_kv_heads // len(q)
            found = q[head] / np.sqrt((q[head] ** 2).sum() + 1e-6) @ self.arrays["M"][h]
            out[head] += self.p["gate"][head] * found / np.sqrt((found**2).mean() + 1e-6)
        return out


class SelectiveDeltaMemory(GatedDeltaMemory):
    """The same, read as it is where a gate of the query opens."""

    def read(self, q: np.ndarray, attended: np.ndarray) -> np.ndarray:
        out = attended.copy()
        for head in range(len(q)):
            h = head * self.config.num_kv_heads // len(q)
            found = q[head] / np.sqrt((q[head] ** 2).sum() + 1e-6) @ self.arrays["M"][h]
            opens = sigmoid(q[head] @ self.p["read_kernel"][head] + self.p["read_bias"][head])
            out[head] += self.p["gate"][head] * opens * found
        return out


class SlotsMemory:
    """A list of tokens per head, from which the one with the lowest score goes when it is too long."""

    def __init__(self, config: GemmaConfig, p: Mapping[str, np.ndarray]):
        self.config, self.p, self.tokens = config, p, 0
        self.kept = [[] for _ in range(config.num_kv_heads)]  # (score, key, value)
        self.written, self.offered = np.zeros((2, config.num_kv_heads))

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """With empty slots in front."""
        count, heads, dim = self.config.memory.slots, self.config.num_kv_heads, self.config.head_dim
        score = np.full((heads, count), -1e4)
        key, value = np.zeros((2, heads, count, dim))
        for h, kept in enumerate(self.kept):
            for n, token in zip(range(count - len(kept), count), kept, strict=True):
                score[h, n], key[h, n], value[h, n] = token
        counts = {"written": self.written, "offered": self.offered}
        return {"key": key, "value": value, "score": score, **counts}

    def write(self, x: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        scores = []
        for t in range(len(k)):
            unit = x[t] / np.sqrt((x[t] ** 2).mean() + 1e-6)
            u = unit @ self.p["hidden_kernel"]
            hidden = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
            score = hidden @ self.p["score_kernel"] + unit @ self.p["write_kernel"]
            scores.append(score + self.p["write_bias"])
        for t in range(len(k)):
            score = np.max(scores[max(t - 4, 0) : t + 5], axis=0)  # of it and its neighbours
            for h, kept in enumerate(self.kept):
                kept.append((score[h], k[t, h], v[t, h]))
                if len(kept) > self.config.memory.slots:
                    kept.remove(min(kept, key=lambda token: token[0]))
            self.written += sigmoid(score)
            self.offered += 1
        self.tokens += len(k)

    def read(self, q: np.ndarray, attended: np.ndarray) -> np.ndarray:
        out, rope, scale = attended.copy(), self.config.global_rope, self.config.query_scale
        for head in range(len(q)):
            kept = self.kept[head * self.config.num_kv_heads // len(q)]
            asked = rotate(q[None, head : head + 1], np.array([len(kept) + 63]), rope)[0, 0]
            logits = [q[head] @ self.p["local_kernel"][head] + self.p["local_bias"][head]]
            for n, (score, key, _) in enumerate(kept):
                place = rotate(key[None, None], np.array([n]), rope)[0, 0]
                logit = scale * asked @ place
                if cap := self.config.attention_softcap:
                    logit = cap * np.tanh(logit / cap)
                logits.append(logit + np.log(sigmoid(score)))
            weights = np.exp(logits - np.max(logits))
            weights /= weights.sum()
            change = -weights[1:].sum() * attended[head]
            for weight, (_, _, value) in zip(weights[1:], kept, strict=True):
                change = change + weight * value
            out[head] += self.p["gate"][head] * change
        return out
