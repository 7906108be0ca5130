"""The head in torch, a tile of logits at a time, and numba's passes over a tile where numba is installed."""
