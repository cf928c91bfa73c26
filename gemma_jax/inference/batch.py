"""Many prompts, one after the other, each on top of the same memory: JSONL in, JSONL out."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gemma_jax.checkpoint.memory_file import Memory
from gemma_jax.errors import GemmaError, InputError
from gemma_jax.inference.console import as_gemma_error
from gemma_jax.inference.reader import generate
from gemma_jax.inference.remember import fork

# What a line may say, and the types it may say it in.
FIELDS: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "id": (str, int, float, bool, dict, list, type(None)),
    "max_new_tokens": (int,),
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "min_p": (int, float),
    "seed": (int,),
    "stop": (str, list),
}


def answers(
    model: Any,
    lines: Iterable[bytes],
    memory: Memory,
    *,
    errors: str = "strict",
    template: bool = False,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """The report of an answer for every line, in order; of one that is bad, what is wrong with it.

    Args:
        model: what `gemma_jax.load` gives.
        lines: each a JSON string (a prompt) or an object with "prompt", and if wanted "id", which
            comes back, and options of `generate` for this prompt; lines of white space are skipped.
        memory: what comes before every prompt; it is not consumed.
        errors: "strict" refuses lines that are not UTF-8, "replace" reads U+FFFD for bytes.
        template, options: as in `generate`.

    Raises:
        OutOfMemoryError: with it nothing can go on.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        report: dict[str, Any] = {"line": number}
        try:
            fields = _fields(line, errors)
            report |= {key: fields.pop(key) for key in ("id",) if key in fields}
            prompt = fields.pop("prompt")
            answer = generate(
                model, prompt, memory=fork(memory), template=template, **(options | fields)
            )
            for _ in answer:
                pass
            report |= answer.report()
        except GemmaError as error:
            report["error"] = str(error)
        except Exception as error:
            report["error"] = str(_known(error))
        yield report


def _fields(line: bytes, errors: str) -> dict[str, Any]:
    """A line's prompt and options.

    Raises:
        InputError: it is not of the form that `answers` tells.
    """
    try:
        content = json.loads(line.decode("utf-8", errors))
    except (ValueError, RecursionError) as error:
        raise InputError(f"The line is not JSON in UTF-8 ({error}).") from error
    fields = {"prompt": content} if isinstance(content, str) else content
    if not isinstance(fields, Mapping) or "prompt" not in fields:
        raise InputError('The line is neither a string nor an object with a "prompt".')
    for name, value in fields.items():
        if name not in FIELDS:
            raise InputError(f'The line has "{name}": known are {", ".join(FIELDS)}.')
        wrong = not isinstance(value, FIELDS[name])
        wrong |= name != "id" and isinstance(value, bool)
        wrong |= isinstance(value, list) and name == "stop" and not all(map(_is_text, value))
        if wrong:
            raise InputError(f'"{name}" of the line is of the wrong type.')
    return dict(fields)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _known(error: Exception) -> GemmaError:
    known = as_gemma_error(error)
    if known.exit_code == 5:
        raise known from error
    return known


def open_prompts(path: str) -> Iterable[bytes]:
    """The lines of a file, or of standard input for "-"; they are read as they are needed.

    Raises:
        InputError: it cannot be read.
    """
    if path == "-":
        import sys

        return sys.stdin.buffer
    try:
        if os.path.isdir(path):
            raise InputError(f"{path} is a directory: name a file of JSON lines.")
        return open(path, "rb")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read ({reason}): name a file of JSON lines.") from error
