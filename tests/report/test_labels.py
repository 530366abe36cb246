"""What a label says."""

from __future__ import annotations

from fxnvtx.report.labels import Folding, fold


def test_a_number_that_tells_classes_apart_is_not_folded() -> None:
    fold_known = Folding(
        {"a.0": "Linear", "a.1": "GELU", "b.0": "Block", "b.1": "Block", "b.0.x.0": "R", "b.1.x.0": "R"}
    )
    assert fold_known("a.0", "module") == "a.0"
    assert fold_known("a.1 in=[[2, 3]]", "module") == "a.1 in=[[2, 3]]"
    assert fold_known("b.1.x.0", "module") == "b.*.x.*"
    assert fold_known("denoising_step_3_t250", "step") == fold("denoising_step_3_t250", "step")
    assert Folding({})("a.0", "module") == "a.*"
