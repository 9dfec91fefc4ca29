"""Find, replace and insert modules in any ``nn.Module``, undo the changes, and add EM losses to layers.

Files, each importing only from those before it: select (find modules), hooks (wrap methods), owners (find the
optimizer and copies of a layer), record (store the plan in checkpoints), edit (replace, insert, undo), axes (find the
axis of units), taps (capture tensors), functional (replace calls such as ``F.relu``), refinement (the inserted module),
em (swap activations, insert EM operators), replay (restore a plan), layerwise (EM losses of layers).
"""

from em_lightning.surgery.axes import UnitAxis, unit_axis
from em_lightning.surgery.edit import Calls, Change, Surgery, insert_after, replace_modules, surgery_by
from em_lightning.surgery.em import insert_em_operators, set_temperature, swap_activations
from em_lightning.surgery.hooks import Chain, undo_all, wrap
from em_lightning.surgery.layerwise import LayerwiseLoss
from em_lightning.surgery.record import recorded_plan
from em_lightning.surgery.refinement import SetRefinement
from em_lightning.surgery.replay import apply_plan, read_plan, restore_surgery
from em_lightning.surgery.select import NoMatchError, Site, find_modules, walk
from em_lightning.surgery.taps import Taps

__all__ = [
    "Calls",
    "Chain",
    "Change",
    "LayerwiseLoss",
    "NoMatchError",
    "Site",
    "Surgery",
    "SetRefinement",
    "Taps",
    "UnitAxis",
    "apply_plan",
    "find_modules",
    "insert_after",
    "insert_em_operators",
    "read_plan",
    "recorded_plan",
    "replace_modules",
    "restore_surgery",
    "set_temperature",
    "surgery_by",
    "swap_activations",
    "undo_all",
    "unit_axis",
    "walk",
    "wrap",
]
