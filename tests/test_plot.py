"""Pictures: what they must show, read from the SVG; where designs cross; what is refused before anything is written."""
import builtins
import re
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import numpy as np
import pytest

from ioproc import Cost, plot

LINES = {"whole": [(0.0, 100.0), (1.0, 100.0)], "per VMA": [(0.0, 0.0), (1.0, 400.0)]}
CURVE = np.array([0, 5, 8, 9])


def row(design, violations=0, sound=True, **counts):
    return SimpleNamespace(design=design, modelled=Cost().model(counts), violations=violations, sound=sound)


ROWS = [row("mm+fault", faults=100), row("pin", registrations=50, registered_pages=200), row("pin-cache", 3, registrations=1)]
PICTURES = {"cost_bars": ROWS, "hit_curve": CURVE, "crossover": LINES}


def drawn(name, shown, path, *title):
    pytest.importorskip("matplotlib")
    getattr(plot, name)(shown, path, *title)
    return path


def texts(path):
    """All text of an SVG, in the order of drawing."""
    return ["".join(one.itertext()).strip() for one in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


# Where the cheapest changes

def test_crossing_of_two_lines():
    assert plot.crossings(LINES) == [(0.25, 100.0, "per VMA", "whole")]


def test_no_crossing():
    assert plot.crossings({"a": [(0, 1), (1, 2)], "b": [(0, 3), (1, 4)]}) == []
    assert plot.crossings({"a": [(0, 1), (1, 2)]}) == []


def test_lines_that_touch_do_not_cross():
    assert plot.crossings({"a": [(0, 1), (0.5, 2), (1, 1)], "b": [(0, 2), (1, 2)]}) == []


def test_only_where_all_lines_are_known_can_they_cross():
    assert plot.crossings({"a": [(0, 0), (1, 10)], "b": [(0.5, 1), (1, 1)]}) == []


def test_crossings_are_where_the_lowest_of_many_lines_changes():
    random = np.random.default_rng(0)
    for _ in range(100):
        shares = np.sort(random.random(6))
        series = {label: list(zip(shares, random.random(6))) for label in "abcd"}
        found = plot.crossings(series)
        for where in random.uniform(shares[0], shares[-1], 50):
            costs = {label: np.interp(where, *zip(*points)) for label, points in series.items()}
            lowest = next((before for share, _, before, _ in found if where < share), found[-1][3] if found else None)
            assert lowest in (None, min(costs, key=costs.get))
        for share, ns, before, after in found:
            assert ns == pytest.approx(np.interp(share, *zip(*series[before])))
            assert ns == pytest.approx(np.interp(share, *zip(*series[after])))


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [(-0.1, 1)]}, {"a": [(1.1, 1)]}, {"a": [(0.5, -1)]},
                                    {"a": [(0.5, float("nan"))]}])
def test_points_that_are_none(series, tmp_path):
    with pytest.raises(ValueError, match="series"):
        plot.crossings(series)


# What is drawn

@pytest.mark.parametrize("suffix, begin", [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".SVG", b"<?xml")])
@pytest.mark.parametrize("name", PICTURES)
def test_png_and_svg_by_suffix(name, suffix, begin, tmp_path):
    assert drawn(name, PICTURES[name], tmp_path / f"picture{suffix}").read_bytes().startswith(begin)


@pytest.mark.parametrize("name", PICTURES)
def test_the_same_picture_is_the_same_file(name, tmp_path):
    one, other = (drawn(name, PICTURES[name], tmp_path / f"{i}.svg") for i in range(2))
    assert one.read_bytes() == other.read_bytes()


def test_cost_bars_tell_designs_components_units_and_who_is_unsafe(tmp_path):
    told = texts(drawn("cost_bars", ROWS, tmp_path / "bars.svg", "a title"))
    assert {"mm+fault", "pin", "pin-cache", "modelled cost, ms", "1.05 ms", "824 µs", "16 µs  UNSAFE", "a title"} <= set(told)
    assert [one for one in told if one in plot.COMPONENTS] == ["NIC faults", "registration"]      # only what costs anything
    assert told.index("mm+fault") < told.index("pin") < told.index("pin-cache")


def test_cost_bars_tell_who_is_safe_here_only(tmp_path):
    told = texts(drawn("cost_bars", [row("pin-cache", sound=False, registrations=1)], tmp_path / "bars.svg"))
    assert "16 µs  safe here" in told


def test_cost_bars_that_are_far_longer_are_cut(tmp_path):
    long = [*ROWS, row("long", registrations=1000), row("short", registrations=1)]
    told = texts(drawn("cost_bars", long, tmp_path / "bars.svg"))
    assert "… 16 ms" in told and told.count("//") == 1
    told = texts(drawn("cost_bars", [*ROWS, row("long", registrations=300)], tmp_path / "bars.svg"))
    assert "4.8 ms" in told and "//" not in told            # the others can be read beside it


def test_cost_bars_of_nothing_and_of_no_rows(tmp_path):
    assert "0 ns" in texts(drawn("cost_bars", [row("mm+fault")], tmp_path / "bars.svg"))
    with pytest.raises(ValueError, match="comparison"):
        plot.cost_bars([], tmp_path / "none.svg")


def test_hit_curve_is_a_share_of_all_lookups(tmp_path, monkeypatch):
    """Twelve look-ups of three pages: 9 hit if all three fit."""
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes
    lines = []
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **style: lines.append((x.tolist(), y.tolist())))
    plot.hit_curve(CURVE, tmp_path / "curve.svg")
    sizes, share = lines[0]
    assert sizes[:3] == [1, 2, 3] and share[:3] == pytest.approx([500 / 12, 800 / 12, 900 / 12])


def test_hit_curves_by_label_have_a_log_axis_and_a_legend(tmp_path):
    told = set(texts(drawn("hit_curve", {"uniform": np.arange(1000), "Zipf": CURVE}, tmp_path / "curves.svg")))
    assert {"uniform", "Zipf", "1", "16", "256", "look-ups that hit, %", "cache size, entries (fully associative, LRU)"} <= told


@pytest.mark.parametrize("curve", [{}, [], [0], [[0, 1]], {"a": [0, 1], "b": 5}])
def test_curves_that_are_none(curve, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="curve"):
        plot.hit_curve(curve, tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def test_crossover_is_marked(tmp_path):
    told = texts(drawn("crossover", LINES, tmp_path / "crossover.svg"))
    assert {"whole", "per VMA", "share of the memory that communicates, %", "modelled cost, ns", "modelled cost beyond",
            "that of", "whole, ns",
            "25 %: from here", "whole costs less"} <= set(told)


def test_crossover_has_a_log_axis_unless_a_share_is_zero(tmp_path):
    some = {label: [(max(share, 0.01), ns) for share, ns in points] for label, points in LINES.items()}
    assert {"1", "10", "100"} <= set(texts(drawn("crossover", some, tmp_path / "crossover.svg")))


def test_crossover_of_one_line(tmp_path):
    assert "modelled cost, µs" in texts(drawn("crossover", {"alone": [(0.5, 2000)]}, tmp_path / "crossover.svg"))


def test_colours_are_okabe_and_itos(tmp_path):
    palette = {"#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#000000"}
    everything = [row("all", **{count: 1000 for one in Cost().parameters() for count in one.counts})]
    for name, shown in {**PICTURES, "cost_bars": everything}.items():
        colours = set(re.findall(r"#[0-9a-f]{6}", drawn(name, shown, tmp_path / f"{name}.svg").read_text()))
        greys = {colour for colour in colours if len({colour[1:3], colour[3:5], colour[5:]}) == 1}
        assert colours - greys <= palette and colours - greys


# What is refused

@pytest.mark.parametrize("path", ["picture", "picture.pdf", "picture.svg.txt"])
@pytest.mark.parametrize("name", PICTURES)
def test_other_suffixes(name, path, tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.png or \.svg"):
        getattr(plot, name)(PICTURES[name], tmp_path / path)


@pytest.mark.parametrize("name", PICTURES)
def test_without_matplotlib_the_error_names_the_extra(name, tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(module, *arguments, **options):
        if module.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {module!r}")
        return real(module, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'ioproc\[plot\]'"):
        getattr(plot, name)(PICTURES[name], tmp_path / "picture.svg")
    assert not (tmp_path / "picture.svg").exists()


def test_a_folder_that_is_not_there(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(FileNotFoundError):
        plot.hit_curve(CURVE, tmp_path / "missing" / "curve.svg")
