import dataclasses
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprune import config
from jaxprune.config import Arm, Config, Study


def test_defaults_are_those_of_the_quick_preset():
    settings = Config()
    assert (settings.preset, settings.epochs, settings.seeds) == ("quick", 2, 1)
    assert config.PRESETS["quick"] == {"epochs": 2, "seeds": 1}
    assert settings == Config(preset="quick", epochs=2, seeds=1)
    assert settings.levels == (0, 25, 50, 60, 70, 80, 90, 95, 97, 99)
    assert settings.granularities == ("weight", "unit")
    assert settings.protocols == ("one_shot", "trained")
    assert (settings.batch_size, settings.learning_rate) == (128, 1e-3)
    assert settings.hidden_sizes == (1000, 1000, 500, 200)


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ({}, "runs/fashion_mnist-quick"),
        ({"preset": "challenge"}, "runs/fashion_mnist-challenge"),
        ({"dataset": "mnist"}, "runs/mnist-quick"),
        ({"dataset": "idx:/data/kmnist/"}, "runs/kmnist-quick"),
        ({"dataset": "npz:/data/digits.v2.npz"}, "runs/digits.v2-quick"),
        ({"dataset": "text:a.txt", "network": "transformer"}, "runs/a-transformer-quick"),
        ({"network": "my:make"}, "runs/fashion_mnist-my-make-quick"),
        ({"run_dir": Path("elsewhere")}, "elsewhere"),
    ],
)
def test_folder(given, folder):
    assert Config(**given).folder == Path(folder)


def test_arms_are_all_combinations_in_the_order_in_which_they_run():
    study = Study(criteria=("a", "b"), scopes=("layer", "global"), granularities=("unit",))
    arms = study.arms(("a", "b"))
    assert [str(arm) for arm in arms[:3]] == [
        "a unit layer one_shot", "a unit global one_shot", "b unit layer one_shot",
    ]  # fmt: skip
    assert len(set(arms)) == 8
    assert Arm("a/b(c=1, d='é')", "unit", "layer", "trained").slug == (
        "a%2Fb(c=1,%20d=%27%C3%A9%27)-unit-layer-trained"
    )


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().epochs = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_settings_are_what_changes_results():
    settings = Config().settings()
    assert json.loads(json.dumps(settings)) == settings
    assert settings == {
        "dataset": "fashion_mnist", "network": "mlp", "learning_rate": 1e-3,
        "hidden_sizes": [1000, 1000, 500, 200],
    }  # fmt: skip
    same = Config(preset="challenge", seeds=9, data_dir=Path("a"), run_dir=Path("b"))
    assert same.settings() == settings


def test_the_place_of_a_data_set_is_no_setting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = Config(dataset="idx:digits").settings()
    assert settings["dataset"] == "digits"
    assert Config(dataset=f"idx:{tmp_path}/elsewhere/digits/").settings() == settings


@pytest.mark.parametrize(
    "change",
    [
        {"dataset": "mnist"},
        {"learning_rate": 2e-3},
        {"hidden_sizes": (10,)},
        {"network": "convnet"},
    ],
)
def test_each_setting_counts(change):
    assert Config(**change).settings() != Config().settings()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"levels": ()}, r"at least one percentage in \[0, 100\], got none"),
        ({"levels": (50.0, 101.0)}, r"levels must be in \[0, 100\] percent, got 101"),
        ({"levels": (50.0, 100.00001)}, r"levels must be in .* got 100\.00001"),
        ({"levels": (-0.5,)}, r"levels must be in \[0, 100\] percent, got -0.5"),
        ({"levels": (0.0, float("nan"))}, r"levels must be in \[0, 100\] percent, got nan"),
        ({"levels": (float("inf"),)}, r"levels must be in \[0, 100\] percent, got inf"),
        ({"levels": (50.0, 90.0, 50.0)}, "levels must be distinct, got 50 more than once"),
        ({"levels": (0.0, -0.0)}, "levels must be distinct"),
        ({"levels": (0.0, 0.5, 0.9)}, "levels are in percent: for 0.9 as a fraction give 90"),
        ({"levels": (1.0,)}, "levels are in percent: for 1 as a fraction give 100"),
        ({"levels": 50}, "levels must be a tuple of numbers, got 50"),
        ({"levels": ("a",)}, "levels must be a tuple of numbers, got .'a'"),
        ({"criteria": ()}, "criteria must name at least one, got none"),
        (
            {"granularities": ()},
            "granularities must be distinct and at least one, got none",
        ),
        ({"granularities": ("rows",)}, "granularities must be among weight, unit, row,.* got rows"),
        ({"granularities": ("4:2",)}, "n of m, with 0 < n < m, got 4:2"),
        ({"granularities": ("2:4",)}, "2:4 has the levels 0 and 50, and the protocol one_shot"),
        ({"scopes": ("owl",)}, "scope owl looks at a trained network"),
        ({"granularities": ("unit", "unit")}, "granularities must be distinct .* got unit unit"),
        ({"scopes": ("network",)}, "scopes must be .* among layer, global, .*, got network"),
        ({"protocols": ("one_shot", "x")}, "protocols must .* one_shot, trained, got one_shot x"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"epochs": -1}, "epochs must be at least 1, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"score_batch": 0}, "score_batch must be at least 1, got 0"),
        ({"recalibrate": -1}, "recalibrate must be at least 0, got -1"),
        ({"levels_at_once": 0}, "levels_at_once must be at least 1, got 0"),
        ({"context": 1}, "context must be at least 2, got 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive and finite, got nan"),
        ({"learning_rate": float("inf")}, "learning_rate must be positive and finite, got inf"),
        ({"hidden_sizes": ()}, "hidden_sizes must be sizes of at least 1"),
        ({"hidden_sizes": (10, 0)}, r"hidden_sizes must be .* got \[10, 0\]"),
    ],
)
def test_bad_values(given, message):
    # As users call it: the types are checked by the tests alone.
    settings = object.__new__(Config)
    for field in dataclasses.fields(Config):
        object.__setattr__(settings, field.name, given.get(field.name, field.default))
    with pytest.raises(ValueError, match=message):
        settings.__post_init__()


@pytest.mark.parametrize("levels", [(0.0,), (0.0, 1.5), (100.0,), (0.5, 1.1), (99.9, 0.0)])
def test_good_levels(levels):
    config.check_levels(levels)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (0.0, Fraction(0)),
        (25.0, Fraction(1, 4)),
        (99.9, Fraction(999, 1000)),
        (0.1, Fraction(1, 1000)),
        (1e-7, Fraction(1, 10**9)),
        (100.0, Fraction(1)),
    ],
)
def test_sparsity_of_level(level, expected):
    assert config.sparsity_of_level(level) == expected


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [(1, (0, 1, 0)), (2, (1, 1, 0)), (3, (1, 1, 1)), (4, (2, 1, 1)), (5, (2, 2, 1)),
     (20, (10, 5, 5))],
)  # fmt: skip
def test_phases(epochs, expected):
    assert config.phases(epochs) == expected


@given(st.integers(1, 10_000))
def test_phases_add_up(epochs):
    dense, pruning, masked = config.phases(epochs)
    assert dense + pruning + masked == epochs
    assert pruning >= 1
    assert dense >= 0
    assert pruning - masked in (0, 1)


def unchecked(given):
    """Return a study made past the tests' own check of types."""
    study = object.__new__(Study)
    for field in dataclasses.fields(Study):
        object.__setattr__(study, field.name, given.get(field.name, field.default))
    return study


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": 1.5}, "seeds must be a whole number, got 1.5"),
        ({"epochs": True}, "epochs must be a whole number, got True"),
        ({"criteria": "magnitude"}, "criteria must be a tuple, got 'magnitude'"),
    ],
)
def test_bad_types(given, message):
    study = unchecked(given)
    with pytest.raises(TypeError, match=message):
        study.__post_init__()


def test_whole_numbers_of_numpy_become_pythons():
    study = unchecked({"seeds": np.int64(2), "batch_size": np.int32(8)})
    study.__post_init__()
    assert json.loads(json.dumps([study.seeds, study.batch_size])) == [2, 8]


def test_the_name_of_an_arms_files_is_short_and_its_own():
    long, other = (Arm("c" * 300 + end, "weight", "layer", "one_shot") for end in "ab")
    assert len(long.slug) == len(other.slug) == 150 and long.slug != other.slug
    assert Arm("mine=2", "unit", "global", "trained").slug == "mine=2-unit-global-trained"


def test_imports_no_jax():
    code = "import sys, jaxprune.config; print('jax' in sys.modules, 'numpy' in sys.modules)"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr
