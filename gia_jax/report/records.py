"""Records of a run: settings, versions, hardware, cost and a line for every victim, as valid JSON."""

import json
import math
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gia_jax.metrics.explained import Explained
from gia_jax.metrics.scores import Scores
from gia_jax.sweep.study import Study


def results(
    study: Study,
    scores: Scores | None,
    *,
    explained: Explained,
    settings: dict[str, Any],
    threat_model: str,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Collects what a number depends on, and a record of every victim: the content of results.json.

    Args:
        study: Study of v victims.
        scores: Scores of its reconstructions; None where there is no truth to compare with.
        explained: How much of each victim's update its reconstruction explains, arrays of shape (v,).
        settings: Settings of the attack and its victims, by name.
        threat_model: Words of the threat model.
        extra: Further entries, by name.

    Returns:
        The content, for `to_json`: settings, threat model, versions, hardware, seconds, and records of the victims.
    """

    def record(v: int) -> dict[str, Any]:
        compared: dict[str, Any] = {}
        if scores is not None:
            compared = {name: float(np.mean(getattr(scores, name)[v])) for name in ("psnr", "ssim", "mse")}
            compared["psnr_per_image"] = scores.psnr[v].tolist()
            compared["label_correct"] = float(scores.label_correct[v])
        r = study.reconstruction
        return compared | {
            "explained": {name: float(value[v]) for name, value in explained._asdict().items()},
            "loss": float(r.loss[v]),
            "is_finite": bool(r.is_finite[v]),
            "restart_losses": np.asarray(r.restart_losses[v]).tolist(),
        }

    return {
        "settings": settings,
        "threat_model": threat_model,
        "versions": versions(),
        "hardware": hardware(),
        **study.timing._asdict(),
        **(extra or {}),
        "victims": [record(v) for v in range(len(study.reconstruction.loss))],
    }


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that numbers depend on."""
    names = ("gia-jax", "jax", "jaxlib", "flax", "optax", "numpy", "dm-pix")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


def hardware() -> str:
    """The devices, and on a CPU its model and cores."""
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


def to_json(content: Any) -> str:
    """Valid JSON: an infinite or undefined number becomes the string "inf", "-inf" or "nan", which `float` reads.

    Arrays of NumPy and JAX become lists, sets become lists in the order of their text, paths become text, and so do the
    keys of mappings.

    Raises:
        ValueError: A value has no counterpart in JSON, or two keys have the same text.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            found = {key if isinstance(key, str) else str(plain(key)): plain(item) for key, item in value.items()}
            if len(found) < len(value):
                raise ValueError(f"content must have keys of different text, got {list(value)}")
            return found
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if isinstance(value, (set, frozenset)):
            return [plain(item) for item in sorted(value, key=str)]
        is_array = isinstance(value, (np.ndarray, np.generic, jax.Array)) and not isinstance(value, (float, str))
        if is_array and not jnp.issubdtype(value.dtype, jax.dtypes.extended):
            return plain(np.asarray(value).tolist())
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else str(float(value))
        if isinstance(value, Path):
            return str(value)
        if value is None or isinstance(value, (bool, int, str)):
            return value
        raise ValueError(f"content must be of numbers, text, lists and mappings, got {type(value).__name__}")

    return json.dumps(plain(content), indent=2, allow_nan=False) + "\n"
