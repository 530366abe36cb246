"""ComposedPipeline: components and stages under names that do not collide."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from ..errors import ConfigError, PipelineError
from .args import ServerArgs
from .executor import PipelineExecutor, SyncExecutor
from .residency import ComponentResidencyManager
from .residency.place import Place
from .stage import PipelineStage

__all__ = ["KINDS", "ComposedPipeline", "profile_names"]

KINDS = ("dit", "vae", "text_encoder", "image_encoder", "other")


class ComposedPipeline:
    """Stages in order, and the components they use.

    Calling it runs one request; `run_grouped` several at once. `components` may be changed between requests, and in the
    middle of one: the next use takes what is there.
    """

    name = "pipeline"

    def __init__(
        self, args: ServerArgs | None = None, *, executor: PipelineExecutor | None = None, place: Place | None = None
    ) -> None:
        self.args = args or ServerArgs()
        self.components: dict[str, Any] = {}
        self.kinds: dict[str, str] = {}
        self.stages: dict[str, PipelineStage] = {}
        self.executor = executor or SyncExecutor()
        self.residency = ComponentResidencyManager(self.components, self.kinds, self.args, place)

    def add_component(self, name: str, module: nn.Module, kind: str = "other") -> nn.Module:
        """Give the pipeline a component and put its weights where they are to wait; `kind` picks its flag."""
        if kind not in KINDS:
            raise PipelineError(f"kind={kind!r} of component {name!r} has no meaning: use {', '.join(KINDS)}")
        self.components[name], self.kinds[name] = module, kind
        self.residency.refresh_pipeline()
        return module

    def add_stage(self, name: str, stage: PipelineStage) -> PipelineStage:
        """Append a stage under a name of its own. Raises PipelineError where it is there already."""
        if not isinstance(stage, PipelineStage):
            raise PipelineError(f"stage {name!r} must be a PipelineStage, not {type(stage).__name__}")
        if not name or name in self.stages:
            raise PipelineError(f"there is a stage named {name!r} already: every stage needs a name of its own")
        for known, other in self.stages.items():
            if other is stage:
                raise PipelineError(f"stage {name!r} is the same object as {known!r}: make a second one")
        self.stages[name] = stage
        stage.set_registered_stage_name(name)
        names = profile_names({key: type(s).__name__ for key, s in self.stages.items()})
        for key, found in self.stages.items():
            found.set_profile_stage_name(names[key])
        return stage

    def check(self, args: ServerArgs) -> None:
        """Raise where there is nothing to run, or where `args` name a component that is not there, or ask for one to be
        offloaded that no stage declares a use of: nothing would ever bring it in."""
        if not self.stages:
            raise PipelineError(f"pipeline {self.name!r} has no stages: add_stage() some")
        for where, named in (
            ("residency", list(args.residency)),
            ("layerwise_offload_components", args.layerwise_offload_components or []),
        ):
            for component in named:
                if component not in self.components:
                    known = ", ".join(self.components)
                    raise ConfigError(f"{where} names {component!r}, which is none of the components: {known}")
        declared = {use.component for name, s in self.stages.items() for use in s.component_uses(args, name)}
        for component, mode in args.residency.items():
            if mode != "resident" and component not in declared:
                raise ConfigError(
                    f"residency asks for {component}={mode}, but no stage declares a use of it: let component_uses() "
                    "of the stage that needs it return it, or keep it resident"
                )

    def __call__(self, batch: Any, args: ServerArgs | None = None) -> Any:
        """Run one request through all stages; returns the batch."""
        return self.executor.execute(self, batch, args or self.args)

    def run_grouped(self, batches: list[Any], args: ServerArgs | None = None) -> list[Any]:
        """Run several requests together, stage by stage; returns the batches in their order."""
        return self.executor.execute_group(self, batches, args or self.args)


def profile_names(classes: dict[str, str]) -> dict[str, str]:
    """Registered name -> profile name, for registered name -> class name. All different.

    A stage is called by its class where nothing else can be meant by that, else by its registered name.
    """
    count = Counter(classes.values())
    return {
        name: kind if count[kind] == 1 and (kind == name or kind not in classes) else name
        for name, kind in classes.items()
    }
