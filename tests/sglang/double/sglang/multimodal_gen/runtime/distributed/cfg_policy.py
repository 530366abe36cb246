"""The passes of a guided step."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CFGBranch:
    name: str
    is_conditional: bool

    def configure_batch(self, batch):
        batch.is_cfg_negative = not self.is_conditional
