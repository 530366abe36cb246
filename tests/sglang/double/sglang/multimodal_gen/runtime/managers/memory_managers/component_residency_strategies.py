"""Where weights are: without a device, a conversion is all that moves."""


class ResidentStrategy:
    def prepare_for_use(self, module, use, state):
        if use.target_dtype is not None:
            module.to(use.target_dtype)

    def wait_for_use(self, module, use, state):
        pass

    def finish_use(self, module, use, state):
        pass

    def prefetch_for_use(self, module, use, state):
        self.prepare_for_use(module, use, state)
        return True


class ComponentOffloadStrategy(ResidentStrategy):
    def prepare_for_use(self, module, use, state):
        super().prepare_for_use(module, use, state)

    def wait_for_use(self, module, use, state):
        pass

    def prefetch_for_use(self, module, use, state):
        self.prepare_for_use(module, use, state)
        return True

    def finish_use(self, module, use, state):
        self.wait_for_use(module, use, state)


class SnapshotOffloadStrategy(ComponentOffloadStrategy):
    def finish_use(self, module, use, state):
        super().finish_use(module, use, state)


class LayerwiseOffloadStrategy(ResidentStrategy):
    def prepare_for_use(self, module, use, state):
        pass

    def finish_use(self, module, use, state):
        pass
