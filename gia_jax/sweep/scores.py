"""Scores of the reconstructions in a store against the true data, which are written to the same store."""

from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from gia_jax.base import Batch
from gia_jax.modalities import Modality
from gia_jax.sweep.results import lanes_of, open_sweep
from gia_jax.sweep.shards import SCORES, by_name, inside, open_group, place

if TYPE_CHECKING:
    import xarray

NUM_PICTURES = 16  # examples under every setting whose pixels are kept for the report


def best_restart(found: "xarray.Dataset") -> "xarray.Dataset":
    """Chooses the restart with the lowest finite loss for every victim under every setting, as `sweep` does.

    Args:
        found: Dataset of a sweep, as `open_sweep` reads it.

    Returns:
        The dataset without the dimension restart. If no restart of a victim has been run with a finite result, its
        first restart is taken.

    Examples:
        >>> import xarray
        >>> from gia_jax.sweep import best_restart
        >>> restarts = {"loss": [[[0.3, 0.1, 0.2]]], "is_finite": [[[True] * 3]], "done": [[[True, True, False]]]}
        >>> found = xarray.Dataset({name: (("setting", "victim", "restart"), own) for name, own in restarts.items()})
        >>> best_restart(found).loss.values.tolist()
        [[0.1]]
    """
    loss = found.loss.where(found.is_finite & found.done).fillna(np.inf)
    return found.isel(restart=loss.argmin("restart"))


def score_sweep(store: str | Path, truth: Batch, modality: Modality) -> "xarray.Dataset":
    """Scores the best restart of every victim under every setting, and writes the scores to the store.

    The best restart is the one with the lowest loss of the attacker, so that the truth has no part in the choice.
    `open_sweep` reads the scores with the other arrays, and `python -m gia_jax report` shows them, with pictures of the
    first 16 examples if the examples are images. Earlier scores in the store are replaced.

    Args:
        store: Path or address of a store that `stored_sweep` wrote. The sweep need not be complete.
        truth: True batches of the v victims as the model sees them, such as normalised images: every leaf has leading
            axes (v, b), where b is the number of examples of a victim.
        modality: Modality of the examples, such as that of `modalities.image`.

    Returns:
        The dataset of the store with an array (setting, victim, example) for every score of the modality, such as
        "psnr" in dB. Scores of reconstructions that are not finite, or have not been run, are NaN.

    Raises:
        ValueError: If there is no such store, or the truth has other arrays or shapes than the reconstructions.
        ImportError: If the extra `sweep` is not installed.

    Examples:
        The update of this client is its image, which one step of gradient descent at a rate of 0.5 finds:

        >>> import tempfile
        >>> import jax, jax.numpy as jnp, optax
        >>> from gia_jax import Batch, Observation, gradient_matching, modalities
        >>> from gia_jax.sweep import grid, score_sweep, stored_sweep
        >>> def client_fn(params, batch):
        ...     return batch.inputs[0]
        >>> def make_attack(setting):
        ...     squared = lambda simulated, observed: jnp.sum((simulated - observed) ** 2)
        ...     return gradient_matching(client_fn, objective_fn=squared, optimizer=optax.sgd(setting["rate"]))
        >>> truth = Batch(jax.random.uniform(jax.random.key(0), (1, 1, 4, 4, 1)), jnp.array([[0]]))
        >>> extra = {"inputs_like": jnp.zeros((1, 1, 4, 4, 1)), "labels": truth.labels}
        >>> seen, key = Observation(jnp.zeros((4, 4, 1)), truth.inputs[:, 0], extra), jax.random.key(1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = stored_sweep(folder, make_attack, grid(rate=[0.5, 0.0]), key, seen, num_steps=2)
        ...     found = score_sweep(folder, truth, modalities.image((4, 4, 1)))
        >>> found.psnr.dims, (found.psnr > 60).values.ravel().tolist()
        (('setting', 'victim', 'example'), [True, False])
    """
    found = lanes_of(store)
    best = best_restart(found)
    names = by_name("truth", truth._asdict())
    for name, leaf in names.items():
        if name not in best:
            raise ValueError(
                f"truth.{name} must be one of the arrays of the reconstructions, {sorted(map(str, best.data_vars))}"
            )
        if name != "labels" and np.shape(leaf) != best[name].shape[1:]:
            raise ValueError(f"truth.{name} must have the shape {best[name].shape[1:]}, got {np.shape(leaf)}")
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
