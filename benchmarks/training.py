"""Networks that are trained, for the tables that ask what training changes, or what a defense costs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from gia_jax import Batch, ClientFn, clients, data, models
from gia_jax.base import Params
from gia_jax.models.functional import ApplyFn

SampleFn = Callable[[PRNGKeyArray, Batch], Batch]


def train_network(
    make: Callable[..., nnx.Module], name: str, seed: int, epochs: int
) -> tuple[ApplyFn, Params, float, float]:
    """A network on a data set, by Adam with a cosine schedule.

    Args:
        make: `(input_shape, num_classes, rngs=) -> module`, such as `models.LeNet`.
        name: Of the data set.
        seed: Of the first weights and of the order of the examples.
        epochs: Passes over the training images.

    Returns:
        Its function, parameters, training and test accuracy.
    """
    train_images, test_images = data.load(name, split="train"), data.load(name)
    shape, classes = train_images.images.shape[1:], len(train_images.class_names)
    apply_fn, params = models.functional(make(shape, classes, rngs=nnx.Rngs(seed)))
    loss_fn = clients.cross_entropy(apply_fn)
    inputs = {s.name: jnp.asarray(s.normalize(s.images)) for s in (train_images, test_images)}
    x, y, size = inputs[train_images.name], jnp.asarray(train_images.labels), 128
    steps = len(y) // size
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, epochs * steps))

    @jax.jit
    def step(carry: tuple[Params, Any], batch: Batch) -> tuple[Params, Any]:
        current, state = carry
        updates, state = optimizer.update(jax.grad(loss_fn)(current, batch), state)
        return optax.apply_updates(current, updates), state

    carry = (params, optimizer.init(params))
    for epoch in range(epochs):
        order = jax.random.permutation(jax.random.fold_in(jax.random.key(seed), epoch), len(y))
        for i in range(steps):
            index = order[i * size : (i + 1) * size]
            carry = step(carry, Batch(x[index], y[index]))
        print(f"\rtraining: epoch {epoch + 1} of {epochs}", end="", flush=True)
    print()
    shares = [accuracy(apply_fn, carry[0], inputs[s.name], s.labels) for s in (train_images, test_images)]
    return apply_fn, carry[0], shares[0], shares[1]


def train_batch_norm(module: nnx.Module, examples: Batch, key: PRNGKeyArray, *, epochs: int, size: int = 128) -> None:
    """Trains a module in place by Adam with a cosine schedule, its running statistics with it."""
    number = len(examples.labels)
    schedule = optax.cosine_decay_schedule(3e-3, epochs * (number // size))
    optimizer = nnx.Optimizer(module, optax.adam(schedule), wrt=nnx.Param)

    def loss_fn(module: nnx.Module, batch: Batch) -> Array:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(module(batch.inputs), batch.labels))

    @nnx.jit
    def step(module: nnx.Module, optimizer: nnx.Optimizer, batch: Batch) -> None:
        optimizer.update(module, nnx.grad(loss_fn)(module, batch))

    module.train()
    for epoch in range(epochs):
        order = jax.random.permutation(jax.random.fold_in(key, epoch), number)
        for i in range(number // size):
            index = order[i * size : (i + 1) * size]
            step(module, optimizer, Batch(examples.inputs[index], examples.labels[index]))
        print(f"\rtraining: epoch {epoch + 1} of {epochs}", end="", flush=True)
    print()


def train(
    make_client: Callable[[PRNGKeyArray], ClientFn],
    optimizer: optax.GradientTransformation,
    sample_fn: SampleFn,
    params: Params,
    key: PRNGKeyArray,
    examples: Batch,
    num_steps: int,
) -> Params:
    """An ordinary optax loop, where a defense may enter in two places.

    Args:
        make_client: `(key) -> client` of one step, with its defenses: what it shares is the gradient of the optimizer.
        optimizer: Of the server.
        sample_fn: `(key, examples) -> batch`, and what encodes the batch (`mixup`).
        params: At the start.
        key: Of the loop.
        examples: All training examples.
        num_steps: Steps.

    Returns:
        The parameters at the end.
    """

    def step(carry: tuple[Params, Any], key: PRNGKeyArray) -> tuple[tuple[Params, Any], None]:
        params, state = carry
        key_sample, key_client = jax.random.split(key)
        update = make_client(key_client)(params, sample_fn(key_sample, examples))
        changes, state = optimizer.update(update, state, params)
        return (optax.apply_updates(params, changes), state), None

    (trained, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, num_steps))
    return trained


def uniform(size: int) -> SampleFn:
    """Batches of `size` examples, drawn with replacement."""

    def sample_fn(key: PRNGKeyArray, examples: Batch) -> Batch:
        index = jax.random.randint(key, (size,), 0, len(examples.labels))
        return jax.tree.map(lambda leaf: leaf[index], examples)

    return sample_fn


def poisson(size: int, capacity: int, num_classes: int) -> SampleFn:
    """Poisson samples: every example takes part by its own coin, `size` of them on average.

    An array has one shape, so a batch has `capacity` rows. Rows that stand for nobody have zeros for the probabilities
    of all classes: their cross-entropy is 0, and so is its gradient. Of a sample larger than `capacity` the rest is
    left out, which must be rarer than any delta that is claimed.
    """

    def sample_fn(key: PRNGKeyArray, examples: Batch) -> Batch:
        number = len(examples.labels)
        chosen = jax.random.bernoulli(key, size / number, (number,))
        (index,) = jnp.nonzero(chosen, size=capacity, fill_value=0)
        present = jnp.arange(capacity) < jnp.sum(chosen)
        labels = jax.nn.one_hot(examples.labels[index], num_classes) * present[:, None]
        return Batch(examples.inputs[index], labels)

    return sample_fn


def accuracy(apply_fn: ApplyFn, params: Params, inputs: Float[Array, "n *d"], labels: np.ndarray) -> float:
    """The share of examples classified right, a thousand at a time."""
    parts = [jax.jit(apply_fn)(params, inputs[i : i + 1_000]) for i in range(0, len(labels), 1_000)]
    return float(np.mean(np.concatenate([np.argmax(part, -1) for part in parts]) == labels))
