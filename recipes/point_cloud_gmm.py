"""Learn to fit Gaussian mixtures to point clouds of 32 to 1,024 points; default data: procedural surfaces.

    em-lightning run point_cloud_gmm
    em-lightning run point_cloud_gmm --config pretrained
    em-lightning run point_cloud_gmm --config geometric_shapes --data.root PATH/TO/raw.zip --seeds 0,1,2
    em-lightning run point_cloud_gmm --data PointCloudFolder --data.root MY_FOLDER

The table (tuned classical fits, scikit-learn and the trained operator on held-out points, by cloud size), the figures
and report.html, in which you can rotate the clouds, are written to lightning_logs/point_cloud_gmm. At the end, one
sentence states the result. The default takes about three minutes on two cores.
"""

from em_lightning.cli import Recipe
from em_lightning.data import PointCloudDataModule
from em_lightning.modules import PointCloudGMM
from em_lightning.studies import MixtureReport

recipe = Recipe(__file__, PointCloudGMM, PointCloudDataModule, MixtureReport)

if __name__ == "__main__":
    recipe.main()
