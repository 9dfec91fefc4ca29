"""Classify point sets with EM pooling or a pyramid of EM layers; default data: scikit-learn's digits as points.

    em-lightning run point_cloud_classifier --model.pooling=max
    em-lightning run point_cloud_classifier --config mnist --data.root PATH/TO/mnist
    em-lightning run point_cloud_classifier --config pooling --data.root PATH/TO/mnist

The variant mnist is a pyramid of EMAbstraction layers. pooling and shapes_pooling compare EM pooling with maximum,
mean, attention, Set Transformer and memory pooling at equal numbers of parameters. Without --data.root MNIST is
downloaded.
"""

import sys

import lightning
import torch

from em_lightning.cli import recipe_cli
from em_lightning.modules import PointCloudClassifier


def main(args):
    """Train and evaluate; the callbacks of the config write the results."""
    torch.set_num_threads(1)  # more threads make these small networks several times slower
    links = ["num_features", "num_classes"]
    cli = recipe_cli(PointCloudClassifier, lightning.LightningDataModule, "point_cloud_classifier", args, links=links)
    cli.datamodule.prepare_data()
    cli.datamodule.setup()
    if cli.trainer.is_global_zero:
        print(f"Data: {cli.datamodule.describe()}")
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config.ckpt_path, weights_only=True)


if __name__ == "__main__":
    main(sys.argv[1:])
