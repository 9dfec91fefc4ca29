"""Fit one Gaussian mixture to one large data set by EM; default data: rows drawn from a known mixture.

    em-lightning run gaussian_mixture
    em-lightning run gaussian_mixture --config memory_mapped
    em-lightning run gaussian_mixture --config stochastic
    em-lightning run gaussian_mixture --data TabularDataModule --data.data MY.npy --model.num_features 16

For four processes add --trainer.strategy=ddp --trainer.devices=4. To make a run resumable, give it its own folder;
repeating the command resumes it:

    em-lightning run gaussian_mixture --trainer.logger.version=mine --ckpt_path=last

The table of likelihoods, BIC and AIC and the figures are written to lightning_logs/gaussian_mixture and to TensorBoard.
"""

from em_lightning.cli import Recipe
from em_lightning.data import TabularDataModule
from em_lightning.modules import GaussianMixtureModule
from em_lightning.studies import SelectionReport

recipe = Recipe(__file__, model=GaussianMixtureModule, data=TabularDataModule, report=SelectionReport)

if __name__ == "__main__":
    recipe.main()
