"""What a model makes of a text, and what it remembers of it: `python -m gemma_jax.evaluate`.

command       the options, and what is done with them
plan          a grid of tasks, lengths and depths as haystacks with their questions
haystack      a haystack's ids as they are read, and what is known of each trial
running       reading and answering with our model, in a few compiled shapes
peer          the same trials with Hugging Face transformers, in a process of its own
journal       every finished trial on disk at once
statistics    intervals of accuracies
results       tables, files and records of finished trials
heatmap       accuracy by length and depth as a picture
perplexity    the other mode: mean NLL of a text by position
"""
