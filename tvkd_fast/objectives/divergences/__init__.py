"""Objectives over whole distributions: a policy's and frozen models', token by token, without logits of either."""
