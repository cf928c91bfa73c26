"""From text to an answer: reading into a State, decoding from one."""
