"""Gaussian filtering on the permutohedral lattice: geometry, the filters of a CRF, and two backends for their loops.

A backend has `embed` and `message`, as in `plain`, and may have a faster `mean_field`; `bank.backend` chooses it.
"""

from pwlib.lattice.bank import LatticeBank, LatticeFilter

__all__ = ["LatticeBank", "LatticeFilter"]
