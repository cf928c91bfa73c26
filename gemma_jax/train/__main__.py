"""`python -m gemma_jax.train`."""

from gemma_jax.inference.console import leave
from gemma_jax.train.command import main

if __name__ == "__main__":  # the processes that make batches import this too
    leave(main())
