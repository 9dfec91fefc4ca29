"""Learn to fit Gaussian mixtures to point clouds in five EM steps; default data: procedural surfaces.

    em-lightning run point_cloud_gmm
    em-lightning run point_cloud_gmm --config geometric_shapes --data.root PATH/TO/raw.zip --seeds 0,1,2
    em-lightning run point_cloud_gmm --data PointCloudFolder --data.root MY_FOLDER

The table compares classical EM, scikit-learn and the trained operator on held-out points. Table and figures are in
lightning_logs/point_cloud_gmm and in TensorBoard. The default takes about two minutes on two cores.
"""

from em_lightning.cli import Recipe
from em_lightning.data import PointCloudDataModule
from em_lightning.modules import PointCloudGMM
from em_lightning.studies import MixtureReport

recipe = Recipe(__file__, model=PointCloudGMM, data=PointCloudDataModule, report=MixtureReport)

if __name__ == "__main__":
    recipe.main()
