"""A small stand-in for SGLang-Diffusion: the places that a plugin may hook, and a pipeline that goes through them."""
