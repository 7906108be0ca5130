"""From files, folders and hub sets to pairs of text: which split, which columns, what a row means."""
