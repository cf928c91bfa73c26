"""The same trials with Hugging Face transformers and full attention.

`Peer` starts a process of its own, so that the device is empty before and after: `python -m
gemma_jax.evaluate.peer` is told on standard input what to read and what to answer, in ids and line by
line. Weights in bfloat16 on a GPU and float32 on a CPU, sdpa attention, a DynamicCache filled piece by
piece with logits of the last token alone, greedy decoding.
"""

import copy
import dataclasses
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

from gemma_jax.errors import GemmaError, OutOfMemoryError
from gemma_jax.evaluate.answers import Answer, to_text
from gemma_jax.evaluate.grid import NOT_RUN, blank_trials, run
from gemma_jax.evaluate.journal import Journal
from gemma_jax.evaluate.plan import Grid, Group
from gemma_jax.inference.console import Console

CHUNK_TOKENS = 4096  # read at once
PACKAGES = ("torch", "transformers")
SETTING = "hf"


def run_peer(
    grid: Grid, peer: "Peer", up_to: int, journal: Journal, console: Console, within: int
) -> None:
    """Runs the grid's trials up to a length, or to that which does not fit; longer ones are noted as
    not run.
    """
    short, long = (
        one_by_one(grid, range(up_to + 1)),
        one_by_one(grid, range(up_to + 1, sys.maxsize)),
    )
    reason = f"{NOT_RUN}: longer than {up_to} tokens"
    journal.add(dataclasses.replace(blank, failed=reason) for blank in blank_trials(long, SETTING))
    tried = 0

    def skip(group: Group) -> str | None:
        nonlocal tried
        if peer.out_of_memory:
            return f"{NOT_RUN}: out of memory at {tried} tokens"
        tried = group.tokens
        return None

    run(short, {SETTING: peer}, journal, console, within, skip)


def one_by_one(grid: Grid, lengths: Container[int]) -> Grid:
    """The haystacks of some lengths, each read alone, the shortest first."""
    groups = tuple(
        Group((haystack,), shared=len(haystack.asked) > 1)
        for haystack in sorted(grid.haystacks, key=lambda haystack: haystack.tokens)
        if haystack.tokens in lengths
    )
    return dataclasses.replace(grid, groups=groups)


class Peer:
    """Reads and answers one text at a time, as `running.Reader` does several.

    What stands for the State is whether it is to be kept: the process holds the cache itself.

    Attributes:
        out_of_memory: whether something did not fit; from then on nothing is tried.
        device: what it runs on, once it was started.
    """

    rows = beside = 1

    def __init__(self, directory: str, tokenizer: Any, stops: Sequence[int]):
        self._directory, self._tokenizer, self._stops = directory, tokenizer, tuple(stops)
        self._process: subprocess.Popen[str] | None = None
        self.out_of_memory = False
        self.device: str | None = None
        self._peak: int | None = None

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._said.close()

    def warm_up(self, shared: Iterable[bool]) -> float:
        """Starts the process and loads the weights, if that was not done; returns the seconds."""
        start = time.perf_counter()
        if self._process is None:
            self._said = tempfile.TemporaryFile("w+")
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gemma_jax.evaluate.peer", self._directory],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
            )
            self.device = self._receive()["device"]
        return time.perf_counter() - start

    def read(
        self, texts: Sequence[Iterable[Sequence[int]]], rows: int, on_tokens: Callable[[int], None]
    ) -> bool:
        """Reads one stream of ids."""
        (text,) = texts
        if self.out_of_memory:
            raise OutOfMemoryError(f"{NOT_RUN}: out of memory")
        self._send({"begin": True})
        held: list[int] = []
        for ids in text:
            held += map(int, ids)  # numbers of the text's arrays are no JSON
            while len(held) >= CHUNK_TOKENS:
                self._send({"read": held[:CHUNK_TOKENS]})
                del held[:CHUNK_TOKENS]
                self._receive()
                on_tokens(CHUNK_TOKENS)
        if held:
            self._send({"read": held})
            self._receive()
            on_tokens(len(held))
        return False

    def fork(self, keep: bool, read_in: Sequence[int] = ()) -> bool:
        """What was read is kept for another question."""
        return True

    def peak_bytes(self) -> int | None:
        """Most device memory that the process used."""
        return self._peak

    def answer(
        self, keep: bool, questions: Sequence[Sequence[int]], limits: Sequence[int]
    ) -> list[Answer]:
        """Answers one question; without `keep` what was read is forgotten."""
        self._send(
            {"ask": list(questions[0]), "limit": limits[0], "stops": self._stops, "keep": keep}
        )
        found = self._receive()
        self._peak = found["peak"]
        text = to_text(self._tokenizer, found["ids"], self._stops)
        return [Answer(text, len(found["ids"]), found["finite"])]

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._receive()  # tells why it ended

    def _receive(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        found = json.loads(line) if line else {"error": self._last_words()}
        if "memory" in found:
            self.out_of_memory = True
            raise OutOfMemoryError(f"{NOT_RUN}: out of memory ({found['memory']})")
        if "error" in found:
            raise GemmaError(f"Hugging Face transformers failed ({found['error']}).")
        return found

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().strip().splitlines()
        return lines[-1] if lines else f"it ended with {self._process.wait()}"


# --- the process of its own -----------------------------------------------------------------------


def main() -> None:
    """Does what standard input asks for, and prints a line of JSON for each line of it."""
    import torch

    session = Session(sys.argv[1])
    on_gpu = session.device == "cuda"
    tell({"device": torch.cuda.get_device_name() if on_gpu else session.device})
    for line in sys.stdin:
        message = json.loads(line)
        try:
            with torch.inference_mode():
                reply = session.do(message)
        except torch.cuda.OutOfMemoryError as error:
            session.cache = None
            torch.cuda.empty_cache()
            reply = {"memory": " ".join(str(error).split())[:200]}
        if reply is not None:
            tell(reply)


def tell(reply: dict[str, Any]) -> None:
    print(json.dumps(reply), flush=True)


class Session:
    """A model and the cache of what it has read."""

    def __init__(self, directory: str):
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        )
        self.model = model.to(self.device).eval()
        self.cache: Any = None

    def do(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """Does what one message says."""
        if "begin" in message:
            self.cache = self.new_cache()
            return None
        if "read" in message:
            self.forward(self.cache, message["read"])
            return {"read": len(message["read"])}
        cache = copy.deepcopy(self.cache) if message["keep"] else self.cache
        return self.answer(cache, message["ask"], message["limit"], message["stops"])

    def new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def forward(self, cache: Any, ids: Sequence[int]) -> Any:
        """Logits [V] after ids."""
        import torch

        tokens = torch.tensor([ids], device=self.device)
        found = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return found.logits[0, -1].float()

    def answer(
        self, cache: Any, ids: Sequence[int], limit: int, stops: Sequence[int]
    ) -> dict[str, Any]:
        """Continues greedily, up to a stop token or the limit."""
        import torch

        written: list[int] = []
        logits = self.forward(cache, ids)
        finite = bool(torch.isfinite(logits).all())
        while True:
            written.append(int(logits.argmax()))
            if written[-1] in stops or len(written) >= limit:
                return {"ids": written, "finite": finite, "peak": self.peak_bytes()}
            logits = self.forward(cache, written[-1:])
            finite &= bool(torch.isfinite(logits).all())

    def peak_bytes(self) -> int | None:
        import torch

        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None


def versions() -> dict[str, str]:
    """Of the packages that answer."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


if __name__ == "__main__":
    main()
