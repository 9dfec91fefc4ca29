"""Learn to fit Gaussian mixtures to point clouds in five EM steps; default data: procedural surfaces.

    em-lightning run point_cloud_gmm
    em-lightning run point_cloud_gmm --config geometric_shapes --data.root PATH/TO/raw.zip --seeds 0,1,2
    em-lightning run point_cloud_gmm --data PointCloudFolder --data.root MY_FOLDER

A table (classical EM, scikit-learn and the trained operator on held-out points), figures and TensorBoard logs are
written to lightning_logs/point_cloud_gmm. The default takes about two minutes on two cores.
"""

import sys

from em_lightning.cli import recipe_cli
from em_lightning.data import PointCloudDataModule
from em_lightning.modules import PointCloudGMM


def main(args):
    """Train the operator; the callbacks of the config write the results."""
    cli = recipe_cli(PointCloudGMM, PointCloudDataModule, "point_cloud_gmm", args)
    cli.datamodule.prepare_data()
    cli.datamodule.setup()
    if cli.trainer.is_global_zero:
        print(f"Data: {cli.datamodule.describe()}")
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config.ckpt_path, weights_only=True)


if __name__ == "__main__":
    main(sys.argv[1:])
