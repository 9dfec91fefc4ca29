"""Swap the ReLUs of a plain classifier for competitive activations; default data: scikit-learn's digits.

    em-lightning run swap_activations --trainer.callbacks.activation=gated
    em-lightning run swap_activations --data MNIST --data.root PATH/TO/mnist --model.network=cnn
    em-lightning run swap_activations --config comparison --data.root PATH/TO/mnist

The callback SwapActivations changes the classifier without editing its code. Afterwards the same network with its
ReLUs is trained from the same weights, and the report compares the two; --report.baseline=false omits this. The
variant comparison runs every activation in a network with two hidden layers and in a small convolutional network, with
several seeds, and reports accuracy, calibration, dead units, redundancy and effective rank. Without --data.root MNIST
is downloaded.
"""

from em_lightning.cli import Recipe
from em_lightning.data import TensorDataModule
from em_lightning.studies import ImageClassifier, SwapReport

recipe = Recipe(
    __file__,
    model=ImageClassifier,
    data=TensorDataModule,
    report=SwapReport,
    data_to_model=["shape", "num_classes"],
    threads=1,  # more threads are slower for networks of this size
)

if __name__ == "__main__":
    recipe.main()
