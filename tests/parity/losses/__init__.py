"""Slow losses in float64, one file a family of methods, each written from its paper; see tests/support/methods.py."""
