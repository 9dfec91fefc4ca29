"""Train a classifier whose hidden layer competes, with volume control; default data: scikit-learn's digits.

    em-lightning run volume_control
    em-lightning run volume_control --data MNIST --data.root PATH/TO/mnist --trainer.max_epochs=50
    em-lightning run volume_control --config ablation --data.root PATH/TO/mnist

The variants ablation, capacity and optimizers are published tables (Oursland, the supervised study): rows times seeds
in processes side by side, where an interrupted table continues when the command is given again. It ends with a table
and pictures in lightning_logs/volume_control. Without --data.root MNIST is downloaded.
"""

import sys

import torch

from em_lightning.cli import recipe_cli
from em_lightning.data import TensorDataModule
from em_lightning.modules import EnergyLayer


def prepare(args):
    """Return model, data and trainer as the arguments ask for them."""
    torch.set_num_threads(1)  # more of them make networks as small as these several times slower
    options = {"subclass_model": True, "links": ["num_features", "num_classes"]}
    return recipe_cli(EnergyLayer, TensorDataModule, "volume_control", args, **options)


def main(args):
    """Train, and let the callbacks of the config report."""
    cli = prepare(args)
    cli.datamodule.prepare_data()
    if cli.trainer.is_global_zero:
        print(f"Data: {cli.datamodule.describe()}")
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config.ckpt_path, weights_only=True)


if __name__ == "__main__":
    main(sys.argv[1:])
