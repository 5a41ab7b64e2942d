"""Who attacks, and what the adversary knows: the words beside every number."""

from dataclasses import dataclass

from gia_jax import _check
from gia_jax.base import Observation

# What the parts of graphs are called.
PARTS = {"mask": "number of nodes", "adjacency": "structure", "nodes": "features of the nodes"}


@dataclass(frozen=True)
class ThreatModel:
    """Who attacks, and what the adversary is granted beside the parameters and the update.

    A result of an attack holds under its threat model only, so `describe` belongs beside every number.

    Attributes:
        name: Name of the adversary.
        batch_size: Whether the adversary knows the number and the shape of the examples, which it finds in
            `observation.extra["inputs_like"]`.
        labels: Whether it knows the labels, which it finds in `observation.extra["labels"]`, shuffled.
        label_order: Whether the known labels are in the order of the batch instead. Of a client with local steps on
            minibatches, the order tells which example was used when. One gradient of the whole batch does not depend
            on it.
        statistics: Whether it knows the batch-normalisation statistics of the client's forward pass, which it finds in
            `observation.extra["statistics"]`. A string counts as True and names where they come from, such as
            "inferred", in the description.
        batch_indices: Whether it knows which examples each of several rounds used, from
            `observation.extra["batch_indices"]`.
        draws: Whether it knows the client's own random draws, such as those of dropout masks and noise layers, from the
            random key in `observation.extra["draws"]`.
        inputs: Names of the parts of the inputs that it knows, where the inputs are a dict. It finds these parts in
            `observation.extra["inputs"]`, with the examples in the order of the batch. Of graphs "mask" tells the
            number of nodes, "adjacency" the structure, and "nodes" the features.

    Raises:
        ValueError: If `label_order` is granted without `labels`, or `inputs` is no tuple of different names.

    Examples:
        >>> from gia_jax import ThreatModel
        >>> ThreatModel(labels=True).describe()
        'honest-but-curious server; knows parameters, update, batch size, labels (unordered)'
    """

    name: str = "honest-but-curious server"
    batch_size: bool = True
    labels: bool = False
    label_order: bool = False
    statistics: bool | str = False
    batch_indices: bool = False
    draws: bool = False
    inputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.label_order and not self.labels:
            raise ValueError("label_order=True needs labels=True, got labels=False")
        if not isinstance(self.inputs, tuple | list) or not all(isinstance(name, str) for name in self.inputs):
            raise ValueError(f"inputs must be a tuple of names, such as ('mask',), got {_check.brief(self.inputs)}")
        if len(set(self.inputs)) < len(self.inputs):
            raise ValueError(f"inputs must be different names, got {self.inputs}")
        object.__setattr__(self, "inputs", tuple(self.inputs))  # of a list, which has no hash

    def describe(self) -> str:
        """Returns one line that says who attacks, and what the adversary knows.

        Returns:
            The line, for a table or a plot.
        """
        known = ["parameters", "update"]
        known += ["batch size"] if self.batch_size else []
        known += [f"labels ({'in order' if self.label_order else 'unordered'})"] if self.labels else []
        kind = f"{self.statistics} " if isinstance(self.statistics, str) else ""
        known += [f"{kind}batch statistics"] if self.statistics else []
        known += ["batch indices"] if self.batch_indices else []
        known += ["the client's random draws"] if self.draws else []
        known += [PARTS.get(name, f"the inputs' {name}") for name in self.inputs]
        return f"{self.name}; knows {', '.join(known)}"

    @classmethod
    def of(cls, observation: Observation, *, name: str = "honest-but-curious server") -> "ThreatModel":
        """Returns the threat model under which an observation was made, as far as the observation tells.

        Args:
            observation: Observation whose entries are looked at. It does not tell whether its labels are in the order
                of the batch: they are taken as unordered.
            name: Name of the adversary, which the observation does not hold.

        Returns:
            The threat model.

        Examples:
            >>> import jax.numpy as jnp
            >>> from gia_jax import ThreatModel, observed
            >>> params, update = {"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([0.5, -1.0])}
            >>> seen = observed(params, update, inputs_like=jnp.zeros((1, 2)))
            >>> ThreatModel.of(seen).describe()
            'honest-but-curious server; knows parameters, update, batch size'
        """
        extra = observation.extra
        grants = {grant: grant in extra for grant in ("labels", "statistics", "batch_indices", "draws")}
        return cls(name=name, batch_size="inputs_like" in extra, inputs=tuple(extra.get("inputs", ())), **grants)
