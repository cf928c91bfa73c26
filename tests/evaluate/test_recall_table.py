"""The table on standard output can be read whatever is in it."""

import re

from gemma_jax.evaluate import results
from gemma_jax.evaluate.results import Cell
from gemma_jax.evaluate.statistics import estimate


def cell(tokens, depth, trials, failed=0, not_run=0):
    found = estimate(("one", 1.0) for _ in range(trials))
    return Cell("ours", "passkey", tokens, depth, depth == 1.0, failed, not_run, 0.0, found)


def test_columns_begin_below_each_other_however_much_a_cell_says():
    found = [
        *(cell(4096, 0.0, 4), cell(4096, 1.0, 4), cell(4096, None, 4)),
        *(cell(10_000_000, 0.0, 1000, failed=7), cell(10_000_000, 1.0, 0, failed=2)),
        cell(10_000_000, None, 1000, failed=7),
    ]
    lines = results.table(found, {"passkey": 0.1}, {"ours": "a model"})
    head, *rows = [line for line in lines if re.match(r" *(tokens|[\d,]+)  ", line)]
    starts = [match.start() for match in re.finditer("depth|pooled", head)]
    assert len(rows) == 2 and len(starts) == 3
    for row in rows:
        assert all(row[at - 2 : at] == "  " and row[at] != " " for at in starts), lines
    assert any("n=1000 7 failed" in row for row in rows)
