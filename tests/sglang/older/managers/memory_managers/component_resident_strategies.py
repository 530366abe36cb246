"""Strategies by the names of earlier releases; the layer-wise one has no methods of its own for a use."""


class ComponentResidencyStrategy:
    def prepare_for_use(self, module, use, state):
        pass

    def wait_for_use(self, module, use, state):
        pass

    def finish_use(self, module, use, state):
        pass

    def prefetch_for_use(self, module, use, state):
        self.prepare_for_use(module, use, state)
        return True


class ResidentStrategy(ComponentResidencyStrategy):
    def prepare_for_use(self, module, use, state):
        if use.target_dtype is not None:
            module.to(use.target_dtype)


class VanillaD2HStrategy(ComponentResidencyStrategy):
    def prepare_for_use(self, module, use, state):
        ResidentStrategy.prepare_for_use(self, module, use, state)  # type: ignore[arg-type]

    def wait_for_use(self, module, use, state):
        pass

    def prefetch_for_use(self, module, use, state):
        self.prepare_for_use(module, use, state)
        return True

    def finish_use(self, module, use, state):
        self.wait_for_use(module, use, state)


class SnapshotStrategy(ComponentResidencyStrategy):
    def prepare_for_use(self, module, use, state):
        super().prepare_for_use(module, use, state)

    def wait_for_use(self, module, use, state):
        pass

    def finish_use(self, module, use, state):
        pass


class LayerwiseOffloadStrategy(ComponentResidencyStrategy):
    pass
