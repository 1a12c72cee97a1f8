"""Plugins for the foldkv operators, each declared once, and their injection into a graph per target."""
