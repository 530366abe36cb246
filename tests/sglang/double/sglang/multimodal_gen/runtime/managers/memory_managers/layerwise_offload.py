"""One layer at a time, by the layers' own hooks."""


class LayerwiseOffloadManager:
    layers_attr_str = "layers"
    _retained_set: frozenset[int] = frozenset()
    _permanent_set: frozenset[int] = frozenset()
    _courier_inflight: frozenset[int] = frozenset()

    def __init__(self, model):
        self.model = model
        self._gpu_layers = set()
        self._weight_metadata = {
            index: {name: {"shape": p.shape, "dtype": p.dtype} for name, p in layer.named_parameters()}
            for index, layer in enumerate(model.layers)
        }
        for index, layer in enumerate(model.layers):
            layer.register_forward_pre_hook(self.before(index))
            layer.register_forward_hook(self.after(index))

    def before(self, index):
        def hook(module, args):
            self.prefetch_layer(index, non_blocking=False)
            self.prefetch_layer((index + 1) % len(self.model.layers))

        return hook

    def after(self, index):
        return lambda module, args, output: self.release_layer(index)

    def prefetch_layer(self, layer_idx, non_blocking=True):
        self._gpu_layers.add(layer_idx)

    def release_layer(self, layer_idx, force=False):
        if force or layer_idx not in self._retained_set:
            self._gpu_layers.discard(layer_idx)
