"""Instructions behind a tile's product, counted in listings of a few lines."""

import pytest

from bench.census.epilogue import epilogue, instructions, issue_cycles, main_loop

LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 EXIT ;
        /*0020*/                   LDGSTS.E.128 [R2], [R4.64] ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0040*/               @P1 BRA 0x20 ;
        /*0050*/                   FADD R4, R4, R5 ;
        /*0060*/              @!P2 BRA 0x90 ;
        /*0070*/                   FSEL R4, R4, -INF , P3 ;
        /*0080*/                   FSEL R5, R5, -INF , P3 ;
        /*0090*/                   MUFU.EX2 R4, R4 ;
        /*00a0*/                   STG.E [R2.64], R4 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0xc0;
"""


def test_the_shortest_way_goes_around_what_is_under_a_branch() -> None:
    code = instructions(LISTING)
    assert main_loop(code) == (2, 4)
    # FADD, BRA, MUFU, STG, EXIT.
    assert epilogue(LISTING) == 5


@pytest.mark.parametrize(
    ("line", "by", "count"),
    [
        ("/*0060*/              @!P2 BRA 0x90 ;", "/*0060*/                   NOP ;", 7),
        ("/*0060*/              @!P2 BRA 0x90 ;", "/*0060*/                   BRA.U !UP2, 0x90 ;", 5),
        ("/*0030*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;", "/*0030*/                   FFMA R4 ;", 0),
    ],
    ids=["always masked", "a uniform branch", "no product"],
)
def test_another_listing_counts_otherwise(line: str, by: str, count: int) -> None:
    assert line in LISTING
    assert epilogue(LISTING.replace(line, by)) == count


def test_warps_take_turns_at_four_schedulers() -> None:
    assert [issue_cycles(100, warps) for warps in (1, 4, 5, 8)] == [100, 100, 200, 200]
