#!/usr/bin/env python3
"""Asks a Gemma model about a text of any length: `python run.py --context book.txt --prompt "Who is
Ishmael?"`.

Standard output carries the answer only; everything else goes to standard error.
"""

import argparse
import json
import os
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    from gemma_jax.inference.options import parse

    options = parse(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # only its tokenizers are used here
    from gemma_jax.inference.console import run_command

    mode = chat if options.chat else answer_all if options.prompts else answer
    return run_command(lambda: mode(options), debug=options.debug)


def answer(options: argparse.Namespace) -> None:
    """Reads the text, prints the answer, and says on standard error what is going on."""
    from gemma_jax.inference import command, notices
    from gemma_jax.inference.console import Console

    console = Console(quiet=options.quiet)
    documents = command.open_files(options)
    model, memory = command.load(options, console)
    autosave = command.start_autosave(options, model, console)

    from gemma_jax.inference.reader import generate

    answer = generate(
        model,
        documents,
        memory=memory,
        keeper=autosave,
        on_memory=lambda memory: command.save(options, memory, model, console),
        max_new_tokens=options.max_new_tokens,
        **command.sampling(options),
        template=options.template,
        on_progress=command.show_progress(console, model, memory),
    )
    try:
        for piece in answer:
            console.end_progress()
            if not options.json:
                print(piece, end="", flush=True)
    finally:
        console.end_progress()
    report = answer.report()
    print(json.dumps(report, ensure_ascii=False) if options.json else "", flush=True)
    console.warning(notices.replaced(documents.replaced if documents else 0))
    console.line(notices.summary(answer))
    if autosave:
        autosave.remove()


def chat(options: argparse.Namespace) -> None:
    """A conversation in the terminal, about the context if there is any."""
    from gemma_jax.inference import command
    from gemma_jax.inference.console import Console

    console = Console(quiet=options.quiet)
    with command.read_context(options, console, template=True) as (model, memory):
        from gemma_jax.inference.chat import Chat
        from gemma_jax.inference.terminal import Terminal

        sampling = command.sampling(options)
        talk = Chat(model, memory, max_new_tokens=options.max_new_tokens, **sampling)
        Terminal(talk, model, console, verify=not options.no_verify).run()


def answer_all(options: argparse.Namespace) -> None:
    """Answers the prompts of a file, each about the same context, in lines of JSON."""
    from gemma_jax.inference import batch, command, notices
    from gemma_jax.inference.console import Console

    console = Console(quiet=options.quiet)
    prompts = batch.open_prompts(options.prompts)
    with command.read_context(options, console, template=options.template) as (model, memory):
        reports = batch.answers(
            model,
            prompts,
            memory,
            errors=options.encoding_errors,
            template=options.template,
            max_new_tokens=options.max_new_tokens,
            **command.sampling(options),
        )
        failed = []
        for report in reports:
            print(json.dumps(report, ensure_ascii=False), flush=True)
            failed.append("error" in report)
    console.line(notices.batch(failed))


if __name__ == "__main__":
    from gemma_jax.inference.console import leave

    leave(main())
