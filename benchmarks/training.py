"""A network trained to convergence, for the tables that ask what training changes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from gia_jax import Batch, clients, data, models
from gia_jax.base import Params
from gia_jax.models.functional import ApplyFn


def train_lenet(name: str, seed: int, epochs: int) -> tuple[ApplyFn, Params, float, float]:
    """The sigmoid LeNet by Adam with a cosine schedule: its function, parameters, training and test accuracy."""
    train_images, test_images = data.load(name, split="train"), data.load(name)
    shape, classes = train_images.images.shape[1:], len(train_images.class_names)
    apply_fn, params = models.functional(models.LeNet(shape, classes, rngs=nnx.Rngs(seed)))
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
    predict = jax.jit(lambda p, z: jnp.argmax(apply_fn(p, z), -1))

    def accuracy(images: data.ImageData) -> float:
        z = inputs[images.name]
        predicted = np.concatenate([predict(carry[0], z[i : i + 1_000]) for i in range(0, len(z), 1_000)])
        return float(np.mean(predicted == images.labels))

    return apply_fn, carry[0], accuracy(train_images), accuracy(test_images)
