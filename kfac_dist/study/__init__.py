"""Problems to train on, as LightningModules and LightningDataModules; import them as ``kfac_dist.study``."""

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
from kfac_dist.study.mnist import MNISTDigits
from kfac_dist.study.record import EpochRecord

__all__ = [
    "Autoencoder",
    "CIFARImages",
    "CharGPT",
    "CharText",
    "Curves",
    "DeepLinear",
    "Digits",
    "DigitsCNN",
    "EpochRecord",
    "Faces",
    "ImageClassifier",
    "MNISTDigits",
    "PlantedLinear",
]
