"""Classify point sets with EM pooling or a pyramid of EM layers; default data: scikit-learn's digits as points.

    em-lightning run point_cloud_classifier
    em-lightning run point_cloud_classifier --model.pooling=max
    em-lightning run point_cloud_classifier --config mnist --data.root PATH/TO/mnist

The variant mnist uses a pyramid of EM layers. Without --data.root MNIST is downloaded.
"""

from lightning import LightningDataModule

from em_lightning.cli import Recipe
from em_lightning.studies import LayerReport, PointCloudClassifier

recipe = Recipe(
    __file__,
    model=PointCloudClassifier,
    data=LightningDataModule,
    report=LayerReport,
    data_to_model=["num_features", "num_classes"],
    model_subclasses=True,
    threads=1,  # more threads are slower for networks of this size
)

if __name__ == "__main__":
    recipe.main()
