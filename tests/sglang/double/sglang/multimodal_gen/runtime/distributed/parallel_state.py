"""The ranks."""

WORLD = [0, 1]


def get_world_rank():
    return WORLD[0]


def get_world_size():
    return WORLD[1]
