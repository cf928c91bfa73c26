"""How fast and how large: `python -m gemma_jax.benchmark prefill decode --preset gemma-2b --tokens 1M`.

Random tokens (or real text) through the functions that `run.py` uses, with random weights of a published
shape or a converted model. What the device does at best is measured in the same run, first and by a
process of its own: a GPU that has worked for a minute slows down to keep to its power.

    command.py    what is measured, and in which process
    running.py    prefill, decode
    training.py   train-step
    files.py      load, read
    peer.py       the same with Hugging Face transformers
    device.py     what the device does at best
    power.py      clock and power while the device reads
    profile.py    where the time goes
    hlo.py        whether a compiled loop moves weights about
    records.py    figures: names, table, file
"""
