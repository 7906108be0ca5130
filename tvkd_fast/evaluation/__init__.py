"""A policy on held-out pairs: figures, comparisons with intervals, and answers side by side."""
