"""Checkpoints of a training run: everything that the next step depends on, so that a run that was
stopped at any moment goes on as if nothing had been.

    step-00001200/arrays/     trained parameters, the optimiser's state, memories kept for later sequences
    step-00001200/step.json   the step, the time used so far, and the options the run began with
    step-00001200/manifest.json

The data need no more than the step: batch i is a function of the seed and i.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from gemma_jax.checkpoint import store
from gemma_jax.errors import CorruptError

ARRAYS, DESCRIPTION, PREFIX = "arrays", "step.json", "step-"


@dataclasses.dataclass
class Progress:
    """Where a run is.

    Attributes:
        step: steps done.
        seconds: used for them.
        tokens: read in them.
        unlogged: what was measured in steps that are in no row of the log yet.
        trained, optimizer_state, carried: what the next step starts from.
    """

    step: int
    seconds: float
    tokens: int
    unlogged: list[dict[str, float]]
    trained: Any
    optimizer_state: Any
    carried: Any


class Checkpoints:
    """The last `keep` checkpoints of a run, in a directory of their own."""

    def __init__(self, directory: Path, keep: int = 2):
        self._directory, self._keep = directory, keep

    def steps(self) -> list[int]:
        """Those that there are, in order."""
        names = (path.name for path in self._directory.glob(f"{PREFIX}*"))
        return sorted(int(name.removeprefix(PREFIX)) for name in names)

    def save(self, progress: Progress, options: dict[str, Any]) -> None:
        """Writes a checkpoint: it is there as a whole, or not at all."""
        from orbax.checkpoint import v1 as ocp

        with store.new_directory(self._path(progress.step)) as content:
            ocp.save(content / ARRAYS, _as_tree(progress))
            description = {
                "step": progress.step,
                "seconds": progress.seconds,
                "tokens": progress.tokens,
                "unlogged": progress.unlogged,
                "options": options,
            }
            (content / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
            store.write_manifest(content)
        for step in self.steps()[: -self._keep]:
            shutil.rmtree(self._path(step), ignore_errors=True)

    def options(self, step: int) -> dict[str, Any]:
        """The options of a run, as one of its checkpoints tells them."""
        return self._describe(step)["options"]

    def load(self, step: int, like: Progress) -> Progress:
        """A checkpoint, in the shapes of `like`.

        Raises:
            CorruptError: it is not what was written, or of a run with other shapes.
        """
        path = self._path(step)
        store.check(path, remedy="continue from an earlier checkpoint by removing it")
        tree = store.load_params(path / ARRAYS, _as_tree(like))
        description = self._describe(step)
        return _from_tree(tree, like, description)

    def clean(self) -> None:
        """Removes what a run that was killed while it wrote a checkpoint has left."""
        for path in self._directory.glob(f".{PREFIX}*.partial"):
            shutil.rmtree(path, ignore_errors=True)

    def remove_all(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self._directory / f"{PREFIX}{step:08}"

    def _describe(self, step: int) -> dict[str, Any]:
        path = self._path(step) / DESCRIPTION
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise CorruptError(
                f"{path} cannot be read ({error}): remove this checkpoint."
            ) from error


def _as_tree(progress: Progress) -> dict[str, Any]:
    """Arrays by names alone: other containers are not kept on disk."""
    import jax

    parts = {"optimizer": progress.optimizer_state, "carried": progress.carried}
    leaves = {name: jax.tree.leaves(part) for name, part in parts.items()}
    numbered = {
        name: {f"{i:05}": leaf for i, leaf in enumerate(some)}
        for name, some in leaves.items()
        if some
    }
    return {"trained": progress.trained, **numbered}


def _from_tree(tree: dict[str, Any], like: Progress, description: dict[str, Any]) -> Progress:
    import jax

    def part(name: str, like: Any) -> Any:
        leaves = [leaf for _, leaf in sorted(tree.get(name, {}).items())]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    return Progress(
        description["step"],
        description["seconds"],
        description["tokens"],
        description["unlogged"],
        tree["trained"],
        part("optimizer", like.optimizer_state),
        part("carried", like.carried),
    )
