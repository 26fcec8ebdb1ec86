"""Gaussian filtering on the permutohedral lattice: geometry, the filters of a CRF, and two backends for their loops."""

from pwlib.lattice.bank import LatticeBank, LatticeFilter

__all__ = ["LatticeBank", "LatticeFilter"]
