"""The command: options to a model, data and a plan; the run; and what it makes."""

import argparse
import glob
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_jax.config import GemmaConfig
from gemma_jax.errors import CorruptError, InputError, UsageError
from gemma_jax.model import determinism
from gemma_jax.train import options as command_line

MEMORY_SHARE = "0.94"  # of the device for JAX, which takes three quarters of it by itself
SHIPPED = "books"  # in place of a file: the public-domain books that come with the package
PYTHON = "python"  # likewise: the source code of Python's standard library
MOST_WORKERS = 16  # each makes from a hundred thousand tokens (many facts) to millions a second
CARRIED_ROWS = 32  # memories kept for later sequences
AFTERWARDS = ("update_scale",)  # options that a run may go on with otherwise, and be the same
IDS = "ids"  # what a checkpoint calls the files of tokens that its run reads
SHAPE = (
    "model",
    "preset",
    "config",
    "train",
    "rank",
    "memory",
    "segment_length",
    "slots",
    "neighbours",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    from gemma_jax.inference.console import run_command

    found: list[argparse.Namespace] = []
    code = run_command(lambda: found.append(command_line.parse(arguments)))
    if not found:
        return code
    options = found[0]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_SHARE)
    if options.deterministic:  # before JAX looks
        determinism.ask()
    return run_command(lambda: train(options), debug=options.debug)


def train(options: argparse.Namespace) -> None:
    """Trains, and writes what was trained; says on standard error what is going on."""
    check(options)
    from gemma_jax.cache import keep_compiled_programs
    from gemma_jax.inference.console import Console
    from gemma_jax.train.start import make_model

    console = Console(quiet=options.quiet)
    keep_compiled_programs()
    output = Path(options.output).expanduser().absolute()
    directory = run_directory(options)
    try:
        config, params, tokenizer, home = make_model(
            options, filler(options), directory, console.show
        )
        mixture, probes = make_data(options, config, tokenizer, directory, console.show)
        run, what = make_run(options, config, params, mixture, probes, directory, console)
        del params
        console.line(describe(run, mixture, what))
        ended = run.go()
    finally:
        console.end_progress()
    if ended == "stopped":
        console.line(f"saved at step {run.progress.step}: continue with --resume.")
        return
    write(options, output, config, run, what, home, console)
    console.line(f"written to {output}; {directory} holds log.csv and progress.png.")


def check(options: argparse.Namespace) -> None:
    """Raises what is wrong with the options before anything long begins."""
    from gemma_jax import tasks
    from gemma_jax.train import result

    if not (options.model or options.preset or options.config):
        raise UsageError(
            "There is nothing to train: give --model DIR, --preset NAME or --config FILE."
        )
    if not options.output:
        raise UsageError("There is no place for what is learnt: give --output DIR.")
    if (options.steps is None) == (options.minutes is None):
        raise UsageError("The budget is --steps N or --minutes M: give one of them.")
    tuned = options.train == "lora" or (options.train == "all" and options.model)
    if options.update_scale != 1.0 and not tuned:
        raise UsageError(
            "--update-scale goes back towards the model that was there before: give it with --train lora,"
            " or with --train all and --model DIR."
        )
    if not options.data:
        raise UsageError("There is nothing to learn from: give --data, e.g. text:book.txt.")
    scratch = not options.model
    options.train = options.train or ("all" if scratch else "memory")
    if scratch and options.train != "all":
        raise UsageError(
            f"--train {options.train} needs a model that was trained: give --model DIR."
        )
    if scratch and not options.tokenizer:
        raise UsageError(
            "A model from scratch needs a tokenizer: give --tokenizer DIR, or new:SIZE to learn one."
        )
    if options.tokenizer and not scratch:
        raise UsageError("--tokenizer is for models from scratch: a checkpoint has its own.")
    for kind, what, _ in options.data:
        if kind == "task":
            for forms in options.forms:
                tasks.make(what, forms=forms, keys="train")
        else:
            matches(what)
    only_text = all(kind == "text" for kind, _, _ in options.data)
    if only_text and not any(options.language_weight):
        raise UsageError(
            "--language-weight is 0, and there are only texts: nothing would be learnt."
        )
    filler(options)
    for what in options.noise_text or ():
        matches(what)
    if options.noise_text and not options.noise:
        raise UsageError(
            "--noise-text gives strange texts: say by --noise how many there are to be."
        )
    if options.probe_lengths and not any(kind == "task" for kind, _, _ in options.data):
        raise UsageError("--probe-lengths measures recall of tasks: name one in --data.")
    if options.overwrite and options.resume:
        raise UsageError("--overwrite begins again, and --resume goes on: choose one of them.")
    replaces = options.overwrite or options.resume
    result.require_place(Path(options.output).expanduser().absolute(), replaces)


def matches(pattern: str) -> list[Path]:
    """The files of `text:` and `jsonl:`, in order; `books` are those that come with the package, and
    `python` the modules of the standard library, which are wherever this runs.

    Raises:
        InputError: there are none.
    """
    from gemma_jax.tasks.haystacks import shipped

    found: list[Path] = []
    for part in pattern.split(","):
        names = sorted(glob.glob(part, recursive=True)) if glob.has_magic(part) else [part]
        files = [Path(name) for name in names if Path(name).is_file()]
        if part == SHIPPED and not files:
            files = [Path(name) for name in shipped("train")]
        if part == PYTHON and not files:
            files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        if not files:
            raise InputError(f"{part} does not exist: name files to learn from.")
        found += files
    return found


def filler(options: argparse.Namespace) -> list[Path]:
    """The files that tasks hide their facts in: those named, or the texts, or the package's books."""
    texts = [what for kind, what, _ in options.data if kind == "text"]
    return [file for what in options.filler or texts or [SHIPPED] for file in matches(what)]


# --- data -----------------------------------------------------------------------------------------


def make_data(
    options: argparse.Namespace, config: GemmaConfig, tokenizer: Any, directory: Path, tell: Any
) -> tuple[Any, list[Any]]:
    """The mixture of what is read, and the probes that measure recall."""
    from gemma_jax.text import batch_encoder
    from gemma_jax.train import corpus, sources
    from gemma_jax.train.data import Mixture
    from gemma_jax.train.noise import Noise
    from gemma_jax.train.plan import Ramp
    from gemma_jax.train.probe import Probe

    ends = tuple(n * config.memory.segment_length for n in options.segments)
    cache, end_id = directory / "ids", (config.eos_ids or (config.bos_id,))[0]
    encode = batch_encoder(tokenizer)

    def text(file: Path) -> corpus.Text:
        def told(file: Path, ids: int) -> None:
            tell(f"tokenizing {file.name}, {ids} tokens", ids, None)

        return corpus.tokenize_text(file, tokenizer, cache, told)

    others = [text(file) for what in options.noise_text or () for file in matches(what)]
    noise = Noise(options.noise, encode, tuple(others))

    def make(kind: str, what: str) -> list[Any]:
        weight = Ramp(*options.language_weight, ends)
        if kind == "task":
            hay = tuple(text(file) for file in filler(options))
            reach = config.memory.reach
            task = (what, hay, encode, config.bos_id, weight, Ramp(*options.density, ends), reach)
            task = (*task, noise, tuple(options.forms))
            more = {"loose": options.loose, "more_questions": options.more_questions}
            packed = Ramp(*options.packed, ends) if any(options.packed) else None
            return [sources.TaskSource(*task, **more, packed=packed)]
        if kind == "text":
            texts = tuple(text(file) for file in matches(what))
            return [sources.TextSource(texts, config.bos_id, weight, noise)]
        ids = {"bos_id": config.bos_id, "end_id": end_id}
        found = [corpus.tokenize_jsonl(file, tokenizer, cache, **ids) for file in matches(what)]
        return [
            sources.RecordSource(some)
            if isinstance(some, corpus.Records)
            else sources.TextSource((some,), config.bos_id, weight, noise)
            for some in found
        ]

    made, weights = [], []
    for kind, what, weight in options.data:
        some = make(kind, what)
        made += some
        weights += [Ramp(*(each / len(some) for each in weight), ends)] * len(some)
    mixture = Mixture(
        sources=tuple(made),
        weights=tuple(weights),
        seed=options.seed,
        segment_length=config.memory.segment_length,
        segments=options.segments,
        tokens_per_step=options.tokens_per_step,
        parts=options.accumulate,
        growth=options.growth,
        short_share=options.short_share,
        carry=options.carry,
        carried_rows=CARRIED_ROWS if options.carry and config.memory.rule != "off" else 0,
    )
    mixture.check()
    lengths = tuple(options.probe_lengths or ())
    asked = [source for source in made if isinstance(source, sources.TaskSource)] if lengths else []
    probes = [Probe(source, lengths, options.probe_questions) for source in asked]
    for probe in probes:
        probe.check()
    return mixture, probes


# --- the run --------------------------------------------------------------------------------------


def run_directory(options: argparse.Namespace) -> Path:
    output = Path(options.output).expanduser().absolute()
    return Path(options.run_dir or f"{output}.training").expanduser().absolute()


def make_run(
    options: argparse.Namespace,
    config: GemmaConfig,
    params: Any,
    mixture: Any,
    probes: list[Any],
    directory: Path,
    console: Any,
) -> tuple[Any, str]:
    """The run, at its beginning or at its last checkpoint, and what it trains."""
    import jax

    from gemma_jax.model.adapting import split
    from gemma_jax.model.memory import make_rule
    from gemma_jax.model.rule import MemoryRule
    from gemma_jax.train.loop import Run
    from gemma_jax.train.plan import Plan
    from gemma_jax.train.saving import Checkpoints
    from gemma_jax.train.step import WRITE_BIAS

    trained, frozen = split(
        params,
        options.train,
        rank=options.rank,
        key=jax.random.fold_in(jax.random.key(options.seed), 1),
    )
    rate = options.learning_rate
    plan = Plan(
        steps=options.steps,
        minutes=options.minutes,
        learning_rate=rate,
        memory_learning_rate=options.memory_learning_rate or rate,
        weight_decay=options.weight_decay,
        clip_norm=options.clip_norm,
        b1=options.b1,
        b2=options.b2,
        moment_dtype=options.moment_dtype,
        warmup=options.warmup,
        schedule=options.schedule,
        final_rate=options.final_rate,
        accumulate=options.accumulate,
        chunk_tokens=options.chunk_tokens,
        remat=None if options.remat == "nothing" else options.remat,
        write_penalty=options.write_penalty,
        write_margin=options.write_margin,
        write_loss=options.write_loss,
        log_steps=options.log_steps,
        probe_steps=options.probe_steps,
        checkpoint_minutes=options.checkpoint_minutes,
        checkpoint_steps=options.checkpoint_steps,
        stop_minutes=options.stop_after,
    )
    rule = config.memory.rule
    if plan.write_penalty and "offered" not in make_rule(config).init(1):
        raise UsageError(
            f"Memory rule {rule} does not count what it writes: leave out --write-penalty."
        )
    if plan.write_margin and WRITE_BIAS not in make_rule(config).params():
        raise UsageError(
            f"Memory rule {rule} has no parameter {WRITE_BIAS}: leave out --write-margin."
        )
    if plan.write_loss and type(make_rule(config)).write_loss is MemoryRule.write_loss:
        raise UsageError(f"Memory rule {rule} chooses no tokens: leave out --write-loss.")
    if plan.write_loss and not any(source.says_what_to_keep for source in mixture.sources):
        raise UsageError(
            "Nothing in --data tells what to keep: leave out --write-loss, or add tasks with facts."
        )
    checkpoints = Checkpoints(directory / "checkpoints", options.keep)
    begun_with = {
        name: value for name, value in vars(options).items() if name not in command_line.PER_RUN
    }
    begun_with[IDS] = mixture.files
    run = Run(
        config,
        trained,
        frozen,
        mixture,
        plan,
        directory,
        checkpoints=checkpoints,
        options=begun_with,
        probes=probes,
        workers=workers(options),
        tell=console.show,
    )
    checkpoints.clean()
    if checkpoints.steps() and not (options.resume or options.overwrite):
        raise UsageError(
            f"{directory} holds a run: go on with it by --resume, or begin again with --overwrite."
        )
    if options.overwrite:
        checkpoints.remove_all()
    if options.resume:
        resume(run, checkpoints, begun_with, console)
    return run, options.train


def resume(run: Any, checkpoints: Any, options: dict[str, Any], console: Any) -> None:
    """Takes up the last checkpoint that can be read; without any, the run begins."""
    for step in reversed(checkpoints.steps()):
        try:
            begun_with = checkpoints.options(step)
            warn_of_changes(begun_with, options, console)
            run.resume(step)
        except CorruptError as error:
            console.warning(str(error))
            continue
        console.line(f"going on after step {step}.")
        return


def warn_of_changes(begun_with: dict[str, Any], options: dict[str, Any], console: Any) -> None:
    """Says in which options a run goes on otherwise than it began.

    Raises:
        UsageError: the model, or what is trained of it, is another one.
    """
    import json

    options = json.loads(json.dumps(options))  # tuples are lists on disk
    for name, value in options.items():
        before = begun_with.get(name, value)  # the option may be newer than the run
        if before == value or name in AFTERWARDS:
            continue
        option = f"--{name.replace('_', '-')}"
        if name == IDS:
            console.warning("the files that are learnt from are others than when the run began.")
            continue
        if name in SHAPE:
            raise UsageError(
                f"The run began with {option} {before}, and is now given {value}: give what it began"
                " with, or choose another --output."
            )
        console.warning(
            f"the run began with {option} {before}, and goes on with {value}: it is no longer the run"
            " that it would have been."
        )


def workers(options: argparse.Namespace) -> int:
    """Processes that make batches: all cores but two, which feed the device."""
    if options.data_workers is not None:
        return options.data_workers
    return max(0, min(MOST_WORKERS, (os.cpu_count() or 1) - 2))


def describe(run: Any, mixture: Any, what: str) -> str:
    """What begins now, in one line."""
    import jax

    count = sum(leaf.size for leaf in jax.tree.leaves(run.progress.trained))
    lengths = ", ".join(f"{mixture.rows(length)} x {length}" for length in mixture.lengths)
    return f"training {what}: {count:,} parameters; batches of {lengths} tokens."


def write(
    options: argparse.Namespace,
    output: Path,
    config: GemmaConfig,
    run: Any,
    what: str,
    home: Path,
    console: Any,
) -> None:
    """Writes the checkpoint or the adapter."""
    from gemma_jax.model.adapting import between, scaled
    from gemma_jax.train import result
    from gemma_jax.train.start import make_model

    progress = run.progress
    training = {
        "steps": progress.step,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 1),
        "options": public(options),
    }
    if what == "all":
        params = progress.trained
        if options.update_scale != 1.0:
            given = options, filler(options), run_directory(options), console.show
            params = between(make_model(*given)[1], params, options.update_scale)
        result.write_model(output, config, params, home, training)
    else:
        trained = scaled(progress.trained, options.update_scale)
        result.write_adapter(
            output, config, trained, run.frozen, what, training, options.adapter_dtype
        )


def public(options: argparse.Namespace) -> dict[str, Any]:
    """The options that what was learnt depends on, with the names of files and not their places."""

    def names(pattern: str) -> str:
        return ",".join(Path(part).name for part in pattern.split(","))

    found = {
        name: value
        for name, value in vars(options).items()
        if value is not None and name not in command_line.PER_RUN
    }
    for name in ("model", "config", "tokenizer"):
        if name in found:
            found[name] = names(found[name])
    for name in ("filler", "noise_text"):
        if name in found:
            found[name] = [names(pattern) for pattern in found[name]]
    found["data"] = [(kind, names(what), weight) for kind, what, weight in found["data"]]
    return found
