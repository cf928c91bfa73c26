"""Perplexity by position: `python -m gemma_jax.evaluate --model M --text book.txt`.

With local attention in the forms and lengths that are asked for, beside the model without its adapter,
and Hugging Face transformers with full attention. All compute in float32 unless told otherwise.
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_jax.errors import InputError

PIECE_TOKENS = 8192  # read at once
LOGITS_TOKENS = 256  # turned into logits at once
BIN_TOKENS = 2048  # of a mean by position


def evaluate(options: argparse.Namespace) -> None:
    """Prints one record per setting: mean NLL in nats, over all tokens and by position."""
    from gemma_jax.cache import keep_compiled_programs
    from gemma_jax.checkpoint import store

    keep_compiled_programs()
    given = {"memory": options.memory, "adapter": options.adapter}
    memory = store.read_config(options.model, **given).memory
    subjects = [("", {}), (" with adapter", given)] if options.adapter else [("", given)]
    ids, peer = None, None
    for name, which in subjects:
        model = store.load(options.model, dtype=options.dtype, **which)
        if ids is None:
            ids = read_ids(model, options.text, options.tokens)
            if options.peer:
                peer = peer_nll(options.peer, ids)
                _print({"model": "transformers, full attention"}, peer, peer, options.json)
        for form, length, sink in itertools.product(
            options.local_attention or [memory.local_attention],
            options.segment_length or [memory.segment_length],
            (True, False) if options.without_sink else (True,),
        ):
            config = model.config.with_memory(
                local_attention=form, segment_length=length, sink=sink
            )
            setting = {
                "model": config.name + name,
                "memory": config.memory.rule,
                "local_attention": form,
                "segment_length": length,
                "sink": sink,
            }
            nll = token_nll(dataclasses.replace(model, config=config), ids)
            _print(setting, nll, peer, options.json)


def read_ids(model: Any, file: str, tokens: int | None) -> np.ndarray:
    """BOS and the first `tokens - 1` ids of a text file (all of them by default); one whose name ends
    in `.xz` is decompressed.

    Raises:
        InputError: the file cannot be read, or is too short.
    """
    from gemma_jax.inference.documents import read_text
    from gemma_jax.text import encode_prompt

    ids: list[int] = []
    for some in encode_prompt(model.tokenizer, read_text(file), bos_id=model.config.bos_id):
        ids += some
        if tokens and len(ids) >= tokens:
            break
    if len(ids) < (tokens or 2):
        raise InputError(f"{file} has only {len(ids)} tokens: choose a longer text, or --tokens.")
    return np.array(ids[:tokens], np.int32)


def token_nll(model: Any, ids: np.ndarray) -> np.ndarray:
    """-log p of each id after the first, given all before it [len(ids) - 1], in nats."""
    import jax
    import jax.numpy as jnp

    from gemma_jax.model.scan import forward, logits
    from gemma_jax.model.state import init_state

    config = model.config

    @jax.jit
    def nll(params: Any, hidden: Any, targets: Any) -> Any:
        def of_some(some: Any) -> Any:
            hidden, targets = some
            found = jax.nn.log_softmax(logits(params, hidden, config=config))
            return -jnp.take_along_axis(found, targets[:, None], axis=1)[:, 0]

        parts = (
            hidden.reshape(-1, LOGITS_TOKENS, hidden.shape[-1]),
            targets.reshape(-1, LOGITS_TOKENS),
        )
        return jax.lax.map(of_some, parts).reshape(-1)

    state, found = init_state(config), []
    with jax.default_matmul_precision("highest" if config.dtype == "float32" else "default"):
        for start in range(0, len(ids) - 1, PIECE_TOKENS):
            piece, targets = np.zeros((2, PIECE_TOKENS), np.int32)
            count = min(PIECE_TOKENS, len(ids) - 1 - start)
            piece[:count], targets[:count] = (ids[start + i : start + i + count] for i in (0, 1))
            lengths = np.array([count], np.int32)
            hidden, state = forward(
                model.params, piece[None], state, config=config, lengths=lengths
            )
            found.append(np.asarray(nll(model.params, hidden[0], targets))[:count])
    return np.concatenate(found)


def peer_nll(directory: str, ids: np.ndarray) -> np.ndarray:
    """The same of Hugging Face transformers with full attention, in float32."""
    from gemma_jax.checkpoint.source import require_torch, resolve

    torch = require_torch("--peer runs Hugging Face transformers")
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        resolve(directory), dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    ).to(device)
    tokens = torch.from_numpy(ids).long().to(device)
    found = []
    with torch.no_grad():
        hidden = peer.model(tokens[None, :-1], use_cache=False).last_hidden_state[0]
        for part, targets in zip(
            hidden.split(LOGITS_TOKENS), tokens[1:].split(LOGITS_TOKENS), strict=True
        ):
            scores = peer.lm_head(part)
            if cap := getattr(peer.config, "final_logit_softcapping", None):
                scores = cap * torch.tanh(scores / cap)
            found.append(torch.nn.functional.cross_entropy(scores, targets, reduction="none").cpu())
    return torch.cat(found).numpy()


def _print(
    setting: dict[str, Any], nll: np.ndarray, peer: np.ndarray | None, as_json: bool
) -> None:
    nll = nll.astype(np.float64)
    record = setting | {
        "tokens": len(nll) + 1,
        "nll": nll.mean(),
        "over_peer": None if peer is None else nll.mean() - peer.astype(np.float64).mean(),
        "nll_by_position": [
            nll[start : start + BIN_TOKENS].mean() for start in range(0, len(nll), BIN_TOKENS)
        ],
    }
    if as_json:
        print(json.dumps(record), flush=True)
        return
    name = " ".join(str(value) for key, value in setting.items() if key != "sink")
    name += "" if setting.get("sink", True) else " without sink"
    over = "" if peer is None else f"  {record['over_peer']:+.4f} over full attention"
    bins = " ".join(f"{value:.2f}" for value in record["nll_by_position"])
    print(f"{name}: {record['nll']:.4f} nats{over}  [{bins}]", flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    from gemma_jax.config import DTYPES, LOCAL_ATTENTION_FORMS
    from gemma_jax.inference.console import ArgumentParser, count, number

    parser = ArgumentParser(
        prog="python -m gemma_jax.evaluate",
        description="Mean negative log-likelihood of a text's tokens, in nats.",
    )
    parser.add_argument("--model", metavar="DIR", required=True, help="a checkpoint")
    parser.add_argument("--text", metavar="FILE", required=True, help="what is read (FILE.xz too)")
    parser.add_argument(
        "--tokens", metavar="N", type=count, help="of its beginning, e.g. 32K (default: all)"
    )
    parser.add_argument(
        "--adapter", metavar="DIR", help="what was trained for --model, alone: with it, and without"
    )
    parser.add_argument("--memory", metavar="RULE", help="a rule other than the recorded one")
    parser.add_argument(
        "--local-attention",
        nargs="+",
        choices=LOCAL_ATTENTION_FORMS,
        help="(default: as recorded)",
    )
    parser.add_argument("--segment-length", metavar="S", nargs="+", type=number(int)(1))
    parser.add_argument("--without-sink", action="store_true", help="also without the sink")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--peer", metavar="HF_DIR", help="compare with transformers, full attention (needs torch)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(arguments)
    if options.tokens == 1:
        parser.error("argument --tokens: 1 leaves nothing to predict: choose 2 or more")
    return options
