"""The exceptions with which a run of a protocol ends without a sum."""

from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from gia_jax.secure_aggregation.protocol import ServerView


class AggregationAborted(RuntimeError):  # noqa: N818, the usual word
    """The error that ends a run without a sum.

    Attributes:
        view: What the server holds nevertheless, with a total of None. The view is None itself where a single party was
            driven by hand.

    Examples:
        A client drops out before the masked inputs, and two are too few:

        >>> import numpy as np
        >>> from gia_jax import secure_aggregation as sa
        >>> protocol = sa.secagg(3, threshold=3, clip=1.0)
        >>> try:
        ...     view = sa.aggregate_residues(protocol, np.ones((3, 2), np.uint32), dropouts={2: 2})
        ... except sa.AggregationAborted as aborted:
        ...     print(aborted)
        ...     print(aborted.view.contributors, aborted.view.total)
        only 2 clients answered with a masked input, threshold 3
        (0, 1) None
    """

    view: Optional["ServerView"] = None


class MalformedMessage(AggregationAborted, ValueError):  # noqa: N818
    """The error of a party that was sent what no honest party sends.

    Such are bytes that are cut short, that are of another run, or that do not open.

    Examples:
        >>> from gia_jax.secure_aggregation.wire import ByClient
        >>> ByClient.from_bytes(bytes(2))
        Traceback (most recent call last):
        gia_jax.secure_aggregation.errors.MalformedMessage: message ends 2 bytes early
    """
