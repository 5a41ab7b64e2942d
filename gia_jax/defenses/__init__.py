"""Defenses: what a client does to protect its data before it shares an update.

There are four kinds. Transformations of the update are optax's: `optax.chain` composes them, and `defended` puts them
behind a client. DP-SGD works on single examples and is a client of its own, and Soteria wraps a client. MixUp and
InstaHide encode the batch, `(key, batch) -> batch`. PRECODE is another model.
"""

from gia_jax.defenses.clipping import clip
from gia_jax.defenses.dpsgd import dp_sgd
from gia_jax.defenses.fake import fake_gradients
from gia_jax.defenses.instahide import instahide
from gia_jax.defenses.mixing import Mixing, draw_mixing, mix
from gia_jax.defenses.mixup import mixup
from gia_jax.defenses.noise import gaussian_noise, laplace_noise
from gia_jax.defenses.precode import Precode, precode
from gia_jax.defenses.pruning import prune, top_k
from gia_jax.defenses.quantization import quantize, sign, ternary
from gia_jax.defenses.soteria import kept_features, live_share_pruned, soteria
from gia_jax.defenses.transformed import defended

__all__ = [
    "Mixing",
    "Precode",
    "clip",
    "defended",
    "dp_sgd",
    "draw_mixing",
    "fake_gradients",
    "gaussian_noise",
    "instahide",
    "kept_features",
    "laplace_noise",
    "live_share_pruned",
    "mix",
    "mixup",
    "precode",
    "prune",
    "quantize",
    "sign",
    "soteria",
    "ternary",
    "top_k",
]
