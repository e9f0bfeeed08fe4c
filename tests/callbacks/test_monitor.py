"""What the monitor shows is what happened, and showing it changes nothing."""

from __future__ import annotations

import csv
import importlib.util
from collections import Counter, defaultdict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy
import pytest
import pytorch_lightning as pl
import torch
from matplotlib.image import imread
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kfac_dist.callbacks import KFACMonitor
from kfac_dist.callbacks.measures import Costs
from kfac_dist.callbacks.pictures import draw_coefficients, draw_couplings
from kfac_dist.coarse_solver import CoarseSystem
from kfac_dist.metrics import Metrics, PhaseTimer
from tests.callbacks import jobs
from tests.callbacks.tiny import BATCH, Classifier, Manual, assert_equal, data, fit, kfac, loader, weights

COARSE = {"space": "layer_step", "damping": 0.1}
QUIET = {"figures_every_n_steps": 0, "summary": False}


def run(monitor: KFACMonitor, steps: int = 6, callback: Any = None, model: Any = None, others=(), **options) -> Any:
    """A fit of so many steps; the logger that keeps everything."""
    logger = jobs.Keeping()
    defaults = {"logger": logger, "log_every_n_steps": 1}
    callbacks = [callback or kfac(coarse=COARSE), monitor, *others]
    fit(model or Classifier(), callbacks, loader(data(steps * BATCH)), **defaults | options)
    return logger


def by_step(logger: Any) -> dict[str, dict[int, float]]:
    """Name -> step -> value."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for step, line in logger.lines:
        for name, value in line.items():
            found[name][step] = value
    return found


class Watcher(pl.Callback):
    """Stands behind the monitor and sees what it should have seen."""

    def __init__(self) -> None:
        self.spectra: list[Any] = []
        self.bars: list[dict[str, float]] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.spectra.append(trainer.callbacks[0].preconditioner.spectra())
        self.bars.append({name: float(value) for name, value in trainer.progress_bar_metrics.items()})
        self.losses.append(float(outputs["loss"] if isinstance(outputs, dict) else outputs))


# -- numbers ------------------------------------------------------------------------------------------------------


def test_spectra_are_logged_every_n_steps_as_they_are():
    watcher = Watcher()
    logged = by_step(run(KFACMonitor(every_n_steps=2, **QUIET), others=[watcher]))
    for name in ("first", "last"):
        assert set(logged[f"kfac/condition/{name}"]) == {2, 4}
        for step, condition in logged[f"kfac/condition/{name}"].items():
            spectrum = watcher.spectra[step][name]
            assert condition == spectrum.condition
            low, high = spectrum.range()
            assert logged[f"kfac/eigenvalue_min/{name}"][step] == low
            assert logged[f"kfac/eigenvalue_max/{name}"][step] == high


def test_zero_is_never():
    logged = by_step(run(KFACMonitor(every_n_steps=0, **QUIET)))
    assert not any("condition/" in name for name in logged)
    assert "kfac/time_share" in logged


def test_by_default_looks_follow_the_inversions_while_they_cost_little(monkeypatch):
    now, looks = [0.0], []
    monitor = KFACMonitor(**QUIET)

    def look(*args: Any, **options: Any) -> dict:
        now[0] += 0.5
        looks.append(monitor._step)
        return {}

    class Time(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            now[0] += 10.0

    monkeypatch.setattr("kfac_dist.callbacks.monitor.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("kfac_dist.preconditioner.spectra", look)
    run(monitor, steps=32, callback=kfac(inverse_every_n_steps=2), others=[Time()])
    # The first look is free. The second makes 1 s, 0.5 % of 200 s: after 21 steps; the third 1.5 s: after 31.
    assert looks == [2, 20, 30]


def test_milliseconds_are_means_over_all_steps_since_the_last_log():
    callback = kfac(inverse_every_n_steps=3)
    logged = by_step(run(KFACMonitor(every_n_steps=0, **QUIET), callback=callback, log_every_n_steps=3))
    assert set(logged["kfac/time_share"]) == {2, 5}
    assert "kfac/ms/inverses" not in logged  # steps 2 and 5 invert nothing
    assert all(value > 0 for value in logged["kfac/ms_per_step/inverses"].values())
    for step, share in logged["kfac/time_share"].items():
        phases = [values[step] for name, values in logged.items() if name.startswith("kfac/ms_per_step/")]
        whole = logged["kfac/ms_per_step/all"][step]
        assert share == pytest.approx((sum(phases) - whole) / whole)
        assert 0 < share < 1
    assert all(value > 1 << 20 for value in logged["kfac/memory_peak"].values())


def test_costs_add_up_to_the_mean_of_the_run():
    both = Costs(1, 10.0, Counter({"a": 2.0})) + Costs(3, 30.0, Counter({"a": 4.0, "b": 4.0}), Counter({"x": 8}))
    assert both.share == 0.25
    assert both.per_step() == {
        "ms_per_step/a": 1.5,
        "ms_per_step/b": 1.0,
        "bytes_per_step/x": 2.0,
        "ms_per_step/all": 10.0,
        "time_share": 0.25,
    }
    assert Costs().share == 0.0


def test_the_progress_bar(monkeypatch):
    watcher = Watcher()
    run(KFACMonitor(**QUIET), others=[watcher], log_every_n_steps=2)
    assert "kfac/loss" not in watcher.bars[0]
    for step in (1, 3, 5):
        bar = watcher.bars[step]
        assert bar["kfac/loss"] == pytest.approx(watcher.losses[step])
        assert bar["kfac/damping"] == pytest.approx(0.01)
        assert 0 < bar["kfac/time_share"] < 1
        assert 0 <= bar["kfac/coarse_gain"] <= 1 + 1e-6
    watcher = Watcher()
    run(KFACMonitor(progress_bar=False, **QUIET), others=[watcher])
    assert not any(name.startswith("kfac/") for bar in watcher.bars for name in bar)


@pytest.mark.parametrize("module", [Classifier, Manual])
def test_accumulated_and_manual_steps_are_counted_once(module):
    watcher, options = Watcher(), {} if module is Manual else {"accumulate_grad_batches": 2}
    monitor = KFACMonitor(every_n_steps=0, **QUIET)
    counted = []

    class Counter(pl.Callback):
        def on_train_end(self, trainer, pl_module) -> None:
            monitor._measures.read()
            counted.append(monitor._measures.total.steps)

    run(monitor, callback=kfac(), model=module(), others=[watcher, Counter()], **options)
    assert counted == [6 if module is Manual else 3]
    assert watcher.bars[-1]["kfac/loss"] == pytest.approx(watcher.losses[-1] * (1 if module is Manual else 2))


def test_what_kfac_does_not_log_comes_from_the_monitor():
    logged = by_step(run(KFACMonitor(**QUIET), callback=kfac(coarse=COARSE, log_every_n_steps=0), log_every_n_steps=2))
    assert set(logged["kfac/coarse/beta/first/0"]) == {1, 3, 5}
    assert logged["kfac/step"] == {1: 1.0, 3: 3.0, 5: 5.0}


def test_nothing_is_read_on_steps_on_which_nothing_is_logged(monkeypatch, tmp_path):
    step, reads = [0], set()

    def spied(real):
        def read(*args: Any, **options: Any) -> Any:
            reads.add(step[0])
            return real(*args, **options)

        return read

    monkeypatch.setattr(PhaseTimer, "milliseconds", spied(PhaseTimer.milliseconds))
    monkeypatch.setattr(Metrics, "__getitem__", spied(Metrics.__getitem__))
    monkeypatch.setattr("kfac_dist.preconditioner.spectra", spied(lambda *args, **options: {}))

    class Count(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            step[0] = batch_idx

    monitor = KFACMonitor(every_n_steps=4, figures_every_n_steps=4, summary=False)
    run(monitor, others=[Count()], log_every_n_steps=3, default_root_dir=tmp_path)
    assert reads == {2, 4, 5}  # logged after 3 and 6 steps, looked at step 4


def test_training_is_bitwise_the_same():
    for options in ({}, {"precision": "bf16-mixed"}):
        plain, watched = Classifier(dropout=0.3), Classifier(dropout=0.3)
        for model, callbacks in ((plain, []), (watched, [KFACMonitor(every_n_steps=1, **QUIET)])):
            torch.manual_seed(0)
            fit(model, [kfac(coarse=COARSE), *callbacks], **options)
        assert_equal(weights(watched), weights(plain))


def test_a_resumed_run_begins_new_curves(tmp_path):
    path, lengths = str(tmp_path / "last.ckpt"), []

    class Length(pl.Callback):
        def on_train_end(self, trainer, pl_module) -> None:
            lengths.append([step for step, _ in trainer.callbacks[1]._history])

    def make() -> list[pl.Callback]:
        return [kfac(coarse=COARSE), KFACMonitor(**QUIET), Length()]

    fit(Classifier(), make(), log_every_n_steps=1).save_checkpoint(path)
    assert "KFACMonitor" not in torch.load(path, weights_only=True)["callbacks"]
    fit(Classifier(), make(), ckpt_path=path, max_epochs=2, log_every_n_steps=1)
    assert lengths == [[0, 1, 2], [3, 4, 5]]


# -- pictures -----------------------------------------------------------------------------------------------------


class TakesFigures(jobs.Keeping):
    """As TensorBoard's logger does."""

    def __init__(self) -> None:
        super().__init__()
        self.figures: list[tuple[str, int]] = []

    @property
    def experiment(self) -> Any:
        return self

    def add_figure(self, tag: str, figure: Any, global_step: int) -> None:
        assert figure.axes
        self.figures.append((tag, global_step))


class TakesImages(jobs.Keeping):
    """As the logger of W&B does: the real one wants an account or a server, so its tests are against this one."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[tuple[str, int]] = []

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        (image,) = images
        assert image.shape[2] == 4
        assert len(numpy.unique(image)) > 10
        self.images.append((key, step))


NAMES = ("spectra", "interaction", "beta")


@pytest.mark.parametrize("kind", [TakesFigures, TakesImages])
def test_loggers_that_take_pictures_get_them(kind, tmp_path):
    logger = kind()
    run(KFACMonitor(figures_every_n_steps=3, summary=False), logger=logger, default_root_dir=tmp_path)
    expected = {(f"kfac/{name}", step) for name in NAMES for step in (3, 5)}  # and at the end
    assert set(logger.figures if kind is TakesFigures else logger.images) == expected
    assert not list(tmp_path.rglob("*.png"))


def test_tensorboard_and_csv_files_hold_the_numbers_and_the_pictures(tmp_path):
    board, table, keeping = TensorBoardLogger(tmp_path, name="board"), CSVLogger(tmp_path, name="table"), jobs.Keeping()
    monitor = KFACMonitor(every_n_steps=2, figures_every_n_steps=3, summary=False)
    run(monitor, logger=[board, table, keeping])
    expected = {name: values for name, values in by_step(keeping).items() if name.startswith("kfac/")}
    assert {"kfac/condition/first", "kfac/coarse/decrease_ratio"} <= set(expected)
    events = EventAccumulator(board.log_dir, size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    scalars = [tag for tag in events.Tags()["scalars"] if tag.startswith("kfac/")]
    assert set(scalars) == set(expected)
    for tag in scalars:
        written = {event.step: event.value for event in events.Scalars(tag)}
        assert written == pytest.approx(expected[tag], rel=1e-6, nan_ok=True), tag  # an event holds float32
    assert set(events.Tags()["images"]) == {f"kfac/{name}" for name in NAMES}
    for name in NAMES:
        assert [image.step for image in events.Images(f"kfac/{name}")] == [3, 5]
        for image in events.Images(f"kfac/{name}"):
            pixels = imread(BytesIO(image.encoded_image_string))
            assert pixels.shape[:2] == (image.height, image.width)
            assert len(numpy.unique(pixels)) > 10
    with open(Path(table.log_dir, "metrics.csv"), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for name, values in expected.items():
        read = {int(row["step"]): float(row[name]) for row in rows if row[name]}
        assert read == pytest.approx(values, rel=1e-6, nan_ok=True), name
    pictures = {path.name for path in Path(board.log_dir, "kfac").iterdir()}  # for the table, which takes none
    assert pictures == {f"{name}-{step:06d}.png" for name in NAMES for step in (3, 5)}


@pytest.mark.parametrize("with_csv", [True, False])
def test_elsewhere_they_become_files(with_csv, tmp_path):
    logger = [TakesFigures(), CSVLogger(tmp_path, name="run")] if with_csv else False
    monitor = KFACMonitor(every_n_steps=0, figures_every_n_steps=3, summary=False)
    run(monitor, logger=logger, default_root_dir=tmp_path)
    folder = tmp_path / "kfac"  # the first logger's folder decides, and that one has none
    assert {file.name for file in folder.iterdir()} == {f"{name}-{step:06d}.png" for name in NAMES for step in (3, 5)}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in folder.iterdir())


def test_the_files_lie_with_the_log(tmp_path):
    run(KFACMonitor(summary=False), logger=CSVLogger(tmp_path, name="run"), callback=kfac())
    assert {path.parent.parent.name for path in Path(tmp_path).rglob("spectra-*.png")} == {"version_0"}
    assert not list(tmp_path.rglob("beta-*.png"))  # without a coarse level there is none


def test_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch):
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.warns(UserWarning, match="could not write its pictures to .*No space left on device"):
        run(KFACMonitor(summary=False), logger=False, default_root_dir=tmp_path)


def test_the_heat_map_has_a_square_for_every_pair_of_vectors():
    matrix = torch.eye(4).double()
    matrix[0, 2] = matrix[2, 0] = 0.5  # the first vectors of both layers
    matrix[1, 2] = matrix[2, 1] = -0.25  # the second of the one and the first of the other
    axes, _ = draw_couplings(CoarseSystem(("one", "two"), 2, matrix), 7).axes
    (image,) = axes.images
    assert image.get_clim() == (-1.0, 1.0)
    expected = [[1, 0.5, 0, 0], [0.5, 1, -0.25, 0], [0, -0.25, 1, 0], [0, 0, 0, 1]]
    assert image.get_array().tolist() == expected
    assert [label.get_text() for label in axes.get_xticklabels()] == ["one", "two", "one", "two"]


def test_the_coefficients_have_a_panel_for_every_vector():
    history = [
        (step, {"one/0": 1.0, "one/1": 0.1, "a/b/0": 2.0, "a/b/1": 90.0 if step == 1 else 0.2}) for step in range(9)
    ]
    first, second = draw_coefficients(history).axes
    assert [axes.get_yscale() for axes in (first, second)] == ["linear", "symlog"]
    one, other = (line for line in second.lines if not line.get_label().startswith("_"))
    assert (one.get_label(), other.get_label()) == ("one", "a/b")
    assert other.get_ydata()[1] == 90.0


# -- the end ------------------------------------------------------------------------------------------------------


def test_the_summary_says_what_was_seen(capsys):
    monitor = KFACMonitor(figures_every_n_steps=0)
    run(monitor, callback=kfac(damping=1e6, damping_method="eigen", coarse=COARSE))
    text = " ".join(capsys.readouterr().out.split())
    assert "of the time of 6 steps" in text
    assert all(phase in text for phase in ("precondition", "inverses", "coarse", "the whole step"))
    assert "coarse/failures 0" in text
    (flat,) = (line for line in monitor.advice if line.startswith("damping dominates"))
    assert flat.startswith("damping dominates the spectrum of layers first (condition 1), last (condition 1)")
    assert all(line in text for line in monitor.advice)


def test_without_a_summary_there_is_advice_all_the_same(capsys):
    monitor = KFACMonitor(**QUIET)
    run(monitor, callback=kfac(kl_clip=1e-12))
    assert capsys.readouterr().out == ""
    assert any(line.startswith("the KL clip scaled the steps by") for line in monitor.advice)


# -- refusals -----------------------------------------------------------------------------------------------------


def test_without_kfac_there_is_nothing_to_watch():
    with pytest.raises(MisconfigurationException, match=r"the Trainer has none: Trainer\(callbacks=\[KFAC\("):
        fit(Classifier(), [KFACMonitor(**QUIET)])


@pytest.mark.parametrize("name", ["every_n_steps", "figures_every_n_steps"])
@pytest.mark.parametrize(
    ("value", "message"), [(-1, "=-1 must be a finite number at least 0"), (2.5, "=2.5 must be an integer")]
)
def test_intervals_are_checked(name, value, message):
    with pytest.raises(MisconfigurationException, match=name + message):
        KFACMonitor(**{name: value})


def test_without_matplotlib_the_message_names_the_extra(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    with pytest.raises(MisconfigurationException, match=r"kfac-dist\[monitor\].*figures_every_n_steps=0"):
        KFACMonitor()
    KFACMonitor(figures_every_n_steps=0)


# -- elsewhere ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_from_the_command_line():
    arguments = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.callbacks+=KFAC"]
    arguments += ["--trainer.callbacks+=KFACMonitor", "--trainer.callbacks.every_n_steps=7"]
    cli = LightningCLI(Classifier, run=False, save_config_callback=None, args=arguments)
    (monitor,) = (c for c in cli.trainer.callbacks if isinstance(c, KFACMonitor))
    assert (monitor.every_n_steps, monitor.figures_every_n_steps, monitor.summary) == (7, None, True)


@pytest.mark.parametrize("distribution", ["comm_opt", "mem_opt"])
def test_rank_0_sees_all_layers_and_nobody_waits(ranks, tmp_path, distribution):
    options = {"distribution": distribution, "coarse": COARSE, "damping_method": "eigen", "sample_ids_key": 2}
    first, second = ranks.run(2, jobs.monitored, str(tmp_path), options, init=False, timeout=120.0)
    assert second == []
    alone = jobs.monitored(0, 1, str(tmp_path / "alone"), options)
    together, single = (
        {(name, step): v for step, line in lines for name, v in line.items()} for lines in (first, alone)
    )
    spectra = {key for key in single if any(f"/{kind}/" in key[0] for kind in ("condition", "eigenvalue_max"))}
    assert len(spectra) == 8  # two kinds, two layers, two steps
    for key in spectra:
        assert together[key] == pytest.approx(single[key], rel=1e-9)
    assert together["kfac/bytes_per_step/factors", 1] > 0
    assert ("kfac/bytes_per_step/directions", 1) in together or distribution == "comm_opt"
    assert len(list((tmp_path / "kfac").glob("*.png"))) == 6
