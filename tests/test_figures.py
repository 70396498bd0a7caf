"""The figures: what is drawn, that it can be drawn again byte by byte, and rows with gaps."""

import dataclasses
import math
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats

from experiments.figures import main
from jaxprune import figures, results
from jaxprune.results import Row

ROOT = Path(__file__).parent.parent
LEVELS = (0.0, 0.5, 0.9, 0.99)
UNIT_NAMES = ["k-sparsity-unit", "epoch_training_units", "calibration-and-churn"]
NAMES = ["k-sparsity-weight", "k-sparsity-unit", "weight-vs-unit", "epoch_training_weights"]
NAMES += UNIT_NAMES[1:]
MEASURED = (
    "accuracy loss ece signed_ece temperature scaled_loss churn worst_class_accuracy"
).split()


def make_row(
    protocol: str, method: str, seed: int, epoch: int, level: float, *, epochs: int
) -> Row:
    """A network that decays with the level, sooner by units, hardly if trained."""
    dense = epochs // 2
    achieved = level if protocol == "one_shot" or epoch > dense else 0.0
    harm = achieved ** (4 if method == "unit" else 12) * (1 if protocol == "one_shot" else 0.05)
    wobble = 0.01 * math.sin(1 + 7 * seed + 3 * epoch + 11 * level)
    accuracy = 0.1 + (0.79 - 0.3 / epoch) * (1 - harm) + wobble
    loss = math.log(10) ** harm * (0.4 + 0.3 / epoch) ** (1 - harm) + wobble
    kept = (1 - achieved) ** (2 if method == "unit" else 1)
    return Row(
        protocol=protocol, criterion="magnitude", method=method, scope="layer", seed=seed,
        epoch=epoch, target_sparsity=level, sparsity=achieved, total_sparsity=0.999 * achieved,
        remaining=2000 + round(2_384_000 * kept), accuracy=accuracy, loss=loss, ece=0.05,
        signed_ece=0.05 - harm / 4 + wobble, temperature=1.2, scaled_loss=0.9 * loss,
        churn=0.9 - accuracy, class_accuracy=[accuracy] * 10, worst_class_accuracy=accuracy - 0.1,
        val_accuracy=accuracy, val_loss=loss, train_seconds=1.0, mask_seconds=0.1,
        eval_seconds=0.2,
    )  # fmt: skip


def make_rows(seeds: int = 3, epochs: int = 4, levels: tuple[float, ...] = LEVELS) -> list[Row]:
    keys = product(
        ("one_shot", "trained"), ("weight", "unit"), range(seeds), range(1, epochs + 1), levels
    )
    return [make_row(*key, epochs=epochs) for key in keys]


def change(rows: list[Row], **fields: Any) -> list[Row]:
    return [dataclasses.replace(row, **fields) for row in rows]


def line(ax: Axes, label: str) -> Line2D:
    (found,) = (line for line in ax.lines if line.get_label() == label)
    return found


def data(line: Line2D) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def values(rows: list[Row], field: str, **fields: Any) -> np.ndarray:
    """The values of a field in the rows that have these fields; seeds last, sorted otherwise."""
    found = [r for r in rows if all(getattr(r, k) == v for k, v in fields.items())]
    found.sort(key=lambda r: (r.target_sparsity, r.epoch, r.seed))
    seeds = len({row.seed for row in rows})
    return np.array([getattr(row, field) for row in found]).reshape(-1, seeds)


def drawn(figure: Figure | None) -> Figure:
    assert figure is not None
    return figure


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


@pytest.mark.parametrize("method", ["weight", "unit"])
def test_k_sparsity_draws_the_means_of_the_last_epoch(method: str) -> None:
    rows = make_rows()
    figure = drawn(figures.k_sparsity(rows[::-1], method, note="a note"))
    for ax, field in zip(figure.axes, ("accuracy", "loss"), strict=True):
        for protocol, name in (("one_shot", "one-shot"), ("trained", "trained")):
            x, y = data(line(ax, f"{method}s, {name}"))
            expected = values(rows, field, protocol=protocol, method=method, epoch=4)
            np.testing.assert_allclose(x, LEVELS)
            np.testing.assert_allclose(y, expected.mean(axis=1))
        assert line(ax, f"{method}s, one-shot").is_dashed()
        assert line(ax, f"{method}s, trained").get_linestyle() == "-"
        assert ax.get_xlabel() == f"k (% of {method}s pruned)"
        assert [tick.get_text() for tick in ax.get_xticklabels()] == ["99", "90", "50", "0"]
    assert [ax.get_ylabel() for ax in figure.axes] == ["test accuracy (%)", "test loss (nats)"]
    assert [ax.get_yscale() for ax in figure.axes] == ["linear", "log"]
    assert texts(figure) == [f"{method}s, one-shot", f"{method}s, trained", "uniform guess"]
    footnote = "a note; magnitude scores, by layer; 4 epochs; mean of 3 seeds, band: 95% t interval"
    assert figure.get_supxlabel() == footnote


def test_a_uniform_guess_is_marked() -> None:
    figure = drawn(figures.k_sparsity(make_rows(), "weight"))
    guesses = [data(line(ax, "uniform guess"))[1] for ax in figure.axes]
    np.testing.assert_allclose(guesses, [[0.1, 0.1], [math.log(10)] * 2])


def bands(ax: Axes) -> list[Any]:
    return [c for c in ax.collections if isinstance(c, PolyCollection)]


def test_bands_are_the_t_interval() -> None:
    rows = [row for row in make_rows() if row.protocol == "one_shot"]
    ax = drawn(figures.k_sparsity(rows, "weight")).axes[0]
    (band,) = bands(ax)
    vertices = band.get_paths()[0].vertices
    at_90 = np.unique(vertices[np.isclose(vertices[:, 0], 0.9)][:, 1])
    (seeds,) = values(rows, "accuracy", method="weight", epoch=4, target_sparsity=0.9)
    interval = stats.t.interval(0.95, 2, loc=seeds.mean(), scale=stats.sem(seeds))
    np.testing.assert_allclose([at_90.min(), at_90.max()], interval)


def test_one_seed_has_no_band() -> None:
    rows = make_rows(seeds=1)
    for figure in figures.draw_figures(rows).values():
        assert [ax for ax in figure.axes if bands(ax)] == []
        assert "one seed" in figure.get_supxlabel()


def test_an_interval_at_a_single_level_is_a_bar() -> None:
    rows = [r for r in make_rows(levels=(0.9,)) if (r.protocol, r.method) == ("trained", "unit")]
    _, bars = drawn(figures.k_sparsity(rows, "unit")).axes[0].collections
    (seeds,) = values(rows, "accuracy", epoch=4)
    half = results.mean_interval(seeds.tolist())[1]
    (bar,) = bars.get_paths()
    np.testing.assert_allclose(bar.vertices[:, 1] - seeds.mean(), [-half, half])  # type: ignore


def test_weight_vs_unit_draws_equal_k_and_equal_size() -> None:
    rows = make_rows()
    figure = drawn(figures.weight_vs_unit(rows))
    panels = np.array(figure.axes).reshape(2, 2)
    for (i, field), (j, x_field) in product(
        enumerate(("accuracy", "loss")), enumerate(("target_sparsity", "remaining"))
    ):
        for method, protocol in product(("weight", "unit"), ("one_shot", "trained")):
            name = f"{method}s, {protocol.replace('_', '-')}"
            x, y = data(line(panels[i, j], name))
            kind = {"method": method, "protocol": protocol, "epoch": 4}
            np.testing.assert_allclose(x, values(rows, x_field, **kind).mean(axis=1))
            np.testing.assert_allclose(y, values(rows, field, **kind).mean(axis=1))
    colors = {
        line(panels[0, 0], f"{method}s, trained").get_color() for method in ("weight", "unit")
    }
    assert len(colors) == 2
    assert panels[0, 1].get_xscale() == "log"
    assert panels[0, 1].xaxis_inverted()
    assert panels[1, 0].get_xlabel() == "k (% of weights or units pruned)"
    assert panels[1, 1].get_xlabel() == "weights that remain (fewer to the right)"


@pytest.mark.parametrize("method", ["weight", "unit"])
def test_epoch_training_draws_a_line_a_level(method: str) -> None:
    rows = make_rows()
    panels = np.array(drawn(figures.epoch_training(rows, method)).axes).reshape(2, 2)
    for (i, field), (j, protocol) in product(
        enumerate(("accuracy", "loss")), enumerate(("one_shot", "trained"))
    ):
        ax = panels[i, j]
        for level, label in zip(LEVELS, ("0", "50", "90", "99"), strict=True):
            x, y = data(line(ax, label))
            kind = {"method": method, "protocol": protocol, "target_sparsity": level}
            # The levels share the dense epochs, 1 and 2, which are drawn once.
            first = 2 if protocol == "trained" and level else 1
            np.testing.assert_allclose(x, range(first, 5))
            np.testing.assert_allclose(y, values(rows, field, **kind).mean(axis=1)[first - 1 :])
        labels = [text.get_text() for text in ax.texts]
        assert labels[-1] == "k (%)"
        assert sorted(labels[:-1]) == ["0", "50", "90", "99"]
        heights = np.sort([text.xyann[1] for text in ax.texts[:-1]])
        assert np.diff(heights).min() > 0.07
    names = [ax.get_title() for ax in panels[0]]
    assert names == [f"{method}s, one-shot", f"{method}s, trained"]


def test_the_epochs_of_pruning_are_shaded() -> None:
    figure = drawn(figures.epoch_training(make_rows(), "weight"))
    spans = [[(p.get_x(), p.get_width()) for p in ax.patches] for ax in figure.axes]  # type: ignore
    assert spans == [[], [(2, 1)]] * 2
    assert texts(figure) == ["being pruned"]


def test_calibration_and_churn() -> None:
    rows = make_rows()
    figure = drawn(figures.calibration_and_churn(rows))
    panels = np.array(figure.axes).reshape(4, 2)
    fields = ("signed_ece", "loss", "churn", "worst_class_accuracy")
    for (i, field), (j, method) in product(enumerate(fields), enumerate(("weight", "unit"))):
        kind = {"method": method, "protocol": "trained", "epoch": 4}
        curves = [c for c in panels[i, j].lines if c.get_label() == f"{method}s, trained"]
        expected = [field, "scaled_loss"] if field == "loss" else [field]
        for curve, metric in zip(curves, expected, strict=True):
            x, y = data(curve)
            np.testing.assert_allclose(x, LEVELS)
            np.testing.assert_allclose(y, values(rows, metric, **kind).mean(axis=1))
    assert [ax.get_title() for ax in panels[0]] == ["weights", "units"]
    assert texts(figure) == ["one-shot", "trained", "loss after temperature scaling"]


def test_levels_keep_their_order_and_have_room_up_to_100() -> None:
    levels = (0.0, 0.5, 0.9, 0.99, 0.999, 1.0)
    ax = drawn(figures.k_sparsity(make_rows(1, 1, levels), "weight")).axes[0]
    places = ax.transLimits.transform(ax.transScale.transform([(level, 0.5) for level in levels]))
    assert 0 < places[0, 0] and places[-1, 0] < 1
    assert np.diff(places[:, 0]).min() > 0.05


def test_levels_too_near_to_be_labelled_keep_a_tick() -> None:
    levels = tuple(i / 100 for i in range(100))
    ax = drawn(figures.k_sparsity(make_rows(1, 1, levels), "weight")).axes[0]
    assert 5 < len(ax.get_xticks()) < 20
    ticks = {*ax.get_xticks(), *ax.get_xticks(minor=True)}
    assert ticks == set(levels)


SMALL = make_rows(1, 2)
UNKNOWN = dict.fromkeys(MEASURED)
GAPS: dict[str, tuple[list[Row], list[str]]] = {
    "no rows": ([], []),
    "one protocol": ([r for r in SMALL if r.protocol == "trained"], NAMES),
    "one method": ([r for r in SMALL if r.method == "unit"], UNIT_NAMES),
    "one level": (make_rows(2, 2, (0.9,)), NAMES),
    "level 0, one epoch": (make_rows(1, 1, (0.0,)), NAMES),
    "level 100": (make_rows(1, 2, (1.0,)), NAMES),
    "nothing measured": (change(SMALL, **UNKNOWN, remaining=None, class_accuracy=[]), NAMES),
    "no weights, no number": (SMALL + change(SMALL, seed=1, remaining=0, loss=math.nan), NAMES),
    "one seed measured": (SMALL + change(SMALL, seed=1, **UNKNOWN), NAMES),
    "not finished": ([r for r in SMALL if r.protocol == "one_shot" or r.epoch < 2], NAMES),
    "others": (SMALL + change(SMALL, method="block") + change(SMALL, protocol="other"), NAMES),
}


@pytest.mark.parametrize("gap", GAPS)
def test_rows_with_gaps(gap: str) -> None:
    rows, names = GAPS[gap]
    drawn = figures.draw_figures(rows)
    assert list(drawn) == names
    for figure in drawn.values():
        figure.set_layout_engine("none")  # most of the time
        figure.draw_without_rendering()


def test_without_remaining_there_is_no_panel_of_it() -> None:
    figure = drawn(figures.weight_vs_unit(change(make_rows(1, 1), remaining=None)))
    assert [ax.get_title() for ax in figure.axes] == ["at equal k", ""]


def test_rows_of_several_criteria_are_not_averaged() -> None:
    rows = make_rows(1, 1)
    with pytest.raises(ValueError, match=r"one criterion and scope.*'snip', 'layer'"):
        figures.draw_figures(rows + change(rows, criterion="snip"))


def test_describe() -> None:
    settings = {"dataset": "idx:/home/me/kmnist/", "hidden_sizes": [300, 100]}
    assert figures.describe(settings) == "kmnist; hidden layers 300-100"
    assert figures.describe({"dataset": "mnist"}) == "mnist"
    assert figures.describe({}) == ""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory, as far as figures read it."""
    path = tmp_path_factory.mktemp("runs") / "toy"
    path.mkdir()
    rows = [row for row in make_rows(2, 2, (0.0, 0.9)) if row.method == "unit"]  # fewer figures
    results.append_rows(path / "results.jsonl", rows)
    config = {"settings": {"dataset": "mnist", "hidden_sizes": [300, 100]}, "seeds": 2}
    results.write_json_atomic(path / "config.json", config)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_command_redraws_the_same_bytes_from_its_own_output(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "figures"
    assert main([str(run_dir), "--out", str(out)]) == 0
    before = contents(out)
    drawn = {f"{name}{suffix}" for name in UNIT_NAMES for suffix in (".png", ".svg")}
    assert set(before) == drawn | {"results.csv", "config.json"}
    assert {Path(name).name for name in capsys.readouterr().out.split()} == set(before)
    assert before["config.json"] == (run_dir / "config.json").read_bytes()
    assert results.read_csv(out / "results.csv") == results.read_rows(run_dir / "results.jsonl")
    svg = before["k-sparsity-unit.svg"].decode()
    assert "mnist; hidden layers 300-100" in svg
    assert "matplotlib.org" not in svg and "<dc:date>" not in svg

    # A process of its own: other hash seeds, and matplotlib as a user may have set it up.
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nlines.linewidth: 9\naxes.grid: False\n")
    command = [sys.executable, str(ROOT / "experiments/figures.py"), str(out), "--out", str(out)]
    environment = {"PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(tmp_path)}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert contents(out) == before


@pytest.mark.parametrize(
    ("rows", "config", "message"),
    [
        (None, None, "no config.json"),
        (None, '{"settings": {}}', "no rows yet"),
        ("", '{"settings": {}}', "no rows yet"),
        ("{}\n", '{"settings": {}}', "results.jsonl, line 1: not a row"),
        ("", "[]", "config.json is not the config"),
    ],
)
def test_command_refuses_what_is_no_run(
    rows: str | None,
    config: str | None,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, text in (("results.jsonl", rows), ("config.json", config)):
        if text is not None:
            (tmp_path / name).write_text(text)
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_command_refuses_a_missing_folder_and_one_it_cannot_make(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "missing"), "--out", str(tmp_path)]) == 2
    assert "missing is not a directory" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main([str(run_dir), "--out", str(tmp_path / "file")]) == 2
    assert f"File exists: '{tmp_path / 'file'}'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([str(run_dir)])


def test_colors_tell_the_methods_apart_in_grey() -> None:
    """Print has no colour: what differs by colour also differs by marker or by line."""
    ax = drawn(figures.weight_vs_unit(make_rows(1, 1))).axes[0]
    looks = {
        (curve.get_marker(), curve.is_dashed(), to_rgba(curve.get_markerfacecolor()) == (1,) * 4)
        for curve in ax.lines[:4]
    }
    assert len(looks) == 4


def test_widths_before_and_after() -> None:
    figure = drawn(figures.widths({"stem": (16, 4), "logits": (10, 10)}, note="a network"))
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["stem", "logits"]
    lengths = [bar.get_width() for bar in ax.patches]  # type: ignore[attr-defined]
    assert lengths == [16, 10, 4, 10]
    assert [text.get_text() for text in ax.texts] == [" 4 of 16", " 10 of 10"]
    with pytest.raises(ValueError, match="at least one group"):
        figures.widths({})


def cost_rows() -> list[dict]:
    """Two batch sizes; 3% faster from 80% on at one row, from 90% on at many."""
    ratios = {(1, 50): [0.9, 1.0, 1.1], (1, 80): [1.0, 1.2, 1.4], (1, 90): [2.0, 2.0, 2.5],
              (256, 50): [1.0, 1.0, 1.0], (256, 80): [1.0, 1.02, 1.1],
              (256, 90): [3.0, 3.5, 4.0]}  # fmt: skip
    return [
        {"method": method, "level": level, "batch": batch, "ratios": found, "dense": 1000,
         "kept": 1000 - 10 * level}
        for method in ("weight", "unit") for (batch, level), found in ratios.items()
    ]  # fmt: skip


def test_speedups_mark_the_crossover_and_the_ideal() -> None:
    figure = drawn(figures.speedups(cost_rows(), note="a network"))
    assert [ax.get_title() for ax in figure.axes] == ["weights", "units"]
    lines = {str(line.get_label()): line for line in figure.axes[0].lines}
    assert lines["batch 1"].get_ydata() == pytest.approx([1.0, 1.2, 2.0])  # medians
    assert lines["ideal"].get_ydata() == pytest.approx([2, 5, 10])
    rings = [line for line in figure.axes[0].lines if line.get_markersize() == 9]
    assert [np.asarray(ring.get_xydata()).tolist() for ring in rings] == [
        [[0.8, 1.2]],
        [[0.9, 3.5]],
    ]
    with pytest.raises(ValueError, match="at least one row"):
        figures.speedups([])


def test_file_sizes_are_means_over_seeds() -> None:
    sizes = {"bound": 5e5, "bitmap": 6e5, "csr": 9e5, "npz": 7e5, "gzip": 8e5}
    rows = [
        {"level": level, "seed": seed, "values": values, "bytes": (1 + seed) * 1e6 / level,
         "accuracy": 0.8 + 0.1 * seed, **sizes}
        for level in (50, 90) for seed in (0, 1) for values in ("float32", "int8")
    ]  # fmt: skip
    figure = drawn(figures.file_sizes(rows))
    left, right = figure.axes
    lines = {str(line.get_label()): line for line in left.lines}
    assert lines["int8"].get_ydata() == pytest.approx([0.03, 1.5 / 90])
    assert lines["lossless bound"].get_ydata() == pytest.approx([0.5, 0.5])
    assert right.lines[0].get_ydata() == pytest.approx([0.85, 0.85])
    with pytest.raises(ValueError, match="at least one row"):
        figures.file_sizes([])
