"""How much of the states' and the head's rows a program of a sparse gradient gathers at a time."""

from __future__ import annotations

from dataclasses import dataclass

GATHERED_FLOATS = 16
"""Floats per thread of a program's tile of gathered rows, in registers."""
GATHERED_WHOLE = 8192
"""Largest D of which a program of `sparse_rows` holds a row's state, two sums and a gathered row at once."""
GATHERED_TILE = 4096
"""Of wider rows, what it holds of them at a time."""


@dataclass(frozen=True)
class GatherConfig:
    """Rows of D floats, padded to a power of 2, that a program gathers at a time; very wide ones in tiles."""

    block_e: int
    block_d: int
    warps: int
    tiles: int = 1
    """Tiles of block_d that make a row."""

    @staticmethod
    def of(size: int) -> GatherConfig:
        if size > GATHERED_WHOLE:
            width, warps = GATHERED_TILE, 8
        else:
            width = 1 << (size - 1).bit_length()
            warps = 4 if width <= 1024 else 8 if width <= 4096 else 16
        return GatherConfig(max(1, 32 * warps * GATHERED_FLOATS // width), width, warps, -(-size // width))

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps}

    @property
    def switches(self) -> dict[str, int]:
        return {"BLOCK_E": self.block_e, "BLOCK_D": self.block_d, "TILES": self.tiles}
