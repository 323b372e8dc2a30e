"""The ledger: bytes by layer and by part, which add up to the file."""

from pathlib import Path

from spre_fx.file_ledger import LedgerLine, SavedFile

PACKED = LedgerLine("conv1", "1:16", (64, 64, 3, 3), 147_456, 9_216, 1_152)
DENSE = LedgerLine("fc", "2:4", (5, 8), 160, 160, 0)


def test_the_tables():
    saved = SavedFile(Path("model"), (PACKED, DENSE), other=1_000, size=13_000)
    assert (PACKED.packed, DENSE.packed) == (True, False)
    assert saved.dense == 147_456 + 160 + 1_000
    layers, totals = str(saved).split("\n\n")
    assert [line.split() for line in layers.splitlines()[2:]] == [
        ["conv1", "64x64x3x3", "1:16", "147,456", "9,216", "1,152", "7.03%"],
        ["fc", "5x8", "2:4,", "kept", "dense", "160", "160", "0", "100.00%"],
    ]
    assert [line.split("  ")[0] for line in totals.splitlines()[2:]] == [
        *("N:M weights: values", "N:M weights: indices", "all other tensors"),
        *("graph, names, checksums", "file"),
    ]
    numbers = [line.split()[-2:] for line in totals.splitlines()[2:]]
    assert numbers == [
        ["9,376", "6.35%"],
        ["1,152", "0.78%"],
        ["1,000", "100.00%"],
        ["1,472", "0.99%"],
        ["13,000", "8.75%"],
    ]


def test_a_file_without_nm_layers_has_no_share_of_nothing():
    assert str(SavedFile(Path("model"), (), other=10, size=20).totals()).count("%") == 3
