"""The numbers that both the generator (PyTorch) and the test (JAX) start from, drawn with NumPy alone."""

import math

import numpy as np

CLASSES = 10
# name: model, side of the square images, batch-normalisation mode
CASES = {
    "lenet": ("LeNet", 16, "evaluation"),
    "convnet_evaluation": ("ConvNet", 16, "evaluation"),
    "convnet_training": ("ConvNet", 16, "training"),
    "resnet18_evaluation": ("ResNet", 32, "evaluation"),
    "resnet18_training": ("ResNet", 16, "training"),
}


def _unit(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform, of mean 0 and variance 1."""
    return math.sqrt(3) * (2 * rng.random(shape) - 1)


def variables(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A model's parameters and running statistics, drawn in the order of their sorted paths such as "conv1/kernel"."""
    rng = np.random.default_rng(0)
    drawn = {}
    for path in sorted(shapes):
        value = _unit(rng, shapes[path])
        drawn[path] = {
            "kernel": lambda v: v * math.sqrt(2 / math.prod(v.shape[:-1])),
            "bias": lambda v: 0.1 * v,
            "scale": lambda v: 1 + 0.1 * v,
            "mean": lambda v: 0.1 * v,
            "var": lambda v: np.exp(0.3 * v),
        }[path.split("/")[-1]](value)
    return drawn


def batches(side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Two images and labels of the candidate, then two of the client whose update it is to match."""
    rng = np.random.default_rng(1)
    images = _unit(rng, (2, 2, side, side, 3))
    return images[0], np.array([3, 7]), images[1], np.array([7, 0])


def summary(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Of each tensor in the order of sorted paths, its L2 norm and its inner products with three fixed unit tensors."""
    rng = np.random.default_rng(2)
    rows = []
    for path in sorted(tensors):
        value = np.asarray(tensors[path], np.float64).ravel()
        probes = _unit(rng, (3, value.size)) / math.sqrt(value.size)
        rows.append([np.linalg.norm(value), *(probes @ value)])
    return np.array(rows)


def quartic() -> tuple[np.ndarray, np.ndarray]:
    """Matrix A and start x0 of f(x) = sum_i log cosh (A x)_i + sum_i x_i^4 / 4 - x_i^2 / 2, in 20 dimensions."""
    rng = np.random.default_rng(3)
    return _unit(rng, (20, 20)) / math.sqrt(20), 2 * _unit(rng, (20,))
