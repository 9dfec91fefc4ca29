"""Train a sparse encoder without a decoder by free energy and volume control; default data: scikit-learn's digits.

    em-lightning run decoder_free_sae
    em-lightning run decoder_free_sae --data MNIST --data.root PATH/TO/mnist --trainer.max_epochs=100
    em-lightning run decoder_free_sae --config ablation --data.root PATH/TO/mnist

The variants ablation, comparison and optimizers are published tables (Oursland, arXiv 2601.06478). Their rows and seeds
run in parallel processes; repeat the command to resume an interrupted table. Tables and figures are written to
lightning_logs/decoder_free_sae. Without --data.root MNIST is downloaded.
"""

import sys

import torch

from em_lightning.cli import recipe_cli
from em_lightning.data import TensorDataModule
from em_lightning.modules import EnergyLayer


def prepare(args):
    """Build model, data and trainer from the arguments."""
    torch.set_num_threads(1)  # more threads make these small networks several times slower
    options = {"subclass_model": True, "links": ["num_features"]}
    return recipe_cli(EnergyLayer, TensorDataModule, "decoder_free_sae", args, **options)


def main(args):
    """Train; the callbacks of the config write the results."""
    cli = prepare(args)
    cli.datamodule.prepare_data()
    if cli.trainer.is_global_zero:
        print(f"Data: {cli.datamodule.describe()}")
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config.ckpt_path, weights_only=True)


if __name__ == "__main__":
    main(sys.argv[1:])
