"""Where weights are, who needs them when, and ranges for both."""

from .component_use import ComponentUse, Timeline
from .manager import ComponentResidencyManager
from .memory import ByteAccount
from .strategies import ComponentOffload, Resident, SnapshotOffload, Strategy

__all__ = [
    "ByteAccount",
    "ComponentOffload",
    "ComponentResidencyManager",
    "ComponentUse",
    "Resident",
    "SnapshotOffload",
    "Strategy",
    "Timeline",
]
