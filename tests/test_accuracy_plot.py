"""benchmarks/accuracy/plot.py: what is drawn of made-up rows."""

import importlib

import pytest

ARMS = ("SR-STE", "SR-STE + SpRe")
PATTERNS = ("2:4", "1:16")


@pytest.fixture(name="plot")
def _plot(import_benchmarks):
    import_benchmarks("accuracy")
    return importlib.import_module("plot")


def rows(seeds=3):
    """An arm's accuracy, in points: 50 at 1:16, 60 at 2:4, plus its place and the seed."""
    made = {"task": "src", "epochs": 1, "steps": 9, "split": "test", "seconds": 1.0, "versions": {}}
    arms = [("dense", "dense"), *((arm, pattern) for arm in (*ARMS, "GMP") for pattern in PATTERNS)]
    place = {"dense": 20, "SR-STE": 0, "SR-STE + SpRe": 2, "GMP": -1, "2:4": 10, "1:16": 0}
    return [
        made
        | {"arm": arm, "pattern": pattern, "seed": seed}
        | {"accuracy": (50 + place[arm] + place.get(pattern, 0) * (pattern != arm) + seed) / 100}
        for arm, pattern in arms
        for seed in range(seeds)
    ]


def draw(plot, path, drawn=ARMS, **options):
    compared = [
        plot.Comparison("SR-STE"),
        plot.Comparison("SR-STE + SpRe", "SR-STE"),
        plot.Comparison("GMP", "SR-STE"),
        plot.Comparison("RigL", "SR-STE"),
    ]
    return plot.draw(
        options.pop("rows", rows()), drawn, compared, path, **{"task": "src"} | options
    )


def test_accuracy_over_patterns(plot, tmp_path):
    left, _ = draw(plot, tmp_path / "plot.png").axes
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [label.get_text() for label in left.get_xticklabels()] == list(PATTERNS)
    _, labels = left.get_legend_handles_labels()
    assert labels == list(ARMS)
    means = [list(bars.lines[0].get_ydata()) for bars in left.containers]
    assert means == [pytest.approx([61, 51]), pytest.approx([63, 53])]
    bars = left.containers[0].lines[2][0].get_segments()
    error = 1 / 3**0.5  # of three seeds, a point apart
    assert [list(bar[:, 1]) for bar in bars] == [
        pytest.approx([mean - error, mean + error]) for mean in (61, 51)
    ]
    assert list(left.lines[0].get_ydata()) == pytest.approx([71, 71])  # the dense network
    assert [text.get_text() for text in left.texts] == ["dense"]


def test_differences_at_a_pattern(plot, tmp_path):
    _, right = draw(plot, tmp_path / "plot.svg").axes
    names = [label.get_text() for label in right.get_yticklabels()]
    assert names == ["against SR-STE", "SR-STE + SpRe", "GMP"]  # RigL has no runs
    zero, *lines = right.lines
    assert list(zero.get_xdata()) == [0, 0]
    dots, interval, mean = lines[:3]
    assert list(dots.get_xdata()) == pytest.approx([2, 2, 2])
    assert list(interval.get_xdata()) == pytest.approx([2, 2])
    assert list(mean.get_xdata()) == pytest.approx([2])
    assert dots.get_color() == mean.get_color() != lines[3].get_color()
    assert list(lines[3].get_xdata()) == pytest.approx([-1, -1, -1])


def test_arms_with_the_same_baseline_stand_together(plot, tmp_path):
    listed = [("SR-STE + SpRe", "SR-STE"), ("SR-STE", "GMP"), ("GMP", "SR-STE")]
    compared = [plot.Comparison(*names) for names in listed]
    figure = plot.draw(rows(), ARMS, compared, tmp_path / "plot.svg", task="src")
    names = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert names == ["against SR-STE", "SR-STE + SpRe", "GMP", "against GMP", "SR-STE"]


def test_one_seed_is_drawn_without_an_interval(plot, tmp_path):
    _, right = draw(plot, tmp_path / "plot.svg", rows=rows(seeds=1)).axes
    _, *lines = right.lines
    assert [list(line.get_xdata()) for line in lines] == [pytest.approx([2]), pytest.approx([-1])]


def test_an_arm_without_runs_says_so(plot, tmp_path):
    left, _ = draw(plot, tmp_path / "plot.svg", drawn=(*ARMS, "LBC")).axes
    assert left.get_legend_handles_labels()[1] == [*ARMS, "LBC: no runs"]


def test_what_cannot_be_drawn_is_refused(plot, tmp_path):
    path = tmp_path / "plot.png"
    with pytest.raises(ValueError, match="expected 7 arms or fewer, found 8"):
        draw(plot, path, drawn="abcdefgh")
    with pytest.raises(
        ValueError, match=r"expected test runs of the task 'digits', found \['src'\]"
    ):
        draw(plot, path, task="digits")
    with pytest.raises(ValueError, match=r"expected pairs of test runs .*, found none of src, 1:8"):
        draw(plot, path, pattern="1:8")
    assert not path.exists()
