"""Adapters that come with the project: whole, small, and with the notice that terms ask for."""

from pathlib import Path

import pytest

from gemma_jax.checkpoint import adapter as adapters

SHIPPED = sorted((Path(adapters.__file__).parents[1] / "adapters").iterdir())


@pytest.mark.parametrize("directory", SHIPPED, ids=lambda path: path.name)
def test_it_is_whole_and_says_what_it_is(directory):
    adapter = adapters.read(directory)
    assert adapter.base == directory.name and adapter.memory.rule != "off"
    assert adapter.training["steps"] and adapter.training["options"]["data"]
    assert sum(file.stat().st_size for file in directory.iterdir()) < 16e6
    notice = (directory / "NOTICE").read_text()
    assert "Gemma is provided under and subject to the Gemma Terms of Use" in notice
    assert str(adapter.training["steps"]) in (directory / "README.md").read_text()
