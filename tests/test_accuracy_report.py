"""benchmarks/accuracy: the Markdown of made-up rows, and what it says of gaps in them."""

import importlib
import random
import re

import pytest

VERSIONS = {"torch": "9", "spre_fx": "0.1", "cpu": "Z80"}


@pytest.fixture(name="report")
def _report(import_benchmarks):
    import_benchmarks("accuracy")
    return importlib.import_module("accuracy_report")


def rows_of(arm, accuracies, **changes):
    """Rows of an arm from seed -> accuracy in per cent."""
    made = {
        "task": "src",
        "pattern": "dense" if arm == "dense" else "1:16",
        "arm": arm,
        "epochs": 12,
        "steps": 3000,
        "split": "test",
        "seconds": 40.0,
        "versions": VERSIONS,
    }
    return [
        made | changes | {"seed": seed, "accuracy": points / 100}
        for seed, points in accuracies.items()
    ]


def lines_of(document, title):
    """A section's lines: of "## title", or of "### title" in the first section that has it."""
    found = re.search(rf"^#+ {re.escape(title)}$\n(.*?)(?=^#|\Z)", document, re.M | re.S)
    return found[1].strip().splitlines()


def table_of(lines):
    """Arm -> column -> cell."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    header, _, *body = cells
    return {line[0]: dict(zip(header, line, strict=True)) for line in body}


PLAIN = rows_of("SR-STE", {1: 58, 2: 59, 3: 60})
SPRE = rows_of("SR-STE + SpRe", {1: 59, 2: 61, 3: 63}, seconds=61.0)
LONGER = rows_of("SR-STE, same time", {1: 60, 2: 61, 3: 62}, seconds=60.5, epochs=20.0)
DENSE = rows_of("dense", {1: 68, 2: 69, 3: 70})


def compare(report, *listed):
    return [report.Comparison(*names) for names in listed]


def document_of(report, rows):
    listed = compare(
        report,
        ("dense",),
        ("SR-STE",),
        ("SR-STE + SpRe", "SR-STE", "SR-STE, same time"),
        ("SR-STE, same time", "SR-STE"),
    )
    return report.markdown(rows, listed, introduction="Twenty photographs.", command="python x.py")


def test_the_head(report):
    head = document_of(report, PLAIN + SPRE).partition("## How to read it")[0]
    assert head.split("\n\n") == [
        "# Accuracy",
        "Written by `python x.py`.",
        "Twenty photographs.",
        "6 runs: Z80, spre_fx 0.1, torch 9.",
        "",
    ]


def test_a_table_by_hand(report):
    table = table_of(lines_of(document_of(report, PLAIN + SPRE + LONGER + DENSE), "1:16"))
    assert list(table) == ["dense", "SR-STE", "SR-STE + SpRe", "SR-STE, same time"]
    assert table["SR-STE + SpRe"] == {
        "arm": "SR-STE + SpRe",
        "accuracy, %": "61.00 ± 1.15",
        "seeds": "3",
        "epochs": "12",
        "seconds a run": "61.0",
        "baseline": "SR-STE",
        "difference": "+2.00 [-0.48, +4.48] (3/3)",
        "control": "SR-STE, same time",
        "difference from the control": "0.00 [-2.48, +2.48] (1/3)",
    }
    assert table["SR-STE, same time"]["difference"] == "+2.00 [+2.00, +2.00] (3/3)"
    assert table["SR-STE, same time"]["epochs"] == "20"
    assert table["dense"]["accuracy, %"] == "69.00 ± 0.58"
    assert table["SR-STE"]["difference"] == table["SR-STE"]["control"] == "-"


def test_the_order_of_the_rows_does_not_matter(report):
    rows = PLAIN + SPRE + LONGER + DENSE
    rows += rows_of("SR-STE", {1: 66, 2: 67}, pattern="2:4", versions={"torch": "8"})
    first = document_of(report, rows)
    assert document_of(report, rows[::-1]) == first
    random.Random(0).shuffle(rows)
    assert document_of(report, rows) == first
    assert first.index("### 2:4") < first.index("### 1:16")


def test_epochs_and_seconds_of_runs_that_differ(report):
    slower = rows_of("SR-STE, same time", {4: 60}, epochs=18.4, seconds=70.5)
    line = table_of(lines_of(document_of(report, LONGER + slower), "1:16"))["SR-STE, same time"]
    assert line["epochs"] == "18.4 to 20"
    assert line["seconds a run"] == "60.5"


def test_what_rounds_to_zero_has_no_sign(report):
    rows = rows_of("SR-STE", {1: 50, 2: 50}) + rows_of("SR-STE + SpRe", {1: 49.998, 2: 49.999})
    line = table_of(lines_of(document_of(report, rows), "1:16"))["SR-STE + SpRe"]
    assert line["difference"] == "0.00 [-0.01, 0.00] (0/2)"


def test_one_seed_has_no_interval(report):
    document = document_of(report, PLAIN[:1] + SPRE[:1])
    line = table_of(lines_of(document, "1:16"))["SR-STE + SpRe"]
    assert line["accuracy, %"] == "59.00 ± -"
    assert line["difference"] == "+1.00 [-] (1/1)"
    assert "nan" not in document
    assert "None" not in document


def test_a_column_that_tells_nothing_is_not_shown(report):
    table = table_of(lines_of(document_of(report, DENSE + PLAIN), "1:16"))
    shown = ["arm", "accuracy, %", "seeds", "epochs", "seconds a run"]
    assert [list(line) for line in table.values()] == [shown, shown]


def test_every_task_has_its_own_tables(report):
    digits = rows_of("SR-STE", {1: 96, 2: 98}, task="digits")
    document = document_of(report, PLAIN + digits)
    assert re.findall(r"^##+ .*", document, re.M)[1:] == [
        "## digits",
        "### 1:16",
        "## src",
        "### 1:16",
    ]
    assert "97.00 ± 1.00" in document


def test_gaps_are_named(report):
    rows = PLAIN + rows_of("SR-STE + SpRe", {2: 61, 3: 63, 8: 90, 9: 90})
    lines = lines_of(document_of(report, rows), "1:16")
    assert table_of(lines)["SR-STE + SpRe"]["difference"] == "+2.50 [-3.85, +8.85] (2/2)"
    assert [line for line in lines if line.startswith("- ")] == [
        "- No runs: dense; SR-STE, same time",
        "- Left out, with a run of one arm only, 3 seeds (1, 8, 9): SR-STE + SpRe - SR-STE",
        "- No runs of SR-STE, same time to compare with: SR-STE + SpRe - SR-STE, same time",
    ]


def test_mixed_versions_are_shown(report):
    newer = rows_of("SR-STE + SpRe", {3: 63}, versions=VERSIONS | {"torch": "10"})
    document = document_of(report, PLAIN + SPRE[:2] + newer)
    assert "**Mixed versions**: the runs come from 2 set-ups" in document
    assert "- Z80, spre_fx 0.1, torch 9: 5 of 6 runs" in document
    assert "- Z80, spre_fx 0.1, torch 10: 1 of 6 runs" in document
    assert "- Compared across versions, 1 seed (3): SR-STE + SpRe - SR-STE" in document


def test_runs_in_no_table_are_named(report):
    lost = rows_of("RigL", {4: 60, 2: 60}) + rows_of("SR-STE", {5: 50}, split="validation")
    lines = lines_of(document_of(report, PLAIN + lost), "Runs in no table")
    assert lines == [
        "- src, 1:16, test: RigL, 2 seeds (2, 4)",
        "- src, 1:16, validation: SR-STE, 1 seed (5)",
    ]
    assert "Runs in no table" not in document_of(report, PLAIN)


def test_dense_runs_alone_are_in_no_table(report):
    lines = lines_of(document_of(report, DENSE), "Runs in no table")
    assert lines == ["- src, dense, test: dense, 3 seeds (1, 2, 3)"]


def test_no_rows_are_said_to_be_none(report):
    assert "\nNo runs.\n" in document_of(report, [])


NAMES = ("wider", "warmer", "later")
GAINS = {"wider": (1, 1, 2, 2), "warmer": (3, 4, 3, 4), "later": (-1, 1, -2, 2)}


def search_document(report, extra=()):
    """A search among three remedies on seeds 100 to 103, and one confirmed on seeds 0 to 3."""
    plain = (50, 51, 52, 53)
    rows = rows_of("SpRe", dict(enumerate(plain, 100)), split="validation")
    for name, gains in GAINS.items():
        gained = [base + gain for base, gain in zip(plain, gains, strict=True)]
        rows += rows_of(name, dict(enumerate(gained, 100)), split="validation")
    rows += rows_of("SpRe", {0: 50, 1: 51, 2: 52, 3: 53})
    rows += rows_of("warmer", {0: 51, 1: 53, 2: 53, 3: 55})
    search = compare(report, ("SpRe",), *((name, "SpRe") for name in NAMES))
    chosen = compare(report, ("warmer", "SpRe"))
    return report.markdown([*rows, *extra], compare(report, ("SpRe",)), search, chosen)


def test_the_search_is_corrected_for_its_size(report):
    document = search_document(report)
    assert (
        "looks better than it is: p (Holm) is corrected for all comparisons below, 3." in document
    )
    table = table_of(lines_of(document.partition("## src: the search\n")[2], "1:16"))
    assert list(table) == ["SpRe", *NAMES]
    # t of 5.196, 12.124 and 0, with 3 degrees of freedom.
    assert [table[name]["p"] for name in NAMES] == ["0.014", "0.001", "1.000"]
    assert [table[name]["p (Holm)"] for name in NAMES] == ["0.028", "0.004", "1.000"]
    assert table["later"]["seeds for ± 0.5"] == "14"  # (10 / 3) / 0.25
    assert table["SpRe"]["p"] == table["SpRe"]["p (Holm)"] == "-"


def test_a_tiny_p_is_not_written_as_zero(report):
    rows = rows_of("SpRe", {1: 50, 2: 51, 3: 52}) + rows_of("wider", {1: 60, 2: 61, 3: 62.01})
    document = report.markdown(rows, [], confirmed=compare(report, ("wider", "SpRe")))
    assert table_of(lines_of(document, "1:16"))["wider"]["p"] == "< 0.001"


def test_what_was_chosen_is_compared_once_more(report):
    document = search_document(report)
    after = document.partition("## src: what was chosen\n")[2]
    assert "is corrected for all comparisons below, 1." in after
    (line,) = table_of(lines_of(after, "1:16")).values()
    assert line["difference"] == "+1.50 [+0.58, +2.42] (4/4)"
    assert line["p"] == line["p (Holm)"] == "0.014"
    assert "fresh, with" not in document


def test_seeds_that_the_search_had_are_named(report):
    again = rows_of("warmer", {100: 60})
    after = search_document(report, again).partition("## src: what was chosen\n")[2]
    assert "- Not fresh, with validation runs too, 1 seed (100): warmer" in after


def test_patterns_and_single_seeds_count_in_the_family(report):
    extra = rows_of("SpRe", {100: 50}, split="validation", pattern="1:8")
    extra += rows_of("wider", {100: 55}, split="validation", pattern="1:8")
    after = search_document(report, extra).partition("## src: the search\n")[2]
    assert "is corrected for all comparisons below, 4." in after
    single = table_of(lines_of(after, "1:8"))["wider"]
    assert single["difference"] == "+5.00 [-] (1/1)"
    assert "p" not in single  # no line of this table has one
    assert table_of(lines_of(after, "1:16"))["wider"]["p (Holm)"] == "0.042"
