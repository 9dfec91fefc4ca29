"""Find, replace and insert modules in any ``nn.Module``, undo it, and add EM losses to layers.

Files, each importing only from those before it: select (find modules), hooks (wrappers and taps), wrappers (inserted
modules), record (the plan in a checkpoint), edit (replace, insert, undo), functional (calls of ``relu``), replay
(restore a plan), em (activations and operators), layerwise (losses).
"""

from em_lightning.surgery.edit import Calls, Change, Shared, Surgery, insert_after, replace_modules
from em_lightning.surgery.em import insert_em_operators, set_temperature, swap_activations
from em_lightning.surgery.functional import swap_relu_calls
from em_lightning.surgery.hooks import Chain, Taps, undo_all, wrap
from em_lightning.surgery.layerwise import LayerwiseLoss
from em_lightning.surgery.record import recorded_plan
from em_lightning.surgery.replay import apply_plan, read_plan, restore_surgery
from em_lightning.surgery.select import NoMatchError, Site, find_modules, units_of, walk
from em_lightning.surgery.wrappers import added_parameters

__all__ = [
    "Calls",
    "Chain",
    "Change",
    "LayerwiseLoss",
    "NoMatchError",
    "Shared",
    "Site",
    "Surgery",
    "Taps",
    "added_parameters",
    "apply_plan",
    "find_modules",
    "insert_after",
    "insert_em_operators",
    "read_plan",
    "recorded_plan",
    "replace_modules",
    "restore_surgery",
    "set_temperature",
    "swap_activations",
    "swap_relu_calls",
    "undo_all",
    "units_of",
    "walk",
    "wrap",
]
