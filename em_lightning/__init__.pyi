"""Types of the names that ``__init__.py`` imports on first use."""

from em_lightning._version import __version__ as __version__
from em_lightning.activations import ACTIVATIONS as ACTIVATIONS
from em_lightning.competition import COMPETITIONS as COMPETITIONS
from em_lightning.competition import Posterior as Posterior
from em_lightning.competition import softmin as softmin
from em_lightning.estimator import GaussianMixture as GaussianMixture
from em_lightning.kernels import KERNELS as KERNELS
from em_lightning.kernels import Kernel as Kernel
from em_lightning.losses import LOSSES as LOSSES
from em_lightning.losses import EMLoss as EMLoss
from em_lightning.mixture import Mixture as Mixture
from em_lightning.operators import EMOperator as EMOperator
from em_lightning.scope import audit as audit
from em_lightning.statistics import STATISTICS as STATISTICS
