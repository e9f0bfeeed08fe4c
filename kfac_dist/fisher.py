"""Which gradients make the Fisher matrix: those at sampled targets (true), or those of the training (empirical).

The true Fisher takes an extra backward pass from the logits to the layer outputs, by ``torch.autograd.grad`` at the
gradient edges: it reaches no parameter, so no gradient accumulates, no DDP bucket is marked, and the training gradients
stay bitwise what they are without it. Its draws come from counters, not from a random stream.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from kfac_dist.capture import Call, Capture
from kfac_dist.compat import full_float32
from kfac_dist.config import KFACConfig
from kfac_dist.draws import default_sample_ids, uniforms
from kfac_dist.layers import Layer, Part
from kfac_dist.likelihoods import Likelihood, likelihoods
from kfac_dist.loss_check import LossCheck
from kfac_dist.sample_order import allowed_leak, alone, samples_first, spread
from kfac_dist.samples import KeptBatch, Samples
from kfac_dist.statistics import MicroBatch, Statistics
from kfac_dist.subset import Subset


def module_named(model: nn.Module, output_module: str | nn.Module | None) -> nn.Module:
    """The module whose output is the logits.

    Raises:
        ValueError: there is none of that name.
    """
    if output_module is None or output_module == "":
        return model
    if isinstance(output_module, nn.Module):
        return output_module
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if output_module not in modules:
        raise ValueError(f"output_module={output_module!r} is no module of the model; there are: {known(model)}")
    return modules[output_module]


def known(model: nn.Module, limit: int = 30) -> str:
    """The names of the model's modules, for a message."""
    names = [name for name, _ in model.named_modules() if name]
    return ", ".join(names[:limit]) + (", .." if len(names) > limit else "")


def check_not_normalised(module: nn.Module, likelihood: Likelihood, name: str) -> None:
    """Raise ValueError where ``module`` ends in a module that returns no logits of ``likelihood``."""
    last = module
    while isinstance(last, nn.Sequential) and len(last):
        last = last[-1]
    if type(last).__name__ in likelihood.not_logits:
        raise _not_logits(type(last).__name__, name)


def _not_logits(operation: str, likelihood: str) -> ValueError:
    return ValueError(
        f"likelihood={likelihood!r} wants logits, but the output comes from {operation}: remove it and train with a "
        "loss on logits (F.cross_entropy, F.binary_cross_entropy_with_logits), or name the module before it as "
        "output_module"
    )


class Fisher:
    """Turns forward passes into statistics.

    Args:
        model: the plain model.
        layers: the layers to watch.
        output_module: name or module of the logits; None: the model.
        config: the method's configuration.
        rank: this process's rank, for the default sample ids.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        output_module: str | nn.Module | None,
        config: KFACConfig,
        rank: int,
    ) -> None:
        self._model = model
        self._config = config
        self._rank = rank
        self._empirical = config.likelihood == "empirical"
        self._likelihood = None if self._empirical else likelihoods[config.likelihood](config.class_dim)
        output = module_named(model, output_module)
        if self._likelihood is not None:
            check_not_normalised(output, self._likelihood, config.likelihood)
        self.statistics = Statistics(layers, config.factor_sides == "both")
        self.capture = Capture(layers, output, self._take_training_gradients if self._empirical else None)
        self._batches: dict[int, MicroBatch] = {}
        self._ids: dict[int, Tensor] = {}
        self._subsets: dict[int, Subset] = {}
        self._step = 0
        self.samples: Samples | None = None
        self._kept: dict[int, KeptBatch | None] = {}
        self._layers = layers
        self._checked_order = False
        self.loss_check = LossCheck(config, rank)

    def begin(self, active: bool, step: int, samples: Samples | None = None) -> None:
        """Forget the last window and record that of ``step``, or not; ``samples`` are those of the coarse level."""
        self._step = step
        self.samples = samples
        self._kept.clear()
        self.capture.clear()
        self.statistics.clear()
        self._batches.clear()
        self._ids.clear()
        self._subsets.clear()
        self.capture.active = active

    def forget(self) -> None:
        """Drop forwards that :meth:`accumulate` has not taken; what is summed already stays."""
        if not self._empirical:  # there a training backward decides what counts
            self.capture.clear()

    def accumulate(self, step: int, sample_ids: Tensor | None, mask: Tensor | None, loss_divisor: float) -> None:
        """Take the forward pass that was just made into the window; see ``KFACPreconditioner.accumulate``."""
        if not self.capture.active:
            return
        self._check_recorded()
        if self._empirical:
            for index in range(max(self._batches, default=-1) + 1, len(self.capture.outputs)):
                self._batches[index] = self._micro_batch(index, self.capture.outputs[index], mask, loss_divisor)
                if sample_ids is not None:
                    self._ids[index] = sample_ids
            return
        try:
            with torch.autocast(self.capture.outputs[0].device.type, enabled=False):
                self._sampled_pass(step, sample_ids, mask, loss_divisor)
        finally:
            self.capture.clear()

    def _check_recorded(self) -> None:
        if self.capture.outputs:
            return
        if self.capture.other_outputs or self.capture.layers_ran:
            returned = ", ".join(sorted(self.capture.other_outputs))
            what = (
                f"returned {returned}, not a tensor of logits that requires a gradient"
                if returned
                else "was not called"
            )
            raise ValueError(f"the output module {what}: set output_module to one of {known(self._model)}")
        raise RuntimeError(
            "accumulate() found no forward pass: call it after the model's forward, with gradients enabled, and before "
            "loss.backward(). If the model was compiled and already called, build K-FAC before its first call, or call "
            "torch._dynamo.reset() after building it"
        )

    def _micro_batch(self, index: int, output: Tensor, mask: Tensor | None, loss_divisor: float) -> MicroBatch:
        size = output.shape[0]
        per_sample: float = output.numel() // max(size, 1)
        if self._likelihood is not None:
            per_sample = self._likelihood.elements(output) / self._likelihood.mean_all_factor
        if mask is None:
            return MicroBatch(index, size, float(size), float(size * per_sample), None, float(loss_divisor))
        mask = mask.to(device=output.device, dtype=torch.bool)
        # Without a likelihood only the batch dimension is known to be one of the targets': classes may come next.
        shape = (size, *mask.shape[1:]) if self._likelihood is None else self._likelihood.target_shape(output)
        if mask.dim() < 1 or tuple(mask.shape) != shape[: mask.dim()]:
            raise ValueError(f"mask of shape {tuple(mask.shape)} does not match targets of shape {shape}: give (B, ..)")
        valid = float(mask.flatten(1).any(1).sum() if mask.dim() > 1 else mask.sum())
        entries = mask.numel() // max(size, 1)
        elements = float(mask.sum()) * (per_sample / max(entries, 1))
        return MicroBatch(index, size, valid, elements, mask, float(loss_divisor))

    # -- the true Fisher ------------------------------------------------------------------------------------------

    def _cotangents(
        self, step: int, forward: int, output: Tensor, ids: Tensor, batch: MicroBatch
    ) -> Iterator[tuple[Tensor, float]]:
        """The gradients of the sampled (or exact) negative log-likelihood at the logits, each with its weight."""
        likelihood, draws = self._likelihood, self._config.fisher_samples
        assert likelihood is not None  # only the true Fisher comes here
        keep = None if batch.mask is None else likelihood.expand_mask(batch.mask, output)
        if draws == "exact":
            for column in likelihood.root_columns(output):
                yield (column if keep is None else column * keep), 1.0
            return
        n = likelihood.uniforms_per_sample(output)
        for draw in range(draws):
            numbers = uniforms(self._config.seed, step, draw + draws * forward, ids, n)
            cotangent = likelihood.sampled_cotangent(output.detach(), numbers)
            yield (cotangent if keep is None else cotangent * keep), 1.0 / draws

    def _sampled_pass(self, step: int, sample_ids: Tensor | None, mask: Tensor | None, loss_divisor: float) -> None:
        for forward, output in enumerate(self.capture.outputs):
            if not output.shape[0]:  # this rank's share of the batch is empty
                continue
            self._check_logits(output)
            batch = self._micro_batch(self.statistics.micro_batches, output, mask, loss_divisor)
            ids = self._sample_ids(sample_ids, batch, output.device)
            calls = [call for call in self.capture.calls if call.forward == forward]
            watch = not self.loss_check.done and batch.index == 0
            if watch:
                self.loss_check.begin()
            for number, (cotangent, weight) in enumerate(self._cotangents(step, forward, output, ids, batch)):
                if watch:
                    self.loss_check.add_sampled(cotangent, weight)
                gradients = iter(self._gradients_at(calls, output, cotangent))
                if number == 0 and self._order_matters(batch):
                    self._check_order(calls, output, cotangent)
                subset = self._subset(batch, ids)
                with full_float32():  # the pass itself ran in the precision of the user's backward
                    for call in calls:
                        at_outputs = [next(gradients) for _ in call.edges]
                        self._take(call, call.parts(at_outputs), batch, subset, weight, first=number == 0)
            self.statistics.add_batch(batch, subset.batch.valid)
            if watch:  # only now: a tensor hook would fire in the pass above as well
                self.loss_check.watch_training(output, batch.per_sample_scale(self._config.loss_reduction))

    def _take(
        self, call: Call, parts: Sequence[Part], batch: MicroBatch, subset: Subset, weight: float, *, first: bool
    ) -> None:
        """One draw of one call into the sums and, within the quota, to the coarse level's samples."""
        for index, part in enumerate(samples_first(part, batch.size) for part in parts):
            if first:
                self._check_shared(part, batch)
            self._add(part, subset, weight, inputs=first)
            self._keep(batch, (call.number, index), part, weight**0.5)

    def _subset(self, batch: MicroBatch, ids: Tensor) -> Subset:
        """The samples that the factors are made of."""
        return Subset.of(batch, self._config.factor_samples, self._config.seed, self._step, ids)

    def _add(self, part: Part, subset: Subset, weight: float, scale: float = 1.0, *, inputs: bool) -> None:
        """One draw of one call into the sums, with its input where that is not in them yet."""
        if subset:
            taken = subset.part(part)
            if inputs:
                self.statistics.add_input(taken.layer, taken.x, taken.layer.rows(taken.g), subset.batch)
            self.statistics.add_output(taken, subset.batch, weight, scale)

    def _check_shared(self, part: Part, batch: MicroBatch) -> None:
        """Where an output serves all samples, only the sum of their gradients is known: sampled targets make do."""
        sampled = not self._empirical and self._config.fisher_samples != "exact"
        if (sampled and self.samples is None) or not part.layer.shared(part.x, batch.size):
            return
        who = "the coarse level" if sampled else "this Fisher"
        raise ValueError(
            f"layer {part.layer.name!r} was called with an input of shape {tuple(part.x.shape)} for {batch.size} "
            f"samples: its output is shared by them, and {who} must tell their gradients apart. Expand the input, as "
            "in positions.expand(batch, -1), or add the layer to skip_layers"
        )

    def _order_matters(self, batch: MicroBatch) -> bool:
        if self._checked_order or batch.size < 2:
            return False
        by_sample = any(layer.joint or layer.approximation == "reduce" for layer in self._layers)
        return by_sample or batch.mask is not None or self.samples is not None

    def _check_order(self, calls: Sequence[Call], output: Tensor, cotangent: Tensor) -> None:
        """Warn, once, of layers in which samples do not lie where they are looked for."""
        self._checked_order = True
        leak = allowed_leak(self._model, len(output))
        if leak is None:
            return
        one, chosen = alone(cotangent, leak == 0.0)
        gradients = iter(self._gradients_at(calls, output, one))
        parts = [part for call in calls for part in call.parts([next(gradients) for _ in call.edges])]
        names = spread([samples_first(part, len(output)) for part in parts], chosen, leak)
        if names and self._rank == 0:
            warnings.warn(
                f"the logits of some of the {len(output)} samples depend on what is taken for other samples in the "
                f"layers {', '.join(names[:10])}{', ..' if len(names) > 10 else ''}: norms, kfac_approx='reduce', "
                "masks and the coarse level mistake one sample for another there. The batch must come first in every "
                "layer (not sequences of as many steps as samples, nor inputs concatenated along the batch) and in the "
                "logits (B, positions, classes), not flattened; a model that couples samples has no gradients of "
                "single samples",
                stacklevel=3,
            )

    def _gradients_at(self, calls: Sequence[Call], output: Tensor, cotangent: Tensor) -> Sequence[Tensor | None]:
        edges = [edge for call in calls for edge in call.edges]
        if not edges:
            return []
        try:
            return torch.autograd.grad(output, edges, cotangent, retain_graph=True, allow_unused=True)
        except torch.OutOfMemoryError:  # a RuntimeError, too, and says enough by itself
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"the sampled-target pass could not go back through the graph ({error}). Call accumulate() after the "
                "forward and BEFORE loss.backward(), and kfac.forget() after a forward that is not trained on; use "
                "activation checkpointing with use_reentrant=False; under torch.compile set "
                "torch._functorch.config.donated_buffer=False before the first call"
            ) from error

    def _check_logits(self, output: Tensor) -> None:
        assert self._likelihood is not None  # only the true Fisher comes here
        self._likelihood.check(output)
        operation = type(output.grad_fn).__name__.removesuffix("Backward0").removesuffix("Backward1")
        if operation in self._likelihood.not_logits:
            raise _not_logits(operation, self._config.likelihood)

    def _sample_ids(self, sample_ids: Tensor | None, batch: MicroBatch, device: torch.device) -> Tensor:
        if sample_ids is None:
            return default_sample_ids(self._rank, batch.index, batch.size, device)
        ids = torch.as_tensor(sample_ids, device=device)
        if tuple(ids.shape) != (batch.size,) or ids.is_floating_point():
            raise ValueError(
                f"sample_ids of shape {tuple(ids.shape)} and type {ids.dtype}: need ({batch.size},) integers, the "
                "global index of every sample"
            )
        return ids

    # -- the empirical Fisher -------------------------------------------------------------------------------------

    def _take_training_gradients(self, call: Call, gradients: Sequence[Tensor | None]) -> None:
        """Runs inside the training backward, once for every call of a layer."""
        if not self.capture.active:
            return
        index = call.forward
        if index not in self._batches:
            if index >= len(self.capture.outputs):
                self._check_recorded()
                return
            self._batches[index] = self._micro_batch(index, self.capture.outputs[index], None, 1.0)
        batch = self._batches[index]
        if not batch.size:  # this rank's share of the batch is empty
            return
        if index not in self._subsets:
            ids = self._sample_ids(self._ids.get(index), batch, self.capture.outputs[index].device)
            self._subsets[index] = self._subset(batch, ids)
            self.statistics.add_batch(batch, self._subsets[index].batch.valid)
        scale = batch.per_sample_scale(self._config.loss_reduction)
        device = self.capture.outputs[index].device.type
        with torch.no_grad(), torch.autocast(device, enabled=False), full_float32():
            for number, part in enumerate(samples_first(part, batch.size) for part in call.parts(gradients)):
                self._check_shared(part, batch)
                self._add(part, self._subsets[index], 1.0, scale, inputs=True)
                self._keep(batch, (call.number, number), part, scale)

    # -- for the coarse level -------------------------------------------------------------------------------------

    def _keep(self, batch: MicroBatch, key: object, part: Part, weight: float) -> None:
        """Keep a layer's input and this draw of its gradient, if the sample quota reaches so far."""
        if self.samples is None:
            return
        if batch.index not in self._kept:
            self._kept[batch.index] = self.samples.begin(batch.size, batch.mask)
        kept = self._kept[batch.index]
        if kept is not None:
            self.samples.keep(kept, batch.size, key, part, weight)
