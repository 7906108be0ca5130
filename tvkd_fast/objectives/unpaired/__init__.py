"""Objectives over single responses with a label, desirable or not."""
