"""Triton kernels and their launchers, one file per op. Importing this package does not import Triton."""
