"""The federation of the command line in which workers hold different parts of the same images, and CAFE on it."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from gia_jax import attacks, clients, data, report
from gia_jax.attacks.cafe import batch_condition, check_identifiable
from gia_jax.base import Batch, Observation, Params, Reconstruction
from gia_jax.cases import Outcome
from gia_jax.labels import Dense, dense
from gia_jax.models.layers import fan_in_uniform
from gia_jax.study import study_analytic
from gia_jax.threat import ThreatModel, observe

NUM_WORKERS, WIDTH, OUTPUTS = 4, 32, 10
THREAT = ThreatModel(batch_indices=True)


def parameters(key: PRNGKeyArray, slice_size: int, num_classes: int) -> Params:
    """Parameters of four workers with two dense layers, from a slice to ten numbers, and of a server with one, in
    PyTorch's default initialisation.
    """

    def layer(key: PRNGKeyArray, inputs: int, features: int) -> Params:
        key_kernel, key_bias = jax.random.split(key)
        kernel = fan_in_uniform(key_kernel, (inputs, features))
        bias = jax.random.uniform(key_bias, (features,), minval=-(inputs**-0.5), maxval=inputs**-0.5)
        return {"kernel": kernel, "bias": bias}

    def worker(key: PRNGKeyArray) -> Params:
        first, last = jax.random.split(key)
        return {"first": layer(first, slice_size, WIDTH), "last": layer(last, WIDTH, OUTPUTS)}

    *workers, server = jax.random.split(key, NUM_WORKERS + 1)
    return {"workers": [worker(own) for own in workers], "server": layer(server, NUM_WORKERS * OUTPUTS, num_classes)}


def fully_connected(layer: Params, inputs: Float[Array, "b d"]) -> Float[Array, "b f"]:
    """A layer of `parameters`; the server's is one."""
    return inputs @ layer["kernel"] + layer["bias"]


def worker(params: Params, part: Array) -> Float[Array, "b f"]:
    """Two layers: the slice of an image to the numbers that the server gets."""
    hidden = jax.nn.relu(fully_connected(params["first"], part.reshape(len(part), -1)))
    return fully_connected(params["last"], hidden)


def first_layers(tree: Params) -> list[Dense]:
    """The first layer of every worker, in the parameters or an update."""
    return [Dense(own["first"]["kernel"], own["first"]["bias"]) for own in tree["workers"]]


apply = clients.vertical_model(clients.quadrants, worker, fully_connected)


def cafe_on_federation(
    images: data.ImageData, key: PRNGKeyArray, *, batch_size: int, rounds: int
) -> tuple[Outcome, np.ndarray, float]:
    """CAFE by exact steps on one federation that holds all the images, a quarter of each at every worker.

    Args:
        images: Images of even height and width.
        key: Key of the parameters, the batches and the attack.
        batch_size: Number of records of a round, drawn without replacement.
        rounds: Number of rounds, of a model that stays as it is.

    Returns:
        The outcome with every record as a victim, at its own place, the images, shape (n, 1, h, w, c), and the
        condition number of the selection matrix, by which rounding errors of the updates may grow.

    Raises:
        ValueError: Batches larger than the data, images that have no quarters, or batches that cannot identify them.
    """
    count = len(images.labels)
    if batch_size > count:
        raise ValueError(f"batch_size must be at most {count}, got {batch_size}")
    key_params, key_batches, key_threat, key_attack = jax.random.split(key, 4)
    draw = jax.vmap(lambda key: jax.random.choice(key, count, (batch_size,), replace=False))
    indices = np.asarray(draw(jax.random.split(key_batches, rounds)))
    check_identifiable(indices, count)
    records = Batch(jnp.asarray(images.normalize(images.images)), jnp.asarray(images.labels))
    params = parameters(key_params, records.inputs[0].size // NUM_WORKERS, len(images.class_names))
    client_fn = jax.jit(clients.vertical_sgd(clients.cross_entropy(apply), indices))
    seen = observe(key_threat, THREAT, client_fn, params, records, batch_indices=indices)
    attack = attacks.cafe(first_layers, dense("server"), split_fn=clients.quadrants)
    one = Observation(params, *jax.tree.map(lambda leaf: leaf[None], (seen.update, seen.extra)))
    found = study_analytic(attack, key_attack, one)
    batch = Batch(*(jnp.asarray(leaf)[0][:, None] for leaf in found.reconstruction.batch))
    truth = jax.tree.map(lambda leaf: leaf[:, None], records)
    r = found.reconstruction
    each = Reconstruction(
        batch, *(jnp.repeat(jnp.asarray(leaf), count, 0) for leaf in (r.loss, r.is_finite, r.restart_losses))
    )
    outcome = Outcome(found._replace(reconstruction=each), report.score(batch, truth, images))
    return outcome, images.images[:, None], batch_condition(indices, count)
