"""The bundled preference set, drawn from a seed, and the judge of answers to it."""
