"""Classify point sets, with EM as the pooling or as a pyramid; default data: scikit-learn's digits as points.

    em-lightning run point_cloud_classifier --model.pooling=max
    em-lightning run point_cloud_classifier --config mnist --data.root PATH/TO/mnist
    em-lightning run point_cloud_classifier --config pooling --data.root PATH/TO/mnist

The variant mnist is a pyramid of EM abstractions; pooling and shapes_pooling are tables of EM pooling beside maximum,
mean, attention, Set Transformer and memory pooling at equal parameters. Without --data.root MNIST is downloaded.
"""

import sys

import lightning
import torch

from em_lightning.cli import recipe_cli
from em_lightning.modules import PointCloudClassifier


def main(args):
    """Train, score on the test sets, and let the callbacks of the config report."""
    torch.set_num_threads(1)  # more of them make networks as small as these several times slower
    links = ["num_features", "num_classes"]
    cli = recipe_cli(PointCloudClassifier, lightning.LightningDataModule, "point_cloud_classifier", args, links=links)
    cli.datamodule.prepare_data()
    cli.datamodule.setup()
    if cli.trainer.is_global_zero:
        print(f"Data: {cli.datamodule.describe()}")
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config.ckpt_path, weights_only=True)


if __name__ == "__main__":
    main(sys.argv[1:])
