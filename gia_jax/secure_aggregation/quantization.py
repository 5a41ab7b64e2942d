"""From floats to integers modulo `modulus` and back, so that sums are exact and masks cancel bit for bit.

Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS 2017, section 3, for the
ring. Departure: signed two's complement fixed point instead of an offset, because float32 loses the fraction of a small
entry that is added to a large offset before it is rounded.
"""

from dataclasses import dataclass
from operator import index

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt32

from gia_jax import _check
from gia_jax.precision import widened

RING = 2**32


@dataclass(frozen=True)
class Quantizer:
    """Signed fixed point with stochastic rounding, with room for a sum of `num_clients` vectors.

    An entry x becomes floor(v) or floor(v) + 1 with expectation v = s clip(x, -c, c), s = (2^(b - 1) - 1) / c, c the
    `clip` and b the `bits`. The sum of n decoded vectors is off by less than n / s an entry, with a standard deviation
    of at most sqrt(n) / (2 s). The L2 sensitivity of p clipped entries grows by at most sqrt(p) / s. Float32 holds 24
    bits: above that large entries are rounded without chance.

    All arithmetic is done in float32 or wider, also for vectors in half precision.

    Attributes:
        clip: Largest magnitude of an entry, positive. Larger entries are clipped. It is public.
        bits: Number of bits of an entry, the sign included, from 2 to 31.
        num_clients: Number of vectors that are added, at least 1.
        modulus: Modulus of the sums, from 3 to 2^32: `RING`, or a prime where a protocol divides.

    Raises:
        ValueError: If an argument is out of range, if a sum of `num_clients` vectors could wrap around
            (2 num_clients (2^(bits - 1) - 1) must stay below `modulus`), or if with this `clip` the sum, s or 1 / s is
            beyond the range of float32.

    Examples:
        With 3 bits the largest magnitude becomes 3 steps, and -0.5 becomes -1 or -2 steps:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax import secure_aggregation as sa
        >>> quantizer = sa.Quantizer(clip=1.0, bits=3, num_clients=2)
        >>> residues = quantizer.encode(jax.random.key(0), jnp.array([1.0, 7.0, 0.0, -0.5]))
        >>> residues[:3].tolist(), int(residues[3]) - 2**32 in (-1, -2)
        ([3, 3, 0], True)
        >>> quantizer.decode(residues)[:3].tolist()
        [1.0, 1.0, 0.0]
    """

    clip: float
    bits: int
    num_clients: int
    modulus: int = RING

    def __post_init__(self) -> None:
        if not 0 < self.clip < float("inf"):
            raise ValueError(f"clip must be positive and finite, got {self.clip}")
        _check.integer(2, 31, bits=self.bits)
        _check.integer(num_clients=self.num_clients)
        _check.integer(3, RING, modulus=self.modulus)
        for name in ("bits", "num_clients", "modulus"):  # Python's integers: those of NumPy may overflow
            object.__setattr__(self, name, index(getattr(self, name)))
        if 2 * self.num_clients * self.largest >= self.modulus:
            raise ValueError(
                f"bits must be small enough for a sum of {self.num_clients} clients modulo {self.modulus}, "
                f"got {self.bits}"
            )
        largest, tiny = (float(bound) for bound in (np.finfo(np.float32).max, np.finfo(np.float32).tiny))
        if self.num_clients * self.clip > largest or not tiny <= self.scale <= 1 / tiny:
            raise ValueError(f"clip must leave the sum and its steps in the range of float32, got {self.clip}")

    @property
    def largest(self) -> int:
        """The largest integer that an entry becomes."""
        return 2 ** (self.bits - 1) - 1

    @property
    def scale(self) -> float:
        """The number of steps in a unit."""
        return self.largest / self.clip

    def encode(self, key: PRNGKeyArray, values: Float[Array, " p"]) -> UInt32[Array, " p"]:
        """Clips the vector of one client, rounds it at random and maps it to residues.

        Args:
            key: Random key of the client's rounding.
            values: The vector, shape (p,) and finite.

        Returns:
            The residues, shape (p,).

        Raises:
            ValueError: If an entry is not finite.
        """
        _check.finite("values", values)
        values = widened(values)
        scaled = jnp.clip(values, -self.clip, self.clip) * self.scale
        below = jnp.floor(scaled)
        up = jax.random.uniform(key, values.shape, values.dtype) < scaled - below
        # Clipping before scaling is not enough: in floating point clip * scale can round to largest + 1.
        integers = jnp.clip(below.astype(jnp.int32) + up, -self.largest, self.largest)
        residues = integers.astype(jnp.uint32)
        return jnp.where(integers < 0, residues + self._wrap, residues)

    def decode(self, residues: UInt32[Array, " p"]) -> Float[Array, " p"]:
        """Maps residues to the floats that they stand for. A sum of residues decodes to the sum.

        Residues above half of the modulus are negative.

        Args:
            residues: Residues of a vector or of a sum, shape (p,).

        Returns:
            The floats, shape (p,), in JAX's default type, float32 or float64, into which every sum fits.
        """
        signed = jnp.where(residues > (self.modulus - 1) // 2, residues - self._wrap, residues)
        return signed.astype(jnp.int32).astype(float) / self.scale

    def clipped(self, values: Float[Array, "*shape"]) -> Float[Array, ""]:
        """Computes the share of entries that `encode` clips.

        Clipping is an effect of the defense, to be reported beside it.

        Args:
            values: Entries, of any shape.

        Returns:
            The share, a scalar in [0, 1]. It is NaN where an entry is NaN.

        Examples:
            >>> import jax.numpy as jnp
            >>> from gia_jax import secure_aggregation as sa
            >>> quantizer = sa.Quantizer(clip=1.0, bits=22, num_clients=2)
            >>> float(quantizer.clipped(jnp.array([0.5, 2.0, -3.0, 1.0])))
            0.5
        """
        values = widened(values)
        return jnp.mean(jnp.where(jnp.isnan(values), values, jnp.abs(values) > self.clip))

    @property
    def _wrap(self) -> np.uint32:
        """The modulus modulo 2^32: uint32 arithmetic wraps by itself in the ring."""
        return np.uint32(self.modulus % RING)
