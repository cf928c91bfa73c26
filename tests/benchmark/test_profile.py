"""A profile says which kernels took how long, for what of the model, and how long nothing ran."""

import re

import jax
import pytest

from gemma_jax.benchmark import command, profile
from gemma_jax.benchmark.profile import Kernel

PROGRAM = """HloModule jit_f, is_scheduled=true

ENTRY %main (p: f32[3]) -> f32[3] {
  %p = f32[3]{0} parameter(0), metadata={op_name="tokens"}
  %call.7 = f32[3]{0} custom-call(%p), metadata={op_name="jit(f)/while/layers_0/mlp/mul"}
  %call.8 = f32[3]{0} custom-call(%p), metadata={op_name="jit(f)/body/jit(g)/layers_1/mlp/vmap()/mul"}
  %back.1 = f32[3]{0} fusion(%p), metadata={op_name="jit(f)/transpose(jvp(layers_1))/mlp/dot"}
  %twice = f32[3]{0} fusion(%p), metadata={op_name="jit(f)/jvp(layers_0)/rematted_computation/mlp/dot"}
  ROOT %loop_add-fusion.3 = f32[3]{0} fusion(%p), metadata={op_name="jit(f)/layers_1/norm/add" id=3}
}
"""
STAMP = {
    "command": "python -m gemma_jax.benchmark decode",
    "device": "a GPU",
    "date": "2026-11-27",
    "versions": {"jax": "0.11.2"},
}


def rows(page):
    found = [row.strip("| ").split(" | ") for row in re.findall(r"^\| \d.*$", page, re.MULTILINE)]
    return [[cell.strip() for cell in row] for row in found]


def test_layers_count_together():
    found = profile.scopes(PROGRAM)
    assert found["call.7"] == found["call.8"] == "layer/mlp/mul"
    assert found["loop_add-fusion.3"] == "layer/norm/add"
    assert found["back.1"] == "backward: layer/mlp/dot" and found["twice"] == "again: layer/mlp/dot"


def test_the_page_adds_up():
    kernels = [
        Kernel("product", 0.000, 0.004, "jit_f", "call.7"),
        Kernel("product", 0.004, 0.007, "jit_f", "call.8"),
        Kernel("loop_add_fusion_3", 0.008, 0.010),  # of a graph, whose kernels have but a name
        Kernel("copy", 0.0085, 0.009, "jit_g", "call.7"),  # beside it, of another program
    ]
    ((wait, before, after),) = profile.waits(kernels)
    assert wait == pytest.approx(0.001) and (before, after) == (kernels[1], kernels[2])
    page = profile.page("decode", kernels, PROGRAM, STAMP)
    assert STAMP["command"] in page and "a GPU, 2026-11-27, jax 0.11.2" in page
    assert "10.00 ms from the first kernel to the end, 4 launches" in page
    assert "nothing ran in 1.00 ms." in page
    assert rows(page) == [
        ["7.00", "70.0%", "2", "3500.0", "`product`", "layer/mlp/mul"],
        ["2.00", "20.0%", "1", "2000.0", "`loop_add_fusion`", "layer/norm/add"],
        ["0.50", "5.0%", "1", "500.0", "`copy`"],
        ["1.00", "10.0%", "1", "1000.0", "`product`", "`loop_add_fusion`"],
    ]


def test_without_a_wait_there_is_no_table_of_them():
    page = profile.page(
        "decode", [Kernel("product", 0.0, 1.0), Kernel("copy", 1.0, 2.0)], "", STAMP
    )
    assert "nothing ran in 0.00 ms" in page and "after" not in page


def test_many_kinds_of_kernels_are_summed_up():
    number = profile.KERNEL_ROWS + 5
    kernels = [Kernel(f"{'k' * (i + 1)}_1", i, i + 1) for i in range(number)]
    found = rows(profile.page("decode", kernels, "", STAMP))
    assert len(found) == profile.KERNEL_ROWS + 1
    assert found[-1] == ["5000.00", f"{5 / number:.1%}", "5", "1000000.0", "5 others"]


def test_without_a_gpu_the_error_comes_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    arguments = ["decode", "--preset", "gemma-2b", "--profile", str(tmp_path / "profiles")]
    assert command.main([*arguments, "--no-ceilings"]) == 2
    assert "--profile shows the kernels of a GPU" in capsys.readouterr().err
    assert not (tmp_path / "profiles").exists()
