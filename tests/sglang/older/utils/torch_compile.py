"""A release in which the stages call torch.compile themselves."""


class ActiveTargetCompiledCallable:
    pass
