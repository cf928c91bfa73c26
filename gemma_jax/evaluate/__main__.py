"""`python -m gemma_jax.evaluate`."""

from gemma_jax.evaluate.command import main
from gemma_jax.inference.console import leave

if __name__ == "__main__":
    leave(main())
