"""Objectives that change the teacher while the policy learns, or the input."""
