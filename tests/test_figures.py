"""The figures: what is drawn, that it can be drawn again byte by byte, and rows with gaps."""

import dataclasses
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from scipy import stats

from experiments.figures import main
from jaxprune import figures, results
from jaxprune.results import Row
from jaxprune.types import Metric

ROOT = Path(__file__).parent.parent
RUN = results.load_run(ROOT / "figures")
METRICS = RUN.metrics
LEVELS = (0.0, 0.5, 0.9, 0.99)
UNIT_NAMES = ["k-sparsity-unit", "epoch_training_units", "calibration-and-churn"]


def some(
    seeds: int = 3, epochs: Sequence[int] = (20,), levels: Sequence[float] = LEVELS, **fields: str
) -> list[Row]:
    """Rows of the committed run, but those that have other fields."""
    return [row for row in RUN.rows if row.seed < seeds and row.epoch in epochs
            and row.target_sparsity in levels
            and all(getattr(row, name) == value for name, value in fields.items())]  # fmt: skip


def change(rows: list[Row], **fields: Any) -> list[Row]:
    """Replace fields, or metrics, of all rows."""
    own = {name: fields.pop(name) for name in [*fields] if name not in Row.__dataclass_fields__}
    return [dataclasses.replace(row, metrics=row.metrics | own, **fields) for row in rows]


def data(ax: Axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    (found,) = (line for line in ax.lines if line.get_label() == label)
    return np.asarray(found.get_xdata()), np.asarray(found.get_ydata())


def values(rows: list[Row], name: str, **fields: Any) -> np.ndarray:
    """A field or metric of the rows that have these fields, (places, seeds)."""
    found = [r for r in rows if all(getattr(r, k) == v for k, v in fields.items())]
    found.sort(key=lambda r: (r.target_sparsity, r.epoch, r.seed))
    numbers = [r.metrics[name] if name in r.metrics else getattr(r, name) for r in found]
    return np.array(numbers).reshape(-1, len({row.seed for row in rows}))


def drawn(figure: Figure | None) -> Figure:
    assert figure is not None
    return figure


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for found in figure.legends for text in found.get_texts()]


def bands(ax: Axes) -> list[Any]:
    return [found for found in ax.collections if isinstance(found, PolyCollection)]


def seeds_of(ax: Axes) -> list[np.ndarray]:
    return [np.asarray(line.get_ydata()) for line in ax.lines if line.get_label() == "_seeds"]


def test_help_lists_the_functions() -> None:
    assert {"draw_figures", "differences", "k_sparsity", "speedups"} <= set(figures.__all__)
    assert all(hasattr(figures, name) for name in figures.__all__)


@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_k_sparsity_draws_means_and_seeds_of_the_last_epoch(granularity: str) -> None:
    rows = some(epochs=(19, 20))
    figure = drawn(figures.k_sparsity(rows[::-1], METRICS, granularity, note="a note"))
    for ax, name in zip(figure.axes, ("accuracy", "loss"), strict=True):
        for protocol in ("one_shot", "trained"):
            x, y = data(ax, f"magnitude {granularity} layer {protocol}")
            expected = values(rows, name, protocol=protocol, granularity=granularity, epoch=20)
            np.testing.assert_allclose(x, LEVELS)
            np.testing.assert_allclose(y, expected.mean(axis=1))
            assert np.isin(expected, np.concatenate(seeds_of(ax))).all()
        assert ax.get_xlabel().startswith(f"k (% of {granularity}s pruned),\nspaced by the log")
        assert [tick.get_text() for tick in ax.get_xticklabels()] == ["99", "90", "50", "0"]
        assert bands(ax) == []  # an interval of three seeds says less than the three
    assert [ax.get_ylabel() for ax in figure.axes] == ["test accuracy (%)", "test loss (nats)"]
    assert [ax.get_yscale() for ax in figure.axes] == ["linear", "log"]
    assert legend(figure) == [f"{granularity}s", "one-shot", "trained", "blind guess"]
    note = (
        "a note; magnitude scores, by layer; 20 epochs; lines: mean of 3 seeds; small points: the"
    )
    assert figure.get_supxlabel().replace("\n", " ") == (
        f"{note} seeds; 95% intervals: in the tables"
    )
    guesses = [data(ax, "blind guess")[1][0] for ax in figure.axes]
    np.testing.assert_allclose(guesses, [0.1, math.log(10)])
    figure = drawn(figures.k_sparsity(some(1), METRICS, granularity))
    assert [ax for ax in figure.axes if seeds_of(ax)] == []
    assert figure.get_supxlabel().endswith("; one seed")


def test_from_five_seeds_on_there_is_an_interval_cut_at_the_bounds() -> None:
    rows = some(protocol="one_shot", granularity="weight")
    for seed, top in enumerate((0.999, 0.999, 0.999, 0.99, 0.9)):
        rows += change(some(1, levels=(0.0,), protocol="one_shot", granularity="weight"), seed=seed,
                       target_sparsity=0.2, accuracy=top)  # fmt: skip
    for seed in (3, 4):
        rows += change(some(1, protocol="one_shot", granularity="weight"), seed=seed, accuracy=0.6)
    figure = drawn(figures.k_sparsity(rows, METRICS, "weight"))
    (band,) = bands(figure.axes[0])
    vertices = band.get_paths()[0].vertices
    at_90 = np.unique(vertices[np.isclose(vertices[:, 0], 0.9)][:, 1])
    (seeds,) = values(rows, "accuracy", target_sparsity=0.9)
    interval = stats.t.interval(0.95, 4, loc=seeds.mean(), scale=stats.sem(seeds))
    np.testing.assert_allclose([at_90.min(), at_90.max()], interval)
    assert vertices[:, 1].max() == 1
    assert "t interval, cut at the bounds" in figure.get_supxlabel().replace("\n", " ")


def test_weight_vs_unit_draws_equal_k_and_equal_size_and_the_trained_once_more() -> None:
    rows = some()
    figure = drawn(figures.weight_vs_unit(rows, METRICS))
    panels = np.array(figure.axes).reshape(3, 2)
    for (i, name), (j, x_name), granularity, protocol in product(
        ((0, "accuracy"), (2, "loss")), enumerate(("target_sparsity", "remaining")),
        ("weight", "unit"), ("one_shot", "trained"),
    ):  # fmt: skip
        x, y = data(panels[i, j], f"magnitude {granularity} layer {protocol}")
        kind = {"granularity": granularity, "protocol": protocol}
        np.testing.assert_allclose(x, values(rows, x_name, **kind).mean(axis=1))
        np.testing.assert_allclose(y, values(rows, name, **kind).mean(axis=1))
    low, high = panels[1, 0].get_ylim()
    assert 0 < high - low < 0.03 and panels[1, 0].get_ylabel().startswith("near the trained\ntest")
    assert panels[0, 1].get_xscale() == "log" and panels[0, 1].xaxis_inverted()
    looks = {
        (line.get_color(), line.get_marker(), line.is_dashed())
        for line in panels[0, 0].lines
        if line.get_label()[0] == "m"
    }  # pyright: ignore
    assert len(looks) == 4 and len({look[1:] for look in looks}) == 4  # also in grey
    assert legend(figure) == ["weights", "units", "one-shot", "trained", "blind guess"]
    unsized = drawn(figures.weight_vs_unit(change(some(1), remaining=None), METRICS))
    assert [ax.get_title() for ax in unsized.axes] == ["at equal k", "", ""]


def test_criteria_and_scopes_stand_side_by_side_and_are_paired_by_seed() -> None:
    rows = []
    for less, (criterion, scope) in enumerate(
        product(("magnitude", "random"), ("layer", "global"))
    ):
        for row in some(2, (19, 20)):
            accuracy = row.metrics["accuracy"] - less * row.seed / 100
            rows += change([row], criterion=criterion, scope=scope, accuracy=accuracy)
    figure = drawn(figures.k_sparsity(rows, METRICS, "weight"))
    names = ["magnitude, layer", "magnitude, global", "random, layer", "random, global"]
    assert legend(figure) == [*names, "one-shot", "trained", "blind guess"]
    labels = {str(line.get_label()) for line in figure.axes[0].lines}
    assert len({label for label in labels if label.startswith(("magnitude", "random"))}) == 8
    of_each = [f"{name}\ntest accuracy (%)" for name in names]
    figure = drawn(figures.weight_vs_unit(rows, METRICS))
    assert [ax.get_ylabel() for ax in figure.axes[::2]] == of_each
    figure = drawn(figures.epoch_training(rows, METRICS, "unit"))
    assert [ax.get_ylabel() for ax in figure.axes[::2]] == of_each
    figure = drawn(figures.calibration_and_churn(rows, METRICS))
    assert len(figure.axes) == 10  # the scaled loss has a panel of its own

    figure = drawn(figures.differences(rows, METRICS))
    panels = np.array(figure.axes).reshape(2, 2)
    _, y = data(panels[0, 1], "random unit layer one_shot")
    np.testing.assert_allclose(y, [-0.01] * len(LEVELS))  # 0 of seed 0, 2 points of seed 1
    assert panels[0, 0].get_ylabel() == "test accuracy,\ndifference (points)"
    assert panels[1, 0].get_ylabel() == "test loss,\ndifference (nats)"
    assert legend(figure) == [*names[1:], "one-shot", "trained"]
    assert figures.differences(some(1), METRICS) is None


def test_epoch_training_tells_four_levels_apart() -> None:
    epochs, levels = range(8, 21, 2), (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    rows = some(epochs=epochs, levels=levels)
    figure = drawn(figures.epoch_training(rows, METRICS, "weight"))
    panels = np.array(figure.axes).reshape(3, 2)
    for (i, name), (j, protocol), level in product(
        ((0, "accuracy"), (2, "loss")), enumerate(("one_shot", "trained")), levels
    ):
        x, y = data(panels[i, j], f"{100 * level:g}")
        kind = {"granularity": "weight", "protocol": protocol, "target_sparsity": level}
        # The levels share the dense epochs, 8 and 10, which are drawn once.
        first = 1 if protocol == "trained" and level else 0
        np.testing.assert_allclose(x, epochs[first:])
        np.testing.assert_allclose(y, values(rows, name, **kind).mean(axis=1)[first:])
        assert panels[i, 0].get_ylim() == panels[i, 1].get_ylim()
    strong = [f"k = {k}%" for k in (0, 60, 80, 95)]
    assert legend(figure) == [*strong, "other levels", "being pruned"]
    widths = {str(line.get_label()): line.get_linewidth() for line in panels[0, 0].lines}
    assert widths["50"] == widths["70"] == widths["90"] < widths["0"] == widths["95"]
    spans = [[(p.get_x(), p.get_width()) for p in ax.patches] for ax in figure.axes]  # pyright: ignore
    assert spans == [[], [(10, 6)]] * 3
    assert [ax.get_title() for ax in panels[0]] == ["weights, one-shot", "weights, trained"]


def test_calibration_and_churn() -> None:
    rows = some()
    figure = drawn(figures.calibration_and_churn(rows, METRICS))
    panels = np.array(figure.axes).reshape(4, 2)
    names = ("signed_ece", "loss", "churn", "worst_class_accuracy")
    for (i, name), (j, granularity) in product(enumerate(names), enumerate(("weight", "unit"))):
        label = f"magnitude {granularity} layer trained"
        curves = [c for c in panels[i, j].lines if c.get_label() == label]
        for curve, metric in zip(curves, (name, "scaled_loss"), strict=name == "loss"):
            expected = values(rows, metric, granularity=granularity, protocol="trained")
            np.testing.assert_allclose(np.asarray(curve.get_ydata()), expected.mean(axis=1))
    assert [ax.get_title() for ax in panels[0]] == ["weights", "units"]
    assert legend(figure)[-1] == "loss at the best temperature"
    assert figures.calibration_and_churn(rows, METRICS[:2]) is None


def test_other_tasks_are_drawn_by_what_they_say_of_their_metrics() -> None:
    metrics = (
        Metric("loss", "mean squared error", "", "lower", True, 0.0),
        Metric("r2", "R²", "", "higher", True, None, 1.0, 0.0),
    )
    rows = [dataclasses.replace(row, metrics={"loss": 1.0 + row.sparsity, "r2": -90 * row.sparsity})
            for row in some(1)]  # fmt: skip
    figure = drawn(figures.k_sparsity(rows, metrics, "weight"))
    assert [ax.get_yscale() for ax in figure.axes] == ["log", "linear"]
    assert [ax.get_ylabel() for ax in figure.axes] == ["mean squared error", "R²"]
    assert figure.axes[1].get_ylim()[0] == -1  # what is worse than a guess tells nothing more
    own = (Metric("loss", "test loss", "", "lower"),)
    (ax,) = drawn(figures.k_sparsity(rows, own, "weight")).axes
    assert ax.get_yscale() == "linear"


def test_draw_figures_refuses_two_rows_of_one_identity_and_describe_names_what_it_is_of() -> None:
    with pytest.raises(ValueError, match=r"two rows of magnitude weight layer .* seed 0, epoch 20"):
        figures.draw_figures(some(1) + change(some(1), accuracy=0.5), METRICS)
    settings = {"dataset": "kmnist", "network": "mlp", "hidden_sizes": [300, 100]}
    assert figures.describe(settings) == "kmnist; mlp; hidden layers 300-100"
    assert figures.describe({}) == ""


def test_levels_keep_their_order_and_have_room_up_to_100() -> None:
    base = some(1, levels=(0.0,), protocol="one_shot", granularity="weight")

    def axis(levels: Sequence[float]) -> Axes:
        rows = [row for level in levels for row in change(base, target_sparsity=level)]
        return drawn(figures.k_sparsity(rows, METRICS, "weight")).axes[0]

    levels = (0.0, 0.5, 0.9, 0.99, 0.999, 1.0)
    ax = axis(levels)
    places = ax.transLimits.transform(ax.transScale.transform([(level, 0.5) for level in levels]))
    assert 0 < places[0, 0] and places[-1, 0] < 1
    assert np.diff(places[:, 0]).min() > 0.05
    ax = axis(many := [i / 100 for i in range(100)])
    assert 5 < len(ax.get_xticks()) < 20
    assert {*ax.get_xticks(), *ax.get_xticks(minor=True)} == set(many)


SMALL = some(1, (9, 20), (0.0, 0.9))
NOTHING = dict.fromkeys(metric.name for metric in METRICS)
ALL = ["k-sparsity-weight", "k-sparsity-unit", "weight-vs-unit", "epoch_training_weights"]
ALL += UNIT_NAMES[1:]
GAPS: dict[str, tuple[list[Row], list[str]]] = {
    "no rows": ([], []),
    "one protocol": ([r for r in SMALL if r.protocol == "trained"], ALL),
    "level 0, one epoch": (some(2, levels=(0.0,)), [*ALL[:3], ALL[-1]]),
    "nothing measured": (change(SMALL, remaining=None, **NOTHING), ALL),
    "one seed measured": (SMALL + change(SMALL, seed=1, remaining=0, **NOTHING), ALL),
    "not finished": ([r for r in SMALL if r.protocol == "one_shot" or r.epoch < 20], ALL),
    "others": (change(some(1, granularity="unit", protocol="trained"), protocol="x",
                      granularity="block"), ["k-sparsity-block", "calibration-and-churn"]),
}  # fmt: skip


@pytest.mark.parametrize("gap", GAPS)
def test_rows_with_gaps(gap: str) -> None:
    rows, names = GAPS[gap]
    found = figures.draw_figures(rows, METRICS)
    assert list(found) == names
    for figure in found.values():
        figure.set_layout_engine("none")  # most of the time
        figure.draw_without_rendering()


def cost_rows() -> list[dict]:
    """Two batch sizes; 3% faster from 80% on at one row, from 90% on at many."""
    ratios = {(1, 0): [1.0, 1.0, 1.0], (1, 80): [1.0, 1.2, 1.4], (1, 90): [2.0, 2.0, 2.5],
              (256, 0): [1.0, 1.0, 1.0], (256, 80): [1.0, 1.02, 1.1],
              (256, 90): [3.0, 3.5, 4.0]}  # fmt: skip
    return [
        {"granularity": granularity, "level": level, "batch": batch, "ratios": found, "dense": 1000,
         "kept": 1000 - 10 * level, "executed": 1000 - 11 * level,
         "seconds": {"ours": [100.0 - level]}}
        for granularity in ("weight", "unit") for (batch, level), found in ratios.items()
    ]  # fmt: skip


def test_speedups_mark_the_crossover_and_the_ideal_of_what_is_run() -> None:
    figure = drawn(figures.speedups(cost_rows(), note="a network"))
    assert [ax.get_title() for ax in figure.axes] == ["weights", "units"]
    ax = figure.axes[0]
    np.testing.assert_allclose(data(ax, "batch 1")[1], [1.0, 1.2, 2.0])  # medians
    np.testing.assert_allclose(data(ax, "ideal, by multiply-adds run")[1], [1, 1000 / 120, 100])
    np.testing.assert_allclose(data(ax, "batch 1, beside own dense, 0%")[1], [1, 5, 10])
    rings = [line for line in ax.lines if line.get_markersize() == 9]
    assert [np.asarray(ring.get_xydata()).tolist() for ring in rings] == [
        [[0.8, 1.2]],
        [[0.9, 3.5]],
    ]


def test_file_sizes_are_means_over_seeds_with_their_range() -> None:
    sizes = {"bound": 5e5, "bitmap": 6e5, "csr": 9e5, "npz": 7e5, "gzip": 8e5}
    rows = [
        {"level": level, "seed": seed, "values": values, "bytes": (1 + seed) * 1e6 / level,
         "accuracy": 0.8 + 0.1 * seed, **sizes}
        for level in (50, 90) for seed in (0, 1) for values in ("float32", "int8")
    ]  # fmt: skip
    left, right = drawn(figures.file_sizes(rows)).axes
    np.testing.assert_allclose(data(left, "int8")[1], [0.03, 1.5 / 90])
    np.testing.assert_allclose(data(left, "bound: independent places")[1], [0.5, 0.5])
    np.testing.assert_allclose(np.asarray(right.lines[0].get_ydata()), [0.85, 0.85])
    bar = right.collections[0].get_segments()[0]  # pyright: ignore
    np.testing.assert_allclose(bar[:, 1], [0.8, 0.9])
    others = {(line.get_color(), line.get_marker()) for line in left.lines[2:]}
    assert len(others) == 5


@pytest.mark.parametrize("draw", [figures.speedups, figures.file_sizes])
def test_costs_of_nothing_are_refused(draw: Any) -> None:
    with pytest.raises(ValueError, match="needs at least one row"):
        draw([])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with few rows and their config."""
    path = tmp_path_factory.mktemp("runs")
    results.write_csv(path / "results.csv", some(2, (9, 20), (0.0, 0.9), granularity="unit"))
    shutil.copyfile(ROOT / "figures/config.json", path / "config.json")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_command_redraws_the_same_bytes_from_its_own_output(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "figures"
    assert main([str(run_dir), "--out", str(out)]) == 0
    before = contents(out)
    names = {f"{name}{suffix}" for name in UNIT_NAMES for suffix in (".png", ".svg")}
    assert set(before) == names | {"results.csv", "config.json", "RESULTS.md"}
    assert {Path(name).name for name in capsys.readouterr().out.split()} == set(before)
    assert results.load_run(out).rows == results.load_run(run_dir).rows
    svg = before["k-sparsity-unit.svg"].decode()
    assert "matplotlib.org" not in svg and "<dc:date>" not in svg
    assert b"![k-sparsity-unit](k-sparsity-unit.png)" in before["RESULTS.md"]

    # A process of its own: other hash seeds, and matplotlib as a user may have set it up.
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nlines.linewidth: 9\naxes.grid: False\n")
    command = [sys.executable, str(ROOT / "experiments/figures.py"), str(out), "--out", str(out)]
    environment = {"PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(tmp_path)}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert contents(out) == before


def test_command_refuses_what_is_no_run(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_bytes((run_dir / "config.json").read_bytes())
    for source, out, message in (
        (tmp_path, tmp_path / "out", "no config.json"),
        (empty, tmp_path / "out", "no rows yet"),
        (tmp_path / "missing", tmp_path / "out", "missing is not a directory"),
        (run_dir, tmp_path / "file", f"File exists: '{tmp_path / 'file'}'"),
    ):
        assert main([str(source), "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="2"):
        main([str(run_dir)])
