"""`python -m gemma_jax.benchmark`."""

from gemma_jax.benchmark.command import main
from gemma_jax.inference.console import leave

leave(main())
