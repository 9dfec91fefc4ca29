"""Swap the ReLUs of a plain classifier for competitive activations; default data: scikit-learn's digits.

    em-lightning run swap_activations --trainer.callbacks.activation=gated
    em-lightning run swap_activations --data MNIST --data.root PATH/TO/mnist --model.network=cnn
    em-lightning run swap_activations --config comparison --data.root PATH/TO/mnist

The callback SwapActivations replaces the ReLUs without changes to the classifier. The variant comparison trains a
network with two hidden layers and a small convolutional network with every activation and several seeds, and reports
accuracy, calibration, dead units, redundancy and effective rank. Without --data.root MNIST is downloaded.
"""

import sys

import torch

from em_lightning.cli import recipe_cli
from em_lightning.data import TensorDataModule
from em_lightning.modules import ImageClassifier


def main(args):
    """Train; the callbacks of the config swap the activations and write the results."""
    torch.set_num_threads(1)  # more threads make these small networks several times slower
    links = ["shape", "num_classes"]
    cli = recipe_cli(ImageClassifier, TensorDataModule, "swap_activations", args, links=links)
    cli.datamodule.prepare_data()
    if cli.trainer.is_global_zero:
        print(f"Data: {cli.datamodule.describe()}")
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config.ckpt_path, weights_only=True)


if __name__ == "__main__":
    main(sys.argv[1:])
