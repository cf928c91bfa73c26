"""The device that is used."""

import jax


def default_device() -> jax.Device:
    """Where parameters are loaded, a State begins and programs run."""
    device = jax.config.jax_default_device or jax.local_devices()[0]
    return jax.devices(device)[0] if isinstance(device, str) else device
