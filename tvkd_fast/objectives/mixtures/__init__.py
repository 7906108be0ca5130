"""Objectives made of others."""
