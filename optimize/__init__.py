"""From a graph package to one engine bundle per target."""
