"""What a client does to protect its data.

Transformations of the update are optax's (`optax.chain` composes them, `defended` puts them behind a client); DP-SGD
works on single examples and is a client of its own.
"""

from gia_jax.defenses.clipping import clip
from gia_jax.defenses.dpsgd import dp_sgd
from gia_jax.defenses.noise import gaussian_noise, laplace_noise
from gia_jax.defenses.pruning import prune, top_k
from gia_jax.defenses.quantization import quantize, sign, ternary
from gia_jax.defenses.transformed import defended

__all__ = [
    "clip",
    "defended",
    "dp_sgd",
    "gaussian_noise",
    "laplace_noise",
    "prune",
    "quantize",
    "sign",
    "ternary",
    "top_k",
]
