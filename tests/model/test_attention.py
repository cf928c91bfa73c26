"""Which kernel attention takes; what it computes is tested with the whole model."""

from types import SimpleNamespace

import jax
import pytest

from gemma_jax.model.attention import cudnn_takes


@pytest.mark.parametrize(
    "platform, version, capability, narrow, wide",
    [
        ("cpu", "<unknown>", None, False, False),
        ("gpu", "cuda 12090", "7.5", False, False),
        ("gpu", "cuda 12090", "8.0", True, False),
        ("gpu", "cuda 12090", "9.0", True, True),
        ("gpu", "cuda 13000", "10.3", True, True),
        ("gpu", "rocm 60300", "gfx942", False, False),
    ],
)
def test_cudnn_is_asked_only_for_what_it_takes(
    monkeypatch, platform, version, capability, narrow, wide
):
    device = SimpleNamespace(
        platform=platform,
        compute_capability=capability,
        client=SimpleNamespace(platform_version=version),
    )
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert (cudnn_takes(128), cudnn_takes(256)) == (narrow, wide)
