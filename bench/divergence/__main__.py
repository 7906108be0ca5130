"""Divergences between student and teacher on a CPU, forward and backward, beside peers and beside the bare product.

    tvkd bench divergence --shape 4096x576x49152 --json FILE       (or python -m bench.divergence)

A shape that the packaged model has is measured on that model's states over preference data (`--data`) as the
teacher's, and on those of the same model pruned to `--layers` layers, or of another one (`--student`), as the
student's; any other on made ones that say so. How: `bench/divergence/comparison.py`.
"""

from bench.divergence.comparison import command

if __name__ == "__main__":
    command(__doc__)
