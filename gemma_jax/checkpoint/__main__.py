"""`python -m gemma_jax.checkpoint FILE`: what a checkpoint, an adapter or a memory file holds."""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    from gemma_jax.inference.console import ArgumentParser, run_command

    parser = ArgumentParser(
        prog="python -m gemma_jax.checkpoint",
        description="Prints what a checkpoint, an adapter or a memory file holds, and checks it.",
    )
    parser.add_argument("file", metavar="FILE", help="a directory, or a memory file")
    parser.add_argument("--no-verify", action="store_true", help="do not check hashes")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(arguments)

    def show() -> None:
        from gemma_jax.inference.describe import describe

        for line in describe(options.file, verify=not options.no_verify):
            print(line)

    return run_command(show, debug=options.debug)


if __name__ == "__main__":
    from gemma_jax.inference.console import leave

    leave(main())
