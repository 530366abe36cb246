"""A pytest plugin: SGLang's process with its plugins in it, before a test imports anything."""

from sglang.multimodal_gen.runtime.platforms.plugins import apply_plugin_hooks, load_plugins

load_plugins()
apply_plugin_hooks()
