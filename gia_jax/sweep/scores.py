"""Scores of a sweep in a store against the truth, kept beside what was found."""

from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from gia_jax.base import Batch
from gia_jax.modalities import Modality
from gia_jax.sweep.results import lanes_of, open_sweep
from gia_jax.sweep.shards import SCORES, inside, open_group, place

if TYPE_CHECKING:
    import xarray

NUM_PICTURES = 16  # examples under every setting whose pixels are kept for the report


def best_restart(found: "xarray.Dataset") -> "xarray.Dataset":
    """Chooses the restart with the lowest finite loss for every victim under every setting, as `sweep` does.

    Args:
        found: Dataset, as `open_sweep` reads it.

    Returns:
        The dataset without the dimension restart. A victim of which no restart is done or finite has the first one.
    """
    loss = found.loss.where(found.is_finite & found.done).fillna(np.inf)
    return found.isel(restart=loss.argmin("restart"))


def score_sweep(store: str | Path, truth: Batch, modality: Modality) -> "xarray.Dataset":
    """Scores the best restart of every victim under every setting, and writes the scores to the store.

    The truth plays no part in what is scored: the restarts are chosen by the attacker's own loss. `open_sweep` reads
    the scores with the rest, and `python -m gia_jax report` shows them, with pictures of the first examples where they
    are images.

    Args:
        store: Store that `stored_sweep` wrote, complete or not.
        truth: True batches of the v victims in the model's space, with the axes (v, b).
        modality: What an example is.

    Returns:
        The dataset of the store with an array (setting, victim, example) for every score of the modality, such as
        "psnr". It is NaN where nothing finite was found.

    Raises:
        ValueError: If there is no such store, or the truth is not of its victims and examples.
        ImportError: If the extra `sweep` is not installed.
    """
    found = lanes_of(store)
    best = best_restart(found)
    names = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(truth._asdict())
    }
    for name, leaf in names.items():
        if name not in best:
            raise ValueError(
                f"truth.{name} must be one of the arrays that were found, {sorted(map(str, best.data_vars))}"
            )
        if name != "labels" and leaf.shape != best[name].shape[1:]:
            raise ValueError(f"truth.{name} must have the shape {best[name].shape[1:]}, got {leaf.shape}")
    is_finite = (best.is_finite & best.done).values
    columns, reconstructions = {}, []
    for i in range(found.sizes["setting"]):
        leaves = [best[name].values[i] for name in names]
        of_setting = Batch(**jax.tree.unflatten(jax.tree.structure(truth._asdict()), leaves))
        scored = modality.score_fn(of_setting, truth)
        for name, values in scored.scores.items():
            of_found = np.where(is_finite[i].reshape(-1, *[1] * (values.ndim - 1)), values, np.nan)
            columns.setdefault(name, []).append(of_found)
        reconstructions.append(scored.batch)
    group = open_group(inside(place(store), SCORES), "w")
    for name, values in columns.items():
        group.create_array(name, data=np.stack(values), dimension_names=("setting", "victim", "example"))
    if modality.pixels_fn is not None:
        pixels = [modality.pixels_fn(one)[0][:NUM_PICTURES] for one in (truth, *reconstructions)]
        pictures = group.require_group("pictures")
        pictures.create_array("original", data=pixels[0].astype(np.float32))
        pictures.create_array("reconstruction", data=np.stack(pixels[1:]).astype(np.float32))
    shown = {name: one._asdict() for name, one in modality.shown.items()}
    group.attrs.update({"shown": shown, "num_done": int(found.done.sum())})
    return open_sweep(store)
