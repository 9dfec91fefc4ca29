"""Find, replace and insert modules in any ``nn.Module``, and undo it."""

from em_lightning.surgery.checkpoint import read_checkpoint
from em_lightning.surgery.edit import Change, Surgery, insert_after, replace_modules
from em_lightning.surgery.find import NoMatchError, Site, find_modules
from em_lightning.surgery.plan import apply_plan, read_plan, recorded_plan, restore_surgery

__all__ = [
    "Change",
    "NoMatchError",
    "Site",
    "Surgery",
    "apply_plan",
    "find_modules",
    "insert_after",
    "read_checkpoint",
    "read_plan",
    "recorded_plan",
    "replace_modules",
    "restore_surgery",
]
