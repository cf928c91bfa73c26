"""What the modes of `run.py` have in common: files, the model, what was read before, saving.

Imports wait for their use: what is wrong with the options or the files is said before JAX is loaded.
"""

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

SAMPLING = ("temperature", "top_k", "top_p", "min_p")


@contextlib.contextmanager
def read_context(
    options: argparse.Namespace, console: Any, *, template: bool
) -> Iterator[tuple[Any, Any]]:
    """The model, and the memory of what comes before whatever is asked in the block."""
    from gemma_jax.inference import notices

    documents = open_files(options)
    model, memory = load(options, console)

    from gemma_jax.inference.progress import Meter
    from gemma_jax.inference.remember import new_memory, remember

    if documents is None:
        yield model, memory or new_memory(model)
        return
    autosave = start_autosave(options, model, console)
    meter = Meter(documents.share_read, show_progress(console, model, memory))
    try:
        memory = remember(model, documents, memory, template=template, meter=meter, keeper=autosave)
    finally:
        console.end_progress()
    console.warning(notices.replaced(documents.replaced))
    save(options, memory, model, console)
    yield model, memory
    if autosave:
        autosave.remove()


def open_files(options: argparse.Namespace) -> Any:
    """The text to be read, None without any; what is missing is known before a model is loaded."""
    from gemma_jax.checkpoint import memory_file
    from gemma_jax.inference.documents import Documents

    if earlier := options.load_memory or options.resume:
        memory_file.describe(earlier, verify=not options.no_verify)
    if options.save_memory:
        memory_file.require_place(options.save_memory)
    if not options.context and options.prompt is None:
        return None
    return Documents(options.context, options.prompt, errors=options.encoding_errors)


def load(options: argparse.Namespace, console: Any) -> tuple[Any, Any]:
    """Loads the model, and what it read before; says first what that will take."""
    from gemma_jax import cache, demo
    from gemma_jax.checkpoint import store
    from gemma_jax.inference import notices

    begin = time.perf_counter()
    cache.keep_compiled_programs()
    path, dtype = options.model, None
    if path is None:
        path, dtype = demo.checkpoint(), demo.suitable_dtype()
        console.line(notices.SMALL_MODEL)
    recorded = store.read_config(path, memory=options.memory, adapter=options.adapter)
    changes = {"rule": options.memory, "segment_length": options.segment_length}
    config = dataclasses.replace(recorded, dtype=dtype or recorded.dtype).with_memory(
        **{name: value for name, value in changes.items() if value is not None}
    )
    console.line(notices.memory_needed(config))
    console.warning(notices.untrained(recorded, options.memory))

    from gemma_jax.inference.compiling import Compiling
    from gemma_jax.inference.sampling import make_sampling

    drawn = make_sampling(**{name: getattr(options, name) for name in SAMPLING})
    compiling = Compiling(
        config,
        drawn if options.max_new_tokens or options.prompts else None,
        block_tokens=1 if options.chat and options.stop else None,
    )
    model = store.load(
        path,
        memory=options.memory,
        segment_length=options.segment_length,
        dtype=dtype,
        verify=not options.no_verify,
        adapter=options.adapter,
    )
    memory = None
    if earlier := options.load_memory or options.resume:
        from gemma_jax.inference.saving import load_reading

        memory = load_reading(
            earlier, model, resume=options.resume is not None, verify=not options.no_verify
        )
        console.line(notices.loaded(earlier, memory))
    compiling.wait()
    console.line(notices.ready(time.perf_counter() - begin))
    return model, memory


def start_autosave(options: argparse.Namespace, model: Any, console: Any) -> Any:
    """What saves the reading while it is under way, if that is asked for."""
    from gemma_jax.inference import saving

    if options.autosave is None and not options.save_memory and not options.resume:
        return None
    path = saving.autosave_path(options.resume, options.save_memory, options.context)
    seconds = options.autosave or saving.DEFAULT_SECONDS
    return saving.Autosave(path, model, seconds=seconds, say=console.warning)


def save(options: argparse.Namespace, memory: Any, model: Any, console: Any) -> None:
    """Keeps what was read in a file, if that is asked for."""
    from gemma_jax.checkpoint import memory_file
    from gemma_jax.inference import notices

    if options.save_memory:
        memory_file.save(options.save_memory, memory, model)
        console.line(notices.saved(options.save_memory, memory))


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """How tokens are drawn and where answers end, as `generate` takes it."""
    return {name: getattr(options, name) for name in (*SAMPLING, "seed", "stop")}


def show_progress(console: Any, model: Any, memory: Any) -> Any:
    """Shows how far a reading is, and warns when a text is longer than the model remembers."""
    from gemma_jax.inference import notices

    before = memory.tokens if memory else 0

    def show(progress: Any) -> None:
        console.progress(progress)
        console.warning(notices.forgotten(model.config, before + progress.tokens))

    return show
