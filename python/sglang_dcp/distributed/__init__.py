"""Rank arithmetic, process groups and the exchange of partial attention outputs."""
