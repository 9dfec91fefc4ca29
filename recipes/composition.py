"""Train classifiers whose hidden layer is under EM and cross-entropy, at several weights; default data: digits.

    em-lightning run composition
    em-lightning run composition --data MNIST --data.root PATH/TO/mnist --trainer.max_epochs=40
    em-lightning run composition --model.num_layers=3 --model.norm=batch

A run trains all arms and learning rates at once, and reports accuracy, free energy and curvature of each. The study in
benchmarks/composition.py adds linear probes and gradients, and reproduces a published table. Without --data.root MNIST
is downloaded.
"""

from em_lightning.cli import Recipe
from em_lightning.data import TensorDataModule
from em_lightning.studies import LayerReport, StackedNetworks

recipe = Recipe(
    __file__,
    model=StackedNetworks,
    data=TensorDataModule,
    report=LayerReport,
    data_to_model=["num_features", "num_classes"],
    threads=1,  # more threads are slower for networks of this size
)

if __name__ == "__main__":
    recipe.main()
