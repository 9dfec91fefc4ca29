"""Learn an EM operator with a learned prior on many point sets; default data: generated sets.

    em-lightning run amortized_clustering
    em-lightning run amortized_clustering --seeds 0,1,2

The table compares the true mixtures, classical EM, the trained operator and published networks. It is written to
lightning_logs/amortized_clustering. The default takes about three minutes on two cores.
"""

from em_lightning.cli import Recipe
from em_lightning.studies import AmortizedClustering, ClusteringReport, MixtureSets

recipe = Recipe(__file__, model=AmortizedClustering, data=MixtureSets, report=ClusteringReport, data_subclasses=False)

if __name__ == "__main__":
    recipe.main()
