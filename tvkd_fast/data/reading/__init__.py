"""Pairs of text from files, folders and hub sets: which split, which columns, what a row means."""
