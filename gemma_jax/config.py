"""What a model is: frozen, hashable configurations, static arguments of functions under `jax.jit`.

`GemmaConfig.from_hf` reads the `config.json` of every published text model of the families Gemma 1,
2 and 3 (old and new spelling, omitted fields) through the configuration classes of transformers.
`PRESETS` holds the published shapes.
"""

import copy
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from gemma_jax.errors import GemmaError, InputError, UsageError

GLOBAL, SLIDING = "global", "sliding"
LOCAL_ATTENTION_FORMS = ("transformer_xl", "segment")
DTYPES = ("bfloat16", "float32")
QUANTIZATIONS = ("int8",)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one kind of layer: angle = position / factor * theta^(-2i/C)."""

    theta: float
    factor: float = 1.0  # linear scaling (position interpolation); 8 in Gemma 3 from 4B up

    def __post_init__(self):
        for name, value in (("rope_theta", self.theta), ("rope factor", self.factor)):
            if not 0 < value < math.inf:
                raise InputError(f"{name} is {value}: it must be a number above 0.")


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """What layers global in the original do with tokens that local attention no longer sees."""

    rule: str = "off"  # a name from gemma_jax.model.memory, or "path/to/file.py:ClassName"
    # "transformer_xl" sees the previous segment and its own, "segment" only its own
    local_attention: str = "transformer_xl"
    segment_length: int = 1024  # S, in tokens
    sink: bool = True  # the text's first token stays visible for ever
    # of gated_delta and selective_delta: "hard_sigmoid" reaches exactly 0, "sigmoid" does not
    write_gate: str = "hard_sigmoid"
    slots: int = 256  # of rule slots: tokens that each KV head keeps
    neighbours: int = 4  # likewise: on each side of a token with a high score, kept for its sake

    def __post_init__(self):
        if self.local_attention not in LOCAL_ATTENTION_FORMS:
            raise UsageError(
                f"local_attention is {self.local_attention!r}: choose one of"
                f" {', '.join(LOCAL_ATTENTION_FORMS)}."
            )
        if self.segment_length < 1:
            raise UsageError(f"segment_length is {self.segment_length}: it must be at least 1.")
        if self.slots < 1:
            raise UsageError(f"slots is {self.slots}: it must be at least 1.")
        if self.neighbours < 0:
            raise UsageError(f"neighbours is {self.neighbours}: it must be at least 0.")
        if self.write_gate not in ("hard_sigmoid", "sigmoid"):
            raise UsageError(f"write_gate is {self.write_gate!r}: choose hard_sigmoid or sigmoid.")

    @property
    def reach(self) -> int:
        """Tokens of the longest text that local attention sees exactly as full attention would."""
        return self.segment_length * (2 if self.local_attention == "transformer_xl" else 1)


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """A Gemma text model. Axis letters are those of the legend in `gemma_jax`."""

    family: str  # "gemma", "gemma2" or "gemma3_text", as Hugging Face names it
    vocab_size: int  # V
    width: int  # D
    mlp_dim: int  # M
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # C
    layer_types: tuple[str, ...]  # "global" or "sliding", one per layer
    query_scale: float  # queries are multiplied by it before the dot with keys
    global_rope: Rope
    sliding_rope: Rope
    sliding_window: int | None = None  # W: a token sees itself and the W - 1 before it
    attention_softcap: float | None = None
    final_softcap: float | None = None
    qk_norm: bool = False
    post_norms: bool = False
    tied_embeddings: bool = True
    norm_eps: float = 1e-6
    bos_id: int = 2
    eos_ids: tuple[int, ...] = (1,)
    dtype: str = "bfloat16"  # of activations and of the carried keys and values
    quantization: str | None = None  # of matrices: "int8", one scale per output
    memory: MemoryConfig = MemoryConfig()
    name: str = "gemma"

    def __post_init__(self):
        sizes = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "intermediate_size": self.mlp_dim,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "num_hidden_layers": self.num_layers,
        }
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"{name} is {size}: it must be at least 1.")
        if unknown := sorted(set(self.layer_types) - {GLOBAL, SLIDING}):
            raise InputError(
                f"layer_types has {', '.join(unknown)}: supported are {GLOBAL}, {SLIDING}."
            )
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_attention_heads ({self.num_heads}) is not a multiple of num_key_value_heads"
                f" ({self.num_kv_heads})."
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim is {self.head_dim}: rotary embedding needs an even number.")
        if SLIDING in self.layer_types and (self.sliding_window or 0) < 1:
            raise InputError(
                f"sliding_window is {self.sliding_window}, but layer_types has sliding layers."
            )
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype is {self.dtype!r}: choose one of {', '.join(DTYPES)}.")
        if self.quantization not in (None, *QUANTIZATIONS):
            raise UsageError(
                f"quantization is {self.quantization!r}: choose {' or '.join(QUANTIZATIONS)}, or none."
            )

    @property
    def quantized(self) -> bool:
        return self.quantization is not None

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    def rope(self, layer_type: str) -> Rope:
        return self.global_rope if layer_type == GLOBAL else self.sliding_rope

    def with_memory(self, **changes: Any) -> "GemmaConfig":
        """The same model with other memory settings, e.g. `config.with_memory(rule="linear")`."""
        return dataclasses.replace(self, memory=dataclasses.replace(self.memory, **changes))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "GemmaConfig":
        """Inverse of `to_json`.

        Raises:
            InputError: a field is missing, unknown, of the wrong type or out of its range.
        """
        try:
            fields = json.loads(text)
            for key, kind in (
                ("global_rope", Rope),
                ("sliding_rope", Rope),
                ("memory", MemoryConfig),
            ):
                fields[key] = kind(**_typed(kind, fields[key]))
            for key in ("layer_types", "eos_ids"):
                fields[key] = tuple(fields[key])
            return cls(**_typed(cls, fields))
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RecursionError,
            GemmaError,
        ) as error:
            reason = str(error).rstrip(".")
            raise InputError(
                f"config.json is not a gemma_jax configuration ({reason}): convert the model again."
            ) from error

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any], **overrides: Any) -> "GemmaConfig":
        """Reads a Hugging Face configuration.

        Args:
            source: a directory that holds `config.json`, the file itself, or its content.
            overrides: fields of `GemmaConfig` that replace what was read (`dtype=`, `name=`).

        Raises:
            InputError: the file is missing or broken, or a named field asks for what is not
                supported.
        """
        content = dict(source) if isinstance(source, Mapping) else _read_json(Path(source))
        text = _text_config(content)
        _refuse_unsupported(text)
        family = text.model_type
        fields: dict[str, Any] = {
            "family": family,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "mlp_dim": text.intermediate_size,
            "num_heads": text.num_attention_heads,
            "num_kv_heads": text.num_key_value_heads,
            "head_dim": text.head_dim,
            "layer_types": _layer_types(text),
            "query_scale": _query_scale(text),
            "global_rope": _rope(text, "full_attention"),
            "sliding_rope": _rope(text, "sliding_attention"),
            "sliding_window": getattr(text, "sliding_window", None),
            "attention_softcap": getattr(text, "attn_logit_softcapping", None),
            "final_softcap": getattr(text, "final_logit_softcapping", None),
            "qk_norm": family == "gemma3_text",
            "post_norms": family != "gemma",
            "tied_embeddings": bool(text.tie_word_embeddings),
            "norm_eps": text.rms_norm_eps,
            "bos_id": text.bos_token_id if text.bos_token_id is not None else 2,
            "eos_ids": _ids(text.eos_token_id),
        }
        if SLIDING not in fields["layer_types"]:
            fields["sliding_window"] = None
        return cls(**(fields | overrides))


def _read_json(path: Path) -> dict[str, Any]:
    if path.is_dir():
        path = path / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist: name a directory that holds a Hugging Face model."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read as JSON ({error}): download the model again."
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object: download the model again.")
    return content


def _text_config(content: Mapping[str, Any]) -> Any:
    """The configuration of the language model; transformers fills in every omitted field."""
    import transformers

    classes = {
        "gemma": transformers.GemmaConfig,
        "gemma2": transformers.Gemma2Config,
        "gemma3_text": transformers.Gemma3TextConfig,
        "gemma3": transformers.Gemma3Config,
    }
    model_type = content.get("model_type")
    if model_type not in tuple(classes):
        raise InputError(f"model_type is {model_type!r}: supported are {', '.join(classes)}.")
    content = copy.deepcopy(dict(content))  # the classes change what they are given
    text = content.get("text_config")
    inner = text.get("model_type", "gemma3_text") if isinstance(text, Mapping) else "gemma3_text"
    if model_type == "gemma3" and inner != "gemma3_text":
        raise InputError(f"text_config.model_type is {inner!r}: supported is gemma3_text.")
    try:
        config = classes[model_type].from_dict(content)
        return _language_model(config, content) if model_type == "gemma3" else config
    except Exception as error:  # the classes validate with exceptions of several libraries
        reason = " ".join(str(error).split())
        raise InputError(
            f"config.json is not a valid {model_type} configuration ({reason})."
        ) from error


def _language_model(config: Any, content: Mapping[str, Any]) -> Any:
    """The text part of a multimodal configuration, with what the whole says for it."""
    text = config.text_config
    text.tie_word_embeddings = config.tie_word_embeddings
    if content.get("eos_token_id") is not None:
        text.eos_token_id = content["eos_token_id"]
    return text


def _refuse_unsupported(text: Any) -> None:
    activation = getattr(text, "hidden_activation", None) or getattr(text, "hidden_act", None)
    if activation != "gelu_pytorch_tanh":
        raise InputError(
            f"hidden_activation is {activation!r}: only gelu_pytorch_tanh is supported."
        )
    if text.attention_bias:
        raise InputError("attention_bias is true: only attention without bias is supported.")
    if getattr(text, "use_bidirectional_attention", None):
        raise InputError("use_bidirectional_attention is true: only causal attention is supported.")


def _layer_types(text: Any) -> tuple[str, ...]:
    names = {"full_attention": GLOBAL, "sliding_attention": SLIDING}
    types = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    if unknown := sorted(set(types) - set(names)):
        raise InputError(f"layer_types has {', '.join(unknown)}: supported are {', '.join(names)}.")
    if len(types) != text.num_hidden_layers:
        raise InputError(
            f"layer_types has {len(types)} entries, num_hidden_layers is {text.num_hidden_layers}."
        )
    return tuple(names[kind] for kind in types)


def _query_scale(text: Any) -> float:
    divisor = getattr(text, "query_pre_attn_scalar", text.head_dim)
    if divisor <= 0:
        name = "query_pre_attn_scalar" if hasattr(text, "query_pre_attn_scalar") else "head_dim"
        raise InputError(f"{name} is {divisor}: it must be above 0.")
    return float(divisor) ** -0.5


def _rope(text: Any, attention: str) -> Rope:
    parameters = text.rope_parameters
    parameters = parameters.get(attention, parameters)
    # "type" is the old name of "rope_type"; transformers overlooks it in Gemma 3
    kind = parameters.get("type") or parameters.get("rope_type", "default")
    if kind not in ("default", "linear"):
        raise InputError(
            f"rope_parameters.rope_type is {kind!r}: supported are default and linear."
        )
    numbers = {
        "theta": parameters.get("rope_theta"),
        "factor": parameters.get("factor") if kind == "linear" else 1.0,
    }
    for name, value in numbers.items():
        if not _is(value, float):
            raise InputError(f"rope_parameters: {name} is {value!r}, it must be a number.")
    return Rope(**{name: float(value) for name, value in numbers.items()})


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _typed(kind: type, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """`fields`, all of them of the types that the dataclass `kind` declares."""
    hints = get_type_hints(kind)
    for name, value in fields.items():
        if name in hints and not _is(value, hints[name]):
            raise TypeError(f"{name} is {value!r}")
    return fields


def _is(value: Any, kind: Any) -> bool:
    """Whether a value from JSON is of a type such as `float | None` or `tuple[int, ...]`."""
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is(item, get_args(kind)[0]) for item in value)
    if get_args(kind):  # a union
        return any(_is(value, option) for option in get_args(kind))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _preset(
    name: str,
    family: str,
    width: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    mlp_dim: int,
    *,
    head_dim: int = 256,
    vocab_size: int = 256_000,
    window: int | None = None,
    query_divisor: int | None = None,
    rope_factor: float = 1.0,
) -> GemmaConfig:
    period = {"gemma": 1, "gemma2": 2, "gemma3_text": 6}[family]  # every period-th layer is global
    return GemmaConfig(
        family=family,
        vocab_size=vocab_size,
        width=width,
        mlp_dim=mlp_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        layer_types=tuple(SLIDING if (i + 1) % period else GLOBAL for i in range(num_layers)),
        query_scale=(query_divisor or head_dim) ** -0.5,
        global_rope=Rope(1_000_000.0, rope_factor) if family == "gemma3_text" else Rope(10_000.0),
        sliding_rope=Rope(10_000.0),
        sliding_window=window,
        attention_softcap=50.0 if family == "gemma2" else None,
        final_softcap=30.0 if family == "gemma2" else None,
        qk_norm=family == "gemma3_text",
        post_norms=family != "gemma",
        name=name,
    )


_G3 = {"vocab_size": 262_144, "window": 512}
_G3_VISION = {"vocab_size": 262_208, "window": 1024, "rope_factor": 8.0}

PRESETS: dict[str, GemmaConfig] = {
    config.name: config
    for config in (
        #       name, family, D, layers, H, K, M
        _preset("gemma-2b", "gemma", 2048, 18, 8, 1, 16_384),
        _preset("gemma-7b", "gemma", 3072, 28, 16, 16, 24_576),
        _preset("gemma-2-2b", "gemma2", 2304, 26, 8, 4, 9216, window=4096),
        _preset("gemma-2-9b", "gemma2", 3584, 42, 16, 8, 14_336, window=4096),
        _preset(
            "gemma-2-27b",
            "gemma2",
            4608,
            46,
            32,
            16,
            36_864,
            head_dim=128,
            window=4096,
            query_divisor=144,
        ),
        _preset("gemma-3-270m", "gemma3_text", 640, 18, 4, 1, 2048, **_G3),
        _preset("gemma-3-1b", "gemma3_text", 1152, 26, 4, 1, 6912, **_G3),
        _preset("gemma-3-4b", "gemma3_text", 2560, 34, 8, 4, 10_240, **_G3_VISION),
        _preset("gemma-3-12b", "gemma3_text", 3840, 48, 16, 8, 15_360, **_G3_VISION),
        _preset(
            "gemma-3-27b",
            "gemma3_text",
            5376,
            62,
            32,
            16,
            21_504,
            head_dim=128,
            query_divisor=168,
            **_G3_VISION,
        ),
    )
}
