"""The same shapes with Hugging Face transformers, as its users run it.

`measure` starts a process of its own, so that the device is empty before and after:
`python -m gemma_jax.benchmark.peer` reads what to do from standard input and prints what it found.
Random weights in bfloat16, sdpa attention. Reading fills a DynamicCache and gives the last token's
logits; writing takes a StaticCache and, on a GPU, torch.compile's mode reduce-overhead.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from gemma_jax.benchmark.records import Figure, figure_name, with_plain_memory
from gemma_jax.config import SLIDING, GemmaConfig
from gemma_jax.errors import GemmaError, OutOfMemoryError, UsageError

WARM_TOKENS = 8192  # read at most, before the clock starts
LONG_SECONDS = 20.0  # a reading that takes longer is not repeated
BLOCKS = 8


def require() -> None:
    """Raises `UsageError` where torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise UsageError("--peer hf needs torch: pip install torch.")


def measure(
    what: str, config: GemmaConfig, options: argparse.Namespace
) -> tuple[list[Figure], dict[str, str]]:
    """Figures of `what` (prefill or decode), and versions; names have `hf_` before it.

    Raises:
        OutOfMemoryError, GemmaError: the process failed.
    """
    task = {
        "what": what,
        "config": config.to_json(),
        "tokens": options.tokens,
        "batch_size": options.batch_size,
        "new_tokens": options.new_tokens,
        "repeats": options.repeats,
    }
    process = subprocess.run(
        [sys.executable, "-m", "gemma_jax.benchmark.peer"],
        input=json.dumps(task),
        capture_output=True,
        text=True,
    )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no reason given"])[-1]
        kind = OutOfMemoryError if "OutOfMemory" in process.stderr else GemmaError
        raise kind(f"Hugging Face transformers failed at {what} ({last}): see its message.")
    found = json.loads(process.stdout.splitlines()[-1])
    plain = dataclasses.replace(with_plain_memory(config), dtype="bfloat16")
    name = figure_name(f"hf_{what}", plain, tokens=options.tokens, batch_size=options.batch_size)
    work = options.batch_size * (options.tokens if what == "prefill" else options.new_tokens)
    figures = [
        (f"{name}_tokens_per_second", "tokens/s", [work / s for s in found["seconds"]]),
        (f"{name}_compile_seconds", "s", [found["first"]]),
    ]
    if found["peak"]:
        figures.append((f"{name}_peak_bytes", "bytes", [found["peak"]]))
    return figures, found["versions"]


def huggingface_fields(config: GemmaConfig, positions: int) -> dict[str, Any]:
    """The fields of Hugging Face's configuration of a model of this shape."""
    fields = {
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": config.tied_embeddings,
        "max_position_embeddings": positions,
    }
    if config.family != "gemma":
        fields |= {
            "sliding_window": config.sliding_window,
            "query_pre_attn_scalar": round(config.query_scale**-2),
            "layer_types": [
                "sliding_attention" if kind == SLIDING else "full_attention"
                for kind in config.layer_types
            ],
        }
    return fields


# --- the process of its own -----------------------------------------------------------------------


def main() -> None:
    """Does what standard input asks for, and prints one line of JSON."""
    import torch

    task = json.loads(sys.stdin.read())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, tokens = task["batch_size"], task["tokens"]
    config = GemmaConfig.from_json(task["config"])
    model = make_model(config, device, tokens + (BLOCKS + 2) * task["new_tokens"])
    text = torch.randint(config.vocab_size, (batch, tokens), device=device)
    with torch.inference_mode():
        if task["what"] == "prefill":
            first, seconds = prefill(model, text, task["repeats"])
        else:
            first, seconds = decode(model, text, task["new_tokens"], max(task["repeats"], BLOCKS))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    found = {"first": first, "seconds": seconds, "peak": peak, "versions": versions}
    print(json.dumps(found), flush=True)


def make_model(config: GemmaConfig, device: str, positions: int) -> Any:
    """Random weights on the device."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    fields = huggingface_fields(config, positions)
    kind = transformers.CONFIG_MAPPING[fields.pop("model_type")]
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            kind(**fields), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return model.to(device).eval()


def prefill(model: Any, text: Any, repeats: int) -> tuple[float, list[float]]:
    """Seconds of the first, short, reading, and of whole ones."""

    def read(tokens: Any) -> float:
        return clock(
            lambda: model(tokens, use_cache=True, logits_to_keep=1).logits.float().sum().item()
        )

    first, seconds = read(text[:, :WARM_TOKENS]), []
    while len(seconds) < repeats and sum(seconds) < LONG_SECONDS:
        seconds.append(read(text))
    return first, seconds


def decode(model: Any, text: Any, new_tokens: int, repeats: int) -> tuple[float, list[float]]:
    """Seconds of the first block of `new_tokens` tokens, and of later ones."""
    import torch
    from transformers import StaticCache

    length = text.shape[1] + (repeats + 2) * new_tokens
    cache = StaticCache(config=model.config, max_cache_len=length)
    logits = model(text, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    token = logits[:, -1].argmax(-1, keepdim=True)
    position = torch.tensor([[text.shape[1]]], device=text.device)

    def step(token: Any, position: Any) -> Any:
        logits = model(token, position_ids=position, past_key_values=cache, use_cache=True).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    if text.is_cuda:
        step = torch.compile(step, mode="reduce-overhead")

    def block() -> None:
        nonlocal token, position
        for _ in range(new_tokens):
            token, position = step(token, position).clone(), position + 1
        token.tolist()  # waits

    first = clock(block) + clock(block)  # the second may record a graph
    return first, [clock(block) for _ in range(repeats)]


def clock(call: Callable[[], Any]) -> float:
    """Seconds of a call that waits for the device."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
