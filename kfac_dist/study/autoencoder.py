"""The deep autoencoder of Hinton & Salakhutdinov (2006), on which K-FAC has been measured ever since."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from kfac_dist.study.problem import Problem

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


def autoencoder_layers(widths: Sequence[int], activation: str) -> nn.Sequential:
    """Encoder ``widths`` and its mirror image as one chain of Linear layers.

    The code layer, narrowest and in the middle, and the last layer are linear; every other one is followed by the
    activation.
    """
    sizes = [*widths, *reversed(widths[:-1])]
    layers: list[nn.Module] = []
    for i, (d_in, d_out) in enumerate(pairwise(sizes), start=1):
        layers.append(nn.Linear(d_in, d_out))
        if i not in (len(widths) - 1, len(sizes) - 1):
            layers.append(ACTIVATIONS[activation]())
    return nn.Sequential(*layers)


def initialise(net: nn.Module, init: str, activation: str) -> None:
    """Draw the Linear weights anew, with zero biases; "default" leaves PyTorch's own draw."""
    if init == "default":
        return
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            if init == "xavier":
                nn.init.xavier_uniform_(layer.weight)
            else:
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu" if activation == "relu" else "linear")
            nn.init.zeros_(layer.bias)


class Autoencoder(Problem):
    """Reconstructs images whose pixels lie in [0, 1]; ``forward`` returns LOGITS, or pixels with "squared" as loss.

    The loss is summed over the pixels and averaged over the images, so that it is the mean negative log-likelihood of a
    sample and targets drawn from the model give the true Fisher: Bernoulli ones for the binary cross-entropy
    (likelihood "bernoulli"), of unit variance for half the squared error (likelihood "gaussian"). The mean per pixel is
    logged: in nats as ``pixel_loss`` (mean over the training steps of an epoch) and ``val_pixel_loss``, or as
    ``squared_error`` and ``val_squared_error`` (half the squared error).

    Args:
        widths: pixels, hidden widths and code width of the encoder; the decoder mirrors them.
        activation: after every layer but the code layer and the last one.
        init: "default" is PyTorch's (uniform with variance 1 / (3 d_in)), "xavier" Glorot & Bengio 2010 and "kaiming"
            He et al. 2015, both uniform with zero biases. It decides how fast first-order methods start.
        lr: learning rate of the SGD that serves unless the command line or a configuration names an optimizer.
        momentum: of that SGD.
        error: "cross_entropy" or "squared".

    Raises:
        ValueError: fewer than two widths, an unknown activation, an unknown initialisation or an unknown error.
    """

    def __init__(
        self,
        widths: Sequence[int] = (784, 1000, 500, 250, 30),
        activation: Literal["relu", "tanh", "sigmoid"] = "relu",
        init: Literal["default", "xavier", "kaiming"] = "xavier",
        lr: float = 3e-3,
        momentum: float = 0.9,
        error: Literal["cross_entropy", "squared"] = "cross_entropy",
    ) -> None:
        super().__init__(lr, momentum)
        if error not in ("cross_entropy", "squared"):
            raise ValueError(f"error={error!r} is unknown; choose one of cross_entropy, squared")
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"widths={list(widths)} must be two or more positive numbers: pixels, .., code")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
        if init not in ("default", "xavier", "kaiming"):
            raise ValueError(f"init={init!r} is unknown; choose one of default, xavier, kaiming")
        self.error = error
        self.net = autoencoder_layers(tuple(widths), activation)
        initialise(self.net, init, activation)

    def forward(self, images: Tensor) -> Tensor:
        """The reconstruction of ``images`` (B, pixels): logits (B, pixels), or pixels."""
        return self.net(images)

    def predict_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Reconstructed images (B, pixels); in [0, 1] where the forward returns logits."""
        outputs = self(batch[0])
        return outputs if self.error == "squared" else outputs.sigmoid()

    def loss(self, batch: Sequence[Tensor], prefix: str) -> Tensor:
        """Loss of one batch, whose first tensor holds the images."""
        images = batch[0]
        if self.error == "squared":
            name, total = "squared_error", 0.5 * (self(images) - images).square().sum()
        else:
            name, total = "pixel_loss", F.binary_cross_entropy_with_logits(self(images), images, reduction="sum")
        loss = total / len(images)
        self.log_means({name: loss.detach() / images[0].numel()}, prefix, len(images))
        return loss
