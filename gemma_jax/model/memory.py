"""The memory rules by name, and how layers use them.

Ours are `off`, `linear`, `delta`, `gated_delta` and `selective_delta`, which keep a matrix, and `slots`,
which keeps tokens; a rule of your own lives in your own file and is named `path/to/file.py:ClassName`
wherever a rule's name is asked for.
"""

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gemma_jax.config import GLOBAL, GemmaConfig
from gemma_jax.errors import GemmaError, UsageError
from gemma_jax.model.delta import EPS, delta_map, einsum, inverse_length, matrix_einsum
from gemma_jax.model.kernels.lookup import Lookup
from gemma_jax.model.rule import Features, Memory, MemoryRule, Parameter, Params, WriteGate
from gemma_jax.model.slots import Slots


def elu_plus_one(x: Array) -> Array:
    """Positive features of linear attention (Katharopoulos et al. 2020, equation 7)."""
    return jax.nn.elu(x.astype(jnp.float32)) + 1.0


class Linear(MemoryRule):
    """Compressive memory of Infini-attention (Munkhdalai et al. 2024, equations 3, 4 and 6).

    M += phi(K)^T V, z += sum phi(k); a read is phi(q) M / (phi(q) z), 0 while z is 0, and enters with
    weight sigmoid(gate) per query head, local attention with 1 - sigmoid(gate).
    """

    def params(self) -> dict[str, Parameter]:
        return {"gate": Parameter((self.config.num_heads,), ("heads",))}

    def init(self, batch_size: int) -> Memory:
        dim = self.config.head_dim
        return {"M": self.zeros(batch_size, dim, dim), "z": self.zeros(batch_size, dim)}

    def read(self, p, memory, q, attended):
        phi = elu_plus_one(self.grouped(q))
        found = matrix_einsum("BTKGF,BKFC->BTKGC", phi, memory["M"], rounded_to=q.dtype)
        total = einsum("BTKGF,BKF->BTKG", phi, memory["z"])
        found = _divide(found, total).reshape(attended.shape)
        weight = self.gates(p)["read"][:, None]
        return (weight * found + (1.0 - weight) * attended).astype(attended.dtype)

    def lookup(self, p, memory):
        return Lookup(memory["M"], self.gates(p)["read"], memory["z"])

    def prepare(self, features, mask):
        phi = elu_plus_one(features["key"]) * mask[..., None, None]
        value = features["value"].astype(jnp.float32)
        return {"M": matrix_einsum("BSKF,BSKC->BKFC", phi, value), "z": phi.sum(axis=1)}

    def write(self, memory, features, mask):
        return {name: memory[name] + features[name] for name in memory}

    def gates(self, p):
        return {"read": jax.nn.sigmoid(p["gate"].astype(jnp.float32))}


class Delta(Linear):
    """Infini-attention's Linear + Delta (equation 5): what memory already answers is not added again.

    The values of a segment lose what memory, as it was before the segment, returns for their keys.
    """

    def prepare(self, features, mask):
        phi = elu_plus_one(features["key"]) * mask[..., None, None]
        return {"phi": phi, "value": features["value"].astype(jnp.float32)}

    def write(self, memory, features, mask):
        phi = features["phi"]
        found = matrix_einsum("BSKF,BKFC->BSKC", phi, memory["M"])
        value = features["value"] - _divide(found, einsum("BSKF,BKF->BSK", phi, memory["z"]))
        return {
            "M": memory["M"] + matrix_einsum("BSKF,BSKC->BKFC", phi, value),
            "z": memory["z"] + phi.sum(axis=1),
        }


class GatedDelta(MemoryRule):
    """Delta rule per token with L2-normalised keys and a write gate per token and KV head.

    M_t = M_{t-1} + w_t k_t (v_t - k_t M_{t-1})^T  (Schlag et al. 2021, equation 24), with the write
    gate w_t = gate(x_t W + b). Reads add g * rms_norm(q M), with g per query head starting at 0, so
    that an untrained memory changes nothing and still has a gradient.
    """

    def params(self) -> dict[str, Parameter]:
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        return {
            "gate": Parameter((heads,), ("heads",)),
            "write_kernel": Parameter((self.config.width, kv_heads), ("embed", "kv_heads")),
            "write_bias": Parameter((kv_heads,), ("kv_heads",)),
        }

    def features(self, p, x, q, k, v):
        gate = self.write_gate(p)
        logit = einsum("BTD,DK->BTK", x.astype(jnp.float32), gate.kernel) + gate.bias
        opened = gate.opened(logit)
        if not gate.hard:
            return {"write": opened}
        # At the ends the gradient is the sigmoid's, so that a closed gate can open again.
        inside, soft = (opened > 0.0) & (opened < 1.0), jax.nn.sigmoid(logit)
        return {"write": jnp.where(inside, opened, soft + jax.lax.stop_gradient(opened - soft))}

    def write_gate(self, p):
        hard = self.config.memory.write_gate != "sigmoid"
        return WriteGate(p["write_kernel"], p["write_bias"], hard)

    def init(self, batch_size: int) -> Memory:
        dim = self.config.head_dim
        return {
            "M": self.zeros(batch_size, dim, dim),
            "written": self.zeros(batch_size),  # sum of the write gates
            "offered": self.zeros(batch_size),  # tokens they were computed for
        }

    def read(self, p, memory, q, attended):
        found = self._find(q, memory["M"])
        found = found * jax.lax.rsqrt(jnp.mean(found**2, axis=-1, keepdims=True) + EPS)
        found = p["gate"].astype(jnp.float32)[:, None] * found.reshape(attended.shape)
        return (attended + found).astype(attended.dtype)

    def _find(
        self, q: Float[Array, "B T H C"], M: Float[Array, "B K C C"]
    ) -> Float[Array, "B T K G C"]:
        """l2_normalize(q) M; the product comes first, so that queries enter it as they are."""
        grouped = self.grouped(q)
        found = matrix_einsum("BTKGF,BKFC->BTKGC", grouped, M, rounded_to=q.dtype)
        return found * inverse_length(grouped)

    def lookup(self, p, memory):
        return Lookup(memory["M"], p["gate"].astype(jnp.float32), eps=EPS)

    def prepare(self, features, mask):
        gate = jnp.where(mask[..., None], features["write"], 0.0)
        keep, add = delta_map(features["key"], features["value"], gate)
        return {"keep": keep, "add": add, "written": gate.sum(axis=1)}

    def write(self, memory, features, mask):
        return {
            "M": matrix_einsum("BKFG,BKGC->BKFC", features["keep"], memory["M"]) + features["add"],
            "written": memory["written"] + features["written"],
            "offered": memory["offered"] + mask.sum(axis=1, dtype=jnp.float32)[:, None],
        }

    def gates(self, p):
        return {"read": p["gate"]}


class SelectiveDelta(GatedDelta):
    """`gated_delta` that reads where a gate per token and query head opens.

    Reads add g * sigmoid(q w + b) * q M, with g starting at 0. What a query finds keeps its size: one
    that matches nothing finds little, where a norm would make it as loud as a match.
    """

    def params(self) -> dict[str, Parameter]:
        heads, dim = self.config.num_heads, self.config.head_dim
        return super().params() | {
            "read_kernel": Parameter((heads, dim), ("heads", "head_dim")),
            "read_bias": Parameter((heads,), ("heads",)),
        }

    def read(self, p, memory, q, attended):
        found = self._find(q, memory["M"])
        logit = einsum("BTHC,HC->BTH", q.astype(jnp.float32), p["read_kernel"]) + p["read_bias"]
        gate = p["gate"] * jax.nn.sigmoid(logit)
        return (attended + gate[..., None] * found.reshape(attended.shape)).astype(attended.dtype)


def lookup_of(rule: MemoryRule, p: Params, memory: Memory) -> Lookup | None:
    """The rule's `lookup`; None if it is not of the class that `read` is of, so says something else."""
    return rule.lookup(p, memory) if _of_one_class(rule, "read", "lookup") else None


def lookup_of_segments(rule: MemoryRule, p: Params, before: Memory) -> Lookup | None:
    """The same of memory at the start of N segments, [N, B, ...]: its arrays are [B, N, ...]."""
    first = lookup_of(rule, p, jax.tree.map(lambda leaf: leaf[0], before))
    if first is None:
        return None

    def of_one(memory: Memory) -> tuple[Array, Array | None]:
        found = rule.lookup(p, memory)
        return found.matrix, found.total

    matrix, total = jax.vmap(of_one, out_axes=1)(before)
    return first.replace(matrix=matrix, total=total)


def write_gate_of(rule: MemoryRule, p: Params) -> WriteGate | None:
    """The rule's `write_gate`, likewise."""
    return rule.write_gate(p) if _of_one_class(rule, "features", "write_gate") else None


def _of_one_class(rule: MemoryRule, *methods: str) -> bool:
    return len({next(kind for kind in type(rule).__mro__ if m in vars(kind)) for m in methods}) == 1


def reads_nothing(rule: MemoryRule) -> bool:
    """Whether local attention is all that a layer with this rule attends to."""
    return type(rule).read is MemoryRule.read


def _divide(found: Array, total: Array) -> Array:
    """found / total, and 0 where total is 0, with a gradient in both cases."""
    empty = total == 0.0
    return jnp.where(empty[..., None], 0.0, found / jnp.where(empty, 1.0, total)[..., None])


RULES: dict[str, type[MemoryRule]] = {
    "off": MemoryRule,
    "linear": Linear,
    "delta": Delta,
    "gated_delta": GatedDelta,
    "selective_delta": SelectiveDelta,
    "slots": Slots,
}


def make_rule(config: GemmaConfig) -> MemoryRule:
    """The rule that `config.memory.rule` names.

    Raises:
        UsageError: no such rule, or the file that should hold it cannot be used.
    """
    return _rule_class(config.memory.rule)(config)


@functools.cache
def _rule_class(name: str) -> type[MemoryRule]:
    if name in RULES:
        return RULES[name]
    path, colon, class_name = name.rpartition(":")
    if not colon:
        raise UsageError(
            f"There is no memory rule {name!r}: choose one of {', '.join(RULES)}, or name your own as"
            " path/to/file.py:ClassName."
        )
    if not Path(path).is_file():
        raise UsageError(f"The memory rule's file {path} does not exist.")
    spec = importlib.util.spec_from_file_location(f"memory_rule_{Path(path).stem}", path)
    try:
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found = getattr(module, class_name)
    except GemmaError:
        raise
    except Exception as error:  # whatever a user's file does when it is run
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"The memory rule {name} cannot be loaded ({reason}).") from error
    if not (isinstance(found, type) and issubclass(found, MemoryRule)):
        raise UsageError(f"{name} is not a memory rule: derive it from gemma_jax.MemoryRule.")
    return found


def init_features(config: GemmaConfig, batch_size: int, length: int) -> Features:
    """Empty buffers [B, length, ...] for what the rule wants to know of each token."""
    rule = make_rule(config)
    p = {name: jnp.zeros(spec.shape) for name, spec in rule.params().items()}

    def features():
        tokens = (batch_size, length)
        x = jnp.zeros((*tokens, config.width), config.dtype)
        q = jnp.zeros((*tokens, config.num_heads, config.head_dim), config.dtype)
        k = jnp.zeros((*tokens, config.num_kv_heads, config.head_dim), config.dtype)
        return rule.features(p, x, q, k, k)

    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(features))


def write_segments(
    rule: MemoryRule, memory: Memory, segments: Features, present: Bool[Array, "N B"]
) -> tuple[Memory, Memory]:
    """Writes segments as if one after the other; rows in which one is not `present` keep theirs exactly.

    Args:
        segments: the rule's features with `key` and `value`: arrays [N, B, S, ...].

    Returns:
        The memory after all of them, and as it was before each: arrays [N, B, ...].
    """
    length = segments["key"].shape[2]
    mask = jnp.broadcast_to(present[..., None], (*present.shape, length))

    with jax.default_matmul_precision("highest"):
        return rule.write_all(memory, jax.vmap(rule.prepare)(segments, mask), mask)


def inspect(params: Any, state: Any, *, config: GemmaConfig) -> dict[int, dict[str, Array]]:
    """What the memory of each layer that has one holds and how it is used.

    Returns:
        By layer index: the read gates [H] (`read`), every array of the memory ([B, K, ...], as the
        rule names them), and `written_share` [B, K] for rules that count what they write.
    """
    rule = make_rule(config)
    found: dict[int, dict[str, Array]] = {}
    for i, (kind, layer) in enumerate(zip(config.layer_types, state.layers, strict=True)):
        if kind != GLOBAL:
            continue
        p = params[f"layers_{i}"]["attention"].get("memory", {})
        found[i] = {**rule.gates(p), **layer.memory}
        if "offered" in layer.memory:
            offered = jnp.maximum(layer.memory["offered"], 1.0)
            found[i]["written_share"] = layer.memory["written"] / offered
    return found
