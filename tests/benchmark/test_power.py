"""Clock and power come from nvidia-smi, as often as it was asked, or not at all."""

import os
import time

import pytest

from gemma_jax.benchmark import power
from gemma_jax.model import kernels

SAYS = """#!/bin/sh
printf '1980, 120.5\\n1500, 690.5\\n[N/A], [N/A]\\n1530, 691.5\\n15'
echo "$*" > "$0.asked"
exec sleep 60
"""


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    file = tmp_path / "nvidia-smi"
    file.write_text(SAYS)
    file.chmod(0o755)
    monkeypatch.setattr(kernels, "compute_capability", lambda: 9)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    return file


def test_what_was_sampled(gpu):
    asked = gpu.with_name("nvidia-smi.asked")
    with power.watched() as samples:
        for _ in range(1000):
            if asked.exists() and asked.read_text():
                break
            time.sleep(0.02)
        assert "-i 3 " in asked.read_text() and "--loop=2" in asked.read_text()
    assert list(samples.figures("prefill")) == [
        ("prefill_clock", "MHz", [1500.0, 1530.0]),
        ("prefill_power", "W", [690.5, 691.5]),
    ]


def test_of_a_single_sample_nothing_is_said():
    samples = power.Samples()
    samples.clock, samples.power = [1980.0], [120.0]
    assert not [*samples.figures("prefill")]


def test_without_nvidia_smi_nothing_is_said(gpu, monkeypatch):
    gpu.unlink()
    monkeypatch.setenv("PATH", str(gpu.parent))
    with power.watched() as samples:
        pass
    assert not [*samples.figures("prefill")]


def test_a_cpu_is_not_asked(gpu, monkeypatch):
    monkeypatch.setattr(kernels, "compute_capability", lambda: 0)
    with power.watched() as samples:
        pass
    assert not [*samples.figures("prefill")] and not gpu.with_name("nvidia-smi.asked").exists()
