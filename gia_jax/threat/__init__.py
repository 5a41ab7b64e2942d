"""What the adversary sees: here a client's data, or a recorded update, become an observation, and nowhere else.

`ThreatModel` says who attacks and what is known (`model`). A simulated client is run by `observe` (`simulated`), and an
update on record is taken by `observed` (`recorded`). What is known beside the parameters and the update is an entry of
`Observation.extra` (`entries`). `stack` and `control` are for several victims (`victims`).
"""

from gia_jax.threat.entries import granted, granted_labels, grants
from gia_jax.threat.model import ThreatModel
from gia_jax.threat.recorded import observed
from gia_jax.threat.simulated import observe
from gia_jax.threat.victims import control, stack

__all__ = ["ThreatModel", "control", "granted", "granted_labels", "grants", "observe", "observed", "stack"]
