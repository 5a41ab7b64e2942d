"""How a run ends without a sum."""

from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from gia_jax.secure_aggregation.protocol import ServerView


class AggregationAborted(RuntimeError):  # noqa: N818, the usual word
    """The run ended without a sum.

    Attributes:
        view: What the server holds nevertheless; its total is None. It is None itself where a single party was driven
            by hand.
    """

    view: Optional["ServerView"] = None


class MalformedMessage(AggregationAborted, ValueError):  # noqa: N818
    """A party was sent what no honest party sends: bytes that are cut short, of another run, or that do not open."""
