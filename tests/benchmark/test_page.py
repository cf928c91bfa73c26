"""The page shows every record there is, beside its target, and draws what belongs together."""

import dataclasses

import pytest

from benchmarks import page
from gemma_jax.benchmark import records


def made(name, unit, *values, **changes):
    return dataclasses.replace(records.make_record(name, unit, list(values)), **changes)


@pytest.mark.parametrize("number", [700, 1000, 2048, 8192, 100_000, 131_072, 524_288, 10_000_000])
def test_lengths_are_read_back_from_labels(number):
    assert page.tokens(records.label(number)) == number


def test_page_and_plots_of_made_up_records(tmp_path):
    file = tmp_path / "made_up.json"
    content = [
        made("prefill_10m_tokens_per_second", "tokens/s", 149_000.0, 151_000.0, 152_000.0),
        made("prefill_8k_tokens_per_second", "tokens/s", 140_000.0),
        made("hf_prefill_8k_tokens_per_second", "tokens/s", 106_000.0, command="peer command"),
        made("decode_tokens_per_second", "tokens/s", 418.0),
        made("int8_peak_bytes", "bytes", 4.4e9),
    ]
    records.append(file, content)
    page.main([str(file)])
    text = (tmp_path / "README.md").read_text()
    for record in content:
        assert f"| {record.name} | " in text and record.command in text
    assert (
        "| prefill_10m_tokens_per_second | 151,000 | tokens/s | at least 150,000 | reached |"
        in text
    )
    assert "| decode_tokens_per_second | 418 | tokens/s | at least 700 | not reached |" in text
    assert "| int8_peak_bytes | 4,400,000,000 | bytes | at most 4,500,000,000 | reached |" in text
    assert "| 149,000 | 152,000 |" in text
    assert "speed.svg" in text and (tmp_path / "speed.svg").stat().st_size < 100_000
    assert "memory.svg" not in text and not (tmp_path / "memory.svg").exists()


def test_series_take_their_own_figures_and_the_latest():
    content = [
        made("prefill_8k_tokens_per_second", "tokens/s", 1.0),
        made("prefill_8k_tokens_per_second", "tokens/s", 2.0, command="later"),
        made("prefill_131k_tokens_per_second", "tokens/s", 3.0),
        made("prefill_8k_segment_tokens_per_second", "tokens/s", 4.0),
        made("gemma3_270m_prefill_8k_tokens_per_second", "tokens/s", 5.0),
    ]
    assert page.series(content, "prefill_{}_tokens_per_second") == {8192: 2.0, 131_072: 3.0}


def test_no_records_are_a_page_without_tables(tmp_path):
    file = tmp_path / "none.json"
    file.write_text("[]")
    page.main([str(file)])
    assert (tmp_path / "README.md").read_text().startswith("# Measured")
