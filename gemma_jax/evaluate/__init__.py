"""What a model makes of a text, and what it remembers of it: `python -m gemma_jax.evaluate`.

command, options   what to evaluate, checked and planned before anything is loaded
plan, haystack     a grid of tasks, lengths and depths as texts with questions
grid, journal      runs what is unfinished; every finished trial on disk at once
running, peer      our model, and Hugging Face transformers, that read and answer
statistics         intervals of accuracies
results, report    tables, files and records of finished trials
heatmap            accuracy by length and depth as a picture
perplexity         the other mode: mean NLL of a text by position
"""
