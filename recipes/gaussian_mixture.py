"""Fit one Gaussian mixture to one large data set by EM; default data: rows drawn from a known mixture.

    em-lightning run gaussian_mixture
    em-lightning run gaussian_mixture --config memory_mapped
    em-lightning run gaussian_mixture --config stochastic
    em-lightning run gaussian_mixture --config gradient
    em-lightning run gaussian_mixture --data TabularDataModule --data.data MY.npy --model.num_features 16

Every Lightning strategy is supported (--trainer.strategy=ddp --trainer.devices=4). To make a run resumable, give it its
own folder and repeat the same command after an interruption:

    em-lightning run gaussian_mixture --trainer.logger.version=mine --ckpt_path=last

A table of likelihoods, BIC and AIC, figures and TensorBoard logs are written to lightning_logs/gaussian_mixture.
"""

import sys

from em_lightning.cli import recipe_cli
from em_lightning.data import TabularDataModule
from em_lightning.modules import GaussianMixtureModule


def main(args):
    """Fit the mixture; the callbacks of the config write the results."""
    cli = recipe_cli(GaussianMixtureModule, TabularDataModule, "gaussian_mixture", args)
    if cli.trainer.is_global_zero:
        cli.datamodule.prepare_data()
        print(f"Data: {cli.datamodule.describe()}")
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config.ckpt_path, weights_only=True)


if __name__ == "__main__":
    main(sys.argv[1:])
