"""A tokenizer for a model from scratch, learnt from the texts it is to read and built as Gemma's is.

BPE over characters, with ▁ for the space that begins a word and bytes for what has no character of its
own. No token spans two words, every digit is a token, and so is every sign of punctuation.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gemma_jax.errors import UsageError

CONTROL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CHARACTERS = ["▁", "\n", *(chr(code) for code in range(0x21, 0x7F))]
SMALLEST = len(CONTROL_TOKENS) + len(BYTES) + len(CHARACTERS)


def learn_tokenizer(texts: Iterable[str], size: int) -> Any:
    """A `tokenizers.Tokenizer` of at most `size` tokens; equal texts give equal tokenizers.

    Raises:
        UsageError: `size` has no room for control tokens, bytes and characters.
    """
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    if size < SMALLEST:
        raise UsageError(f"A tokenizer of {size} tokens is too small: choose {SMALLEST} or more.")
    learner = tokenizers.Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(tokenizers.Regex(r"[^\w▁]"), "isolated"),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(CONTROL_TOKENS) - len(BYTES),
        initial_alphabet=CHARACTERS,
        limit_alphabet=len(CHARACTERS),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    learnt = sorted(model["vocab"], key=model["vocab"].get)
    return assemble([*BYTES, *learnt], [tuple(pair) for pair in model["merges"]])


def assemble(pieces: list[str], merges: list[tuple[str, str]]) -> Any:
    """A tokenizer as Gemma's is built, of control tokens, then `pieces`."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    pieces = dict.fromkeys([*CONTROL_TOKENS, *pieces])
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    return tokenizer


def save_tokenizer(tokenizer: Any, directory: Path) -> Path:
    """Writes the files that `text.load_tokenizer` reads."""
    directory.mkdir(parents=True, exist_ok=True)
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(str(directory / "tokenizer.json"))  # last: with it the directory is complete
    return directory
