"""The environment on which results depend beside their settings: versions of packages, and devices."""

import platform
from importlib import metadata
from pathlib import Path

import jax


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that results depend on.

    Returns:
        The versions by the names of the packages, "python" first.

    Examples:
        >>> from gia_jax.report import versions
        >>> list(versions())[:3]
        ['python', 'gia-jax', 'jax']
    """
    names = ("gia-jax", "jax", "jaxlib", "flax", "optax", "numpy", "dm-pix")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


def hardware() -> str:
    """Describes the devices that JAX computes on.

    Returns:
        The number and the kind of the devices, or the number of cores and the model of a CPU.

    Examples:
        >>> from gia_jax.report import hardware
        >>> isinstance(hardware(), str)
        True
    """
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = models[0] if models else model
        return f"{len(models)} cores of {model}"
    return model
