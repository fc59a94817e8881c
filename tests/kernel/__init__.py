"""The running kernel as the reference: random programs run by it and by a modelled VM, and compared."""
