"""Learn to cluster over many sets: an EM operator with a learned prior; default data: generated sets.

    em-lightning run amortized_clustering
    em-lightning run amortized_clustering --seeds 0,1,2

The run writes a table (true mixtures, classical EM, the trained operator, published networks) to
lightning_logs/amortized_clustering. The default takes about three minutes on two cores.
"""

import sys

from em_lightning.cli import recipe_cli
from em_lightning.data import MixtureSets
from em_lightning.modules import AmortizedClustering


def main(args):
    """Train the operator; the report callback of the config writes the results."""
    cli = recipe_cli(AmortizedClustering, MixtureSets, "amortized_clustering", args, subclass_data=False)
    if cli.trainer.is_global_zero:
        print(f"Data: {cli.datamodule.describe()}")
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config.ckpt_path, weights_only=True)


if __name__ == "__main__":
    main(sys.argv[1:])
