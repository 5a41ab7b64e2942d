"""One paper a file."""

from gia_jax.attacks.dlg import dlg
from gia_jax.attacks.idlg import idlg
from gia_jax.attacks.inverting_gradients import inverting_gradients
from gia_jax.attacks.linear import linear_inversion

__all__ = ["dlg", "idlg", "inverting_gradients", "linear_inversion"]
