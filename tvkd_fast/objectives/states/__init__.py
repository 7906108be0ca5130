"""Objectives over hidden states: of the policy's own inner layers, and of the teacher."""
