"""Objectives over rewards that the data has for both responses."""
