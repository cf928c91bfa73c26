"""A conversion against the reference: the same prompt through Hugging Face transformers and through us.

Both compute in float32 from the numbers that the checkpoint holds, so what differs is the arithmetic
alone. Only one of the two models is in memory at a time.
"""

import dataclasses
import gc
from pathlib import Path
from typing import Any

import numpy as np

from gemma_jax.checkpoint import store
from gemma_jax.checkpoint.source import require_torch
from gemma_jax.config import GemmaConfig
from gemma_jax.errors import GemmaError
from gemma_jax.model.weights import quantize
from gemma_jax.text import encode

MAX_KL = 1e-3  # nats, at the worst position
PROMPT_TOKENS = 500
TOP = 5

# Any English does; it is long, because errors of positions show late. Exodus 20, King James Version.
PROMPT = """And God spake all these words, saying, I am the LORD thy God, which have brought thee out \
of the land of Egypt, out of the house of bondage. Thou shalt have no other gods before me. Thou shalt \
not make unto thee any graven image, or any likeness of any thing that is in heaven above, or that is \
in the earth beneath, or that is in the water under the earth: Thou shalt not bow down thyself to them, \
nor serve them: for I the LORD thy God am a jealous God, visiting the iniquity of the fathers upon the \
children unto the third and fourth generation of them that hate me; And shewing mercy unto thousands \
of them that love me, and keep my commandments. Thou shalt not take the name of the LORD thy God in \
vain; for the LORD will not hold him guiltless that taketh his name in vain. Remember the sabbath day, \
to keep it holy. Six days shalt thou labour, and do all thy work: But the seventh day is the sabbath \
of the LORD thy God: in it thou shalt not do any work, thou, nor thy son, nor thy daughter, thy \
manservant, nor thy maidservant, nor thy cattle, nor thy stranger that is within thy gates: For in six \
days the LORD made heaven and earth, the sea, and all that in them is, and rested the seventh day: \
wherefore the LORD blessed the sabbath day, and hallowed it. Honour thy father and thy mother: that \
thy days may be long upon the land which the LORD thy God giveth thee. Thou shalt not kill. Thou shalt \
not commit adultery. Thou shalt not steal. Thou shalt not bear false witness against thy neighbour. \
Thou shalt not covet thy neighbour's house, thou shalt not covet thy neighbour's wife, nor his \
manservant, nor his maidservant, nor his ox, nor his ass, nor any thing that is thy neighbour's. And \
all the people saw the thunderings, and the lightnings, and the noise of the trumpet, and the mountain \
smoking: and when the people saw it, they removed, and stood afar off. And they said unto Moses, Speak \
thou with us, and we will hear: but let not God speak with us, lest we die. And Moses said unto the \
people, Fear not: for God is come to prove you, and that his fear may be before your faces, that ye \
sin not. And the people stood afar off, and Moses drew near unto the thick darkness where God was."""


@dataclasses.dataclass(frozen=True)
class Verification:
    """How far two models agree.

    Attributes:
        max_kl: the largest KL divergence from the reference's next-token distribution, in nats.
        top5_agreement: share of positions whose five likeliest tokens are the same five.
        tokens: length of the prompt.
    """

    max_kl: float
    top5_agreement: float
    tokens: int


def require_reference() -> None:
    """Raises `UsageError` when torch is missing."""
    require_torch("--verify compares with Hugging Face transformers")


def verify_checkpoint(source: Path, checkpoint: Path) -> Verification:
    """Compares the logits of a Hugging Face directory and of the checkpoint made from it.

    Raises:
        GemmaError: the KL divergence exceeds `MAX_KL` somewhere.
    """
    model = store.load(checkpoint, memory="off", dtype="float32", verify=False)
    tokens = [model.config.bos_id, *encode(model.tokenizer, PROMPT)][:PROMPT_TOKENS]
    tokens = np.array([tokens], np.int32)
    stored = store.read_config(checkpoint)
    ours = _our_logits(model, tokens)
    del model
    gc.collect()
    found = compare(_reference_logits(source, tokens, stored), ours)
    if not found.max_kl <= MAX_KL:
        raise GemmaError(
            f"The converted model differs from the reference (maximum KL {found.max_kl:.2g} nats,"
            f" allowed {MAX_KL:g}; top-5 agreement {found.top5_agreement:.1%}): please report this."
        )
    return found


def compare(reference: np.ndarray, ours: np.ndarray) -> Verification:
    """Compares logits [T, V], position by position."""
    worst, agreeing = 0.0, 0
    for p, q in zip(reference, ours, strict=True):
        p, q = _log_softmax(p), _log_softmax(q)
        kl = float(np.sum(np.exp(p) * (p - q)))
        worst = max(worst, kl) if np.isfinite(kl) else float("nan")
        top = (set(np.argpartition(x, -TOP)[-TOP:].tolist()) for x in (p, q))
        agreeing += next(top) == next(top)
        if np.isnan(worst):
            break
    return Verification(worst, agreeing / len(reference), len(reference))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64) - logits.max()
    return logits - np.log(np.exp(logits).sum())


def _our_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    import jax

    from gemma_jax.model.scan import forward, logits
    from gemma_jax.model.state import init_state

    with jax.default_matmul_precision("highest"):  # a GPU's default is TF32
        hidden, _ = forward(model.params, tokens, init_state(model.config), config=model.config)
        return np.asarray(logits(model.params, hidden[0], config=model.config))


def _reference_logits(source: Path, tokens: np.ndarray, stored: GemmaConfig) -> np.ndarray:
    torch = require_torch("--verify compares with Hugging Face transformers")
    import transformers

    reference = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    for parameter in reference.parameters():  # the same rounding as the checkpoint's
        if stored.quantized and parameter.ndim == 2:
            values, scale = quantize(parameter.data.numpy())
            parameter.data = torch.from_numpy(values * scale[:, None])
        elif stored.dtype == "bfloat16":
            parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
    with torch.no_grad():
        return reference(torch.from_numpy(tokens).long()).logits[0].numpy()
