"""Measure how much accuracy a bundle lost against the PyTorch reference, and whether the gates hold."""
