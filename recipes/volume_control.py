"""Train a classifier with a competitive hidden layer and volume control; default data: scikit-learn's digits.

    em-lightning run volume_control
    em-lightning run volume_control --data MNIST --data.root PATH/TO/mnist
    em-lightning run volume_control --config ablation --data.root PATH/TO/mnist

The variants ablation, capacity and optimizers reproduce published tables (Oursland's study of supervised implicit
EM), and width_rule tests a rule for the weights of volume control. Rows run in parallel processes, and the same command
continues an interrupted table. Files are in lightning_logs/volume_control. Without --data.root MNIST is downloaded.
"""

from em_lightning.cli import Recipe
from em_lightning.data import TensorDataModule
from em_lightning.studies import EnergyLayer, LayerReport

recipe = Recipe(
    __file__,
    model=EnergyLayer,  # the base class: the default config selects EMClassifier, which has num_classes
    data=TensorDataModule,
    report=LayerReport,
    data_to_model=["num_features", "num_classes"],
    model_subclasses=True,
    threads=1,  # more threads are slower for networks of this size
)

if __name__ == "__main__":
    recipe.main()
