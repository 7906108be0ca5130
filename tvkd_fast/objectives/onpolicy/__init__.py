"""Objectives over the policy's own samples."""
