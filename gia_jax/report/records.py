"""Records of a study as valid JSON: its settings, versions, hardware and time, and the scores of every victim."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gia_jax._environment import hardware, versions
from gia_jax.metrics.explained import Explained
from gia_jax.sweep.study import Study


def results(
    study: Study,
    scores: Mapping[str, np.ndarray] | None,
    *,
    label_correct: np.ndarray | None = None,
    explained: Explained,
    settings: dict[str, Any],
    threat_model: str,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Collects the results of a study with all that they depend on: the content of a file results.json.

    Args:
        study: Study of v victims.
        scores: Scores of every example of its reconstructions by name, each of shape (v, b), such as the scores of a
            modality. None is for victims whose true data are not known.
        label_correct: Share of each victim's labels that were recovered, shape (v,). None leaves it out.
        explained: How much of each victim's update its reconstruction explains, in arrays of shape (v,).
        settings: Settings of the attack and its victims, by name.
        threat_model: Description of the threat model, such as `ThreatModel.describe` returns.
        extra: Further entries, by name. None adds none.

    Returns:
        The content, for `to_json`: the settings, the threat model, the versions, the hardware, the times in seconds and
        milliseconds, the further entries, and under "victims" a record of every victim. A record holds how much of the
        update is explained, the attacker's loss, whether it is finite, and the losses of all restarts. With `scores` it
        also holds the mean of every score over the victim's examples by its name, the first score of each example, such
        as "psnr_per_example", and the share of right labels in [0, 1].

    Examples:
        >>> import numpy as np
        >>> from gia_jax import Batch, Reconstruction
        >>> from gia_jax.metrics.explained import Explained
        >>> from gia_jax.report import results
        >>> from gia_jax.sweep import Study, Timing
        >>> batch = Batch(np.zeros((1, 1, 2)), np.zeros((1, 1), int))
        >>> found = Reconstruction(batch, np.array([0.5]), np.array([True]), np.array([[0.5, 0.75]]))
        >>> study = Study(found, losses=np.zeros((1, 2, 9)), timing=Timing(2.0, 1.0, 50.0))
        >>> explained = Explained(*(np.ones(1) for _ in Explained._fields))
        >>> record = results(study, None, explained=explained, settings={"steps": 9}, threat_model="a curious server")
        >>> record["settings"], record["run_seconds"], record["victims"][0]["restart_losses"]
        ({'steps': 9}, 1.0, [0.5, 0.75])
    """

    def record(v: int) -> dict[str, Any]:
        compared: dict[str, Any] = {}
        if scores is not None:
            compared = {name: float(np.mean(values[v])) for name, values in scores.items()}
            first = next(iter(scores))
            compared[f"{first}_per_example"] = scores[first][v].tolist()
        if label_correct is not None:
            compared["label_correct"] = float(label_correct[v])
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


def to_json(content: Any) -> str:
    """Converts a value to valid JSON.

    JSON has no infinite and no undefined numbers: they become the strings "inf", "-inf" and "nan", which `float` reads.
    Arrays of NumPy and JAX become lists, and so do sets, in the order of their text. Paths and the keys of mappings
    become text.

    Args:
        content: Value of numbers, text, arrays, paths, sequences, sets and mappings.

    Returns:
        The JSON text, indented and with a line break at the end.

    Raises:
        ValueError: If a value has no counterpart in JSON, or two keys of a mapping have the same text.

    Examples:
        >>> import numpy as np
        >>> from gia_jax.report import to_json
        >>> print(to_json({"psnr": np.inf, "steps": np.int32(9)}), end="")
        {
          "psnr": "inf",
          "steps": 9
        }
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
