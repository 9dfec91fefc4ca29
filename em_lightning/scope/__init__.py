"""Audit: find the softmax-like operations of a model and check the identity dF/dd = r of implicit EM.

Files: auditing (run a copy, record operations), findings (checks and result), curvature (of the free energy).
"""

from em_lightning.scope.auditing import audit
from em_lightning.scope.curvature import curvature
from em_lightning.scope.findings import Audit, Finding

__all__ = ["Audit", "Finding", "audit", "curvature"]
