"""Teaching a memory, or a whole model: data, steps, runs that can be resumed, and what they make."""
