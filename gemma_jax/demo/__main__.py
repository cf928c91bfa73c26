"""`python -m gemma_jax.demo`: facts in a long text, read and asked for, with and without memory."""

from gemma_jax.demo.command import main
from gemma_jax.inference.console import leave

leave(main())
