"""Train a sparse encoder without a decoder by free energy and volume control; default data: scikit-learn's digits.

    em-lightning run decoder_free_sae
    em-lightning run decoder_free_sae --data MNIST --data.root PATH/TO/mnist
    em-lightning run decoder_free_sae --config ablation --data.root PATH/TO/mnist

The variants ablation, comparison and optimizers reproduce published tables (Oursland, arXiv 2601.06478). Rows run in
parallel processes, and repeating the command resumes an interrupted table. The table and figures are written to
lightning_logs/decoder_free_sae. Without --data.root MNIST is downloaded.
"""

from em_lightning.cli import Recipe
from em_lightning.data import TensorDataModule
from em_lightning.studies import EnergyLayer, LayerReport

recipe = Recipe(
    __file__,
    model=EnergyLayer,
    data=TensorDataModule,
    report=LayerReport,
    data_to_model=["num_features"],
    model_subclasses=True,
    threads=1,  # more threads are slower for networks of this size
)

if __name__ == "__main__":
    recipe.main()
