"""Audit: find the softmax-like operations of a model and check the identity dF/dd = r of implicit EM.

Files: findings (result and words), checks (the identity), recorder (what a model computes), auditing (on a copy), and
curvature (of the free energy at a site).
"""

from em_lightning.scope.auditing import audit
from em_lightning.scope.curvature import curvature
from em_lightning.scope.findings import Audit, Finding

__all__ = ["Audit", "Finding", "audit", "curvature"]
