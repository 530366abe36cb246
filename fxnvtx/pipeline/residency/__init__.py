"""Where weights are, who needs them when, and ranges for both."""

from .account import ByteAccount
from .manager import ComponentResidencyManager
from .strategies import ComponentOffload, Resident, SnapshotOffload, Strategy
from .uses import ComponentUse, Timeline

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
