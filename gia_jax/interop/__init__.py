"""Updates from outside: a model's parameters and what a client returned, from PyTorch, Flower or a file, for JAX.

`load_tensors` reads a file, `from_torch` puts PyTorch's names and layouts into the tree of a JAX model, `load_torch`
puts running statistics into a module as well, and `pseudo_gradient` turns two sets of parameters into an update.
"""

from gia_jax.interop.files import load_tensors, save_tensors
from gia_jax.interop.tensors import unflatten
from gia_jax.interop.torch import from_torch, load_torch
from gia_jax.interop.update import pseudo_gradient

__all__ = ["from_torch", "load_tensors", "load_torch", "pseudo_gradient", "save_tensors", "unflatten"]
