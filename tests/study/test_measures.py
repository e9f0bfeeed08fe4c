from __future__ import annotations

import copy

import pytest
import torch

from kfac_dist.study import Autoencoder
from kfac_dist.study.dense_fisher import sampled_cotangents
from kfac_dist.study.measures import DirectionErrors
from kfac_dist.study.methods import build_kfac, method
from kfac_dist.study.run import Logged, Run, train
from kfac_dist.study.runner import make_run
from kfac_dist.study.search import trials
from kfac_dist.study.suite import PROBLEMS

KEYS = {"error", "error_free", "error_one_level", "error_free_one_level", "decrease"}
EVERY_STEP = {"factor_every_n_steps": 1, "inverse_every_n_steps": 1, "lr": 0.5, "momentum": 0.0, "damping": 0.05}


@pytest.fixture(scope="module")
def data():
    module = PROBLEMS["tiny"].data()
    module.setup("fit")
    return module


def run_of(name: str, problem: str = "tiny", **budget) -> Run:
    return make_run(problem, name, trials(method(name).space, 1)[0], seed=0, label="test", **{"epochs": 2} | budget)


class Trained:
    """A small autoencoder in float64 under K-FAC, with its measures."""

    def __init__(self, **settings) -> None:
        torch.manual_seed(0)
        self.model = Autoencoder((6, 5, 3)).double()
        self.logged = Logged(self.model)
        twin = copy.deepcopy(self.model)
        self.stepper = build_kfac(self.model, {"likelihood": "bernoulli"}, EVERY_STEP | settings, 4)
        self.kfac = self.stepper.preconditioner
        self.errors = DirectionErrors(twin, self.kfac)
        self.batch = [torch.rand(40, 6, dtype=torch.float64)]

    def step(self) -> dict[str, float]:
        self.errors.before(self.model)
        self.stepper.step(lambda: self.model.loss(self.batch, ""), lambda: self.model.loss(self.batch, ""))
        return self.errors.after(self.batch)

    def errors_of(self, direction: torch.Tensor) -> dict[str, float]:
        """The measures, had the last step handed out ``direction``."""
        sizes = [layer.gradient().numel() for layer in self.kfac.layers]
        for layer, part in zip(self.kfac.layers, direction.split(sizes), strict=True):
            layer.write_gradient(part.view_as(layer.gradient()))
        return self.errors.after(self.batch)


def stacked(parts) -> torch.Tensor:
    """Weight, bias, weight, bias, .. as one vector, each layer's [W | b] row by row."""
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return torch.cat([torch.cat([weight, bias[:, None]], 1).flatten() for weight, bias in pairs])


def weights_of(model: Autoencoder) -> list[torch.nn.Parameter]:
    return [p for layer in model.net if isinstance(layer, torch.nn.Linear) for p in (layer.weight, layer.bias)]


def by_hand(trained: Trained, model: Autoencoder, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """F + lambda I from one backward per sample, and the gradient, at the parameters of ``model``."""
    logits, parameters = model(trained.batch[0]), weights_of(model)
    cotangent = next(sampled_cotangents(trained.kfac.config, step, logits))[0]
    rows = []
    for b in range(40):
        one = cotangent * (torch.arange(40) == b)[:, None]
        rows.append(stacked(torch.autograd.grad(logits, parameters, one, retain_graph=True)))
    U = torch.stack(rows)
    gradient = torch.autograd.grad(model.loss(trained.batch, ""), parameters)
    return U.T @ U / 40 + 0.05 * torch.eye(U.shape[1], dtype=torch.float64), stacked(gradient)


@pytest.mark.parametrize("preconditioning", ["gradients", "samples"])
@pytest.mark.parametrize("kl_clip", [1e-3, 1e6])
def test_errors_of_one_level_are_those_computed_by_hand(preconditioning: str, kl_clip: float) -> None:
    trained = Trained(damping_method="eigen", kl_clip=kl_clip, preconditioning=preconditioning)
    bare = Autoencoder((6, 5, 3)).double()
    Logged(bare)
    for step in range(2):
        bare.load_state_dict(trained.model.state_dict())
        found = trained.step()
        fisher, gradient = by_hand(trained, bare, step)
        exact = torch.linalg.solve(fisher, gradient)
        d, scale = stacked([p.grad for p in weights_of(trained.model)]), trained.kfac.metrics["kl_clip_scale"]
        assert (scale < 1) == (kl_clip < 1)

        def norm(v: torch.Tensor, fisher: torch.Tensor = fisher, exact: torch.Tensor = exact) -> float:
            return float(v @ fisher @ v / (exact @ fisher @ exact)) ** 0.5

        best = d * (d @ gradient) / (d @ fisher @ d)
        assert found.keys() == KEYS
        assert found["error"] == pytest.approx(norm(d - exact), rel=1e-8)
        assert found["error_one_level"] == pytest.approx(norm(d / scale - exact), rel=1e-8)
        assert found["error_free"] == pytest.approx(norm(best - exact), rel=1e-8)
        assert found["error_free_one_level"] == pytest.approx(norm(best - exact), rel=1e-8)
        assert found["decrease"] == pytest.approx(0, abs=1e-9)


def test_the_decrease_is_what_the_coarse_level_says_it_is() -> None:
    # The same samples, damping and batch at both levels: the identity of the error-minimising correction is exact.
    coarse = {"coarse_space": "layer_step", "coarse_damping": None, "coarse_max_samples": None}
    trained = Trained(kl_clip=1e-3, **coarse)
    bare = Autoencoder((6, 5, 3)).double()
    Logged(bare)
    for step in range(3):
        bare.load_state_dict(trained.model.state_dict())
        found, metrics = trained.step(), trained.kfac.metrics
        fisher, gradient = by_hand(trained, bare, step)
        unit = float(gradient @ torch.linalg.solve(fisher, gradient))
        assert metrics["kl_clip_scale"] < 1
        assert found["decrease"] == pytest.approx(metrics["coarse/decrease"] / unit, rel=1e-8)
        assert found["error_free"] < found["error_free_one_level"]


def test_an_exact_direction_has_no_error_and_half_of_it_half() -> None:
    trained = Trained()
    bare = Autoencoder((6, 5, 3)).double()
    Logged(bare)
    bare.load_state_dict(trained.model.state_dict())
    trained.step()
    fisher, gradient = by_hand(trained, bare, 0)
    exact = trained.errors_of(torch.linalg.solve(fisher, gradient))
    half = trained.errors_of(torch.linalg.solve(fisher, gradient) / 2)
    assert (exact["error"], exact["error_free"]) == pytest.approx((0, 0), abs=1e-7)
    assert (half["error"], half["error_free"]) == pytest.approx((0.5, 0), abs=1e-7)
    assert exact["error_one_level"] > 0.01


@pytest.mark.parametrize("name", ["kfac", "kfac_input", "scalar_momentum", "layer_step_momentum", "residual:deflated"])
def test_measuring_does_not_change_the_training(name: str, data) -> None:
    plain, measured = (list(train(run_of(name, measure_every=every), data)) for every in (0, 2))
    assert plain[-1]["end"] == "done"
    assert plain[-1]["weights"] == measured[-1]["weights"]
    assert not any("measures" in line for line in plain)
    lines = [line for line in measured if "measures" in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(line["measures"].keys() == KEYS for line in lines)
    assert all(value == value and abs(value) < 1e6 for line in lines for value in line["measures"].values())


def test_the_coarse_level_reports_beside_the_loss_of_the_batches(data) -> None:
    lines = list(train(run_of("layer_step_momentum", every_n_steps=2), data))
    reports = [line["coarse"] for line in lines if "batch_loss" in line]
    assert len(reports) == 3
    for report in reports:
        assert {"decrease", "decrease_ratio", "condition", "rank", "samples", "share"} <= report.keys()
        assert 0 < report["share"] < 1
        assert report["decrease"] >= 0
    last = lines[-2]
    assert last["layers"] == ["net.0", "net.2", "net.3", "net.5"] * 2
    couplings = torch.tensor(last["interactions"], dtype=torch.float64)
    torch.testing.assert_close(couplings, couplings.T)
    torch.testing.assert_close(couplings.diagonal(), torch.ones(8, dtype=torch.float64))
    assert 0 < (couplings - torch.eye(8)).abs().max() <= 1


def test_without_a_coarse_level_of_layers_there_are_no_interactions(data) -> None:
    for name, reports in (("kfac", False), ("scalar_momentum", True), ("adam", False)):
        lines = list(train(run_of(name), data))
        assert any("coarse" in line for line in lines) == reports
        assert not any("interactions" in line for line in lines)


def test_other_methods_are_not_measured(data) -> None:
    assert not any("measures" in line for line in train(run_of("sgd", measure_every=1), data))


def test_large_problems_are_not_measured() -> None:
    with pytest.raises(
        ValueError,
        match="measure_every=5 on problem='mnist_autoencoder': set it to 0; it needs a problem of at most 20000",
    ):
        run_of("kfac", problem="mnist_autoencoder", measure_every=5)
    with pytest.raises(ValueError, match=r"measure_every=2.5 must be an integer"):
        run_of("kfac", measure_every=2.5)


def test_the_exact_fisher_has_the_gradient_in_its_range(monkeypatch) -> None:
    trained = Trained()
    exact = DirectionErrors(trained.errors._twin, trained.kfac, exact=True)
    trained.step()
    found = exact.after(trained.batch)
    # By hand: every target's gradient of every sample, weighted with its probability.
    twin = exact._twin
    columns = []
    for image in trained.batch[0]:
        logits = twin(image[None])
        for pixel in range(6):
            p = logits[0, pixel].sigmoid()
            parts = torch.autograd.grad(
                logits[0, pixel] * (p * (1 - p)).sqrt().detach(), list(twin.parameters()), retain_graph=True
            )
            columns.append(stacked(parts))
    U = torch.stack(columns, dim=1)
    F_l = U @ U.T / 40 + 0.05 * torch.eye(len(U), dtype=torch.float64)
    twin.zero_grad()
    twin.loss(trained.batch, "").backward()
    gradient = stacked([p.grad for p in twin.parameters()])
    natural = torch.linalg.solve(F_l, gradient)
    direction = torch.cat([layer.gradient().flatten() for layer in trained.kfac.layers])
    difference = direction - natural
    assert found["error"] == pytest.approx(float((difference @ F_l @ difference) / (natural @ F_l @ natural)) ** 0.5)
    outside = gradient - U @ torch.linalg.lstsq(U, gradient[:, None], driver="gelsd").solution[:, 0]
    assert outside.norm() < 1e-8 * gradient.norm()


def test_a_network_with_few_outputs_is_measured_with_the_exact_fisher_too(data) -> None:
    assert PROBLEMS["digits_cnn"].few_outputs
    assert not PROBLEMS["tiny"].few_outputs
    digits = PROBLEMS["digits_cnn"].data()
    digits.setup("fit")
    lines = list(train(run_of("layer_step_momentum", "digits_cnn", epochs=0, seconds=0.2, measure_every=1), digits))
    measured = [line for line in lines if "measures" in line]
    assert measured
    assert all(line["exact"].keys() == KEYS == line["measures"].keys() for line in measured)
    assert all(line["exact"]["error_free"] < line["measures"]["error_free"] for line in measured)
    assert all("exact" not in line for line in train(run_of("kfac", measure_every=3), data))
