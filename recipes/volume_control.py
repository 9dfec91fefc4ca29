"""Train a classifier with a competitive hidden layer and volume control; default data: scikit-learn's digits.

    em-lightning run volume_control
    em-lightning run volume_control --data MNIST --data.root PATH/TO/mnist --trainer.max_epochs=50
    em-lightning run volume_control --config ablation --data.root PATH/TO/mnist

The variants ablation, capacity and optimizers are published tables (Oursland, supervised study). Their rows and seeds
run in parallel processes; repeat the command to resume an interrupted table. Tables and figures are written to
lightning_logs/volume_control. Without --data.root MNIST is downloaded.
"""

import sys

import torch

from em_lightning.cli import recipe_cli
from em_lightning.data import TensorDataModule
from em_lightning.modules import EnergyLayer


def prepare(args):
    """Build model, data and trainer from the arguments."""
    torch.set_num_threads(1)  # more threads make these small networks several times slower
    options = {"subclass_model": True, "links": ["num_features", "num_classes"]}
    return recipe_cli(EnergyLayer, TensorDataModule, "volume_control", args, **options)


def main(args):
    """Train; the callbacks of the config write the results."""
    cli = prepare(args)
    cli.datamodule.prepare_data()
    if cli.trainer.is_global_zero:
        print(f"Data: {cli.datamodule.describe()}")
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config.ckpt_path, weights_only=True)


if __name__ == "__main__":
    main(sys.argv[1:])
