"""Requests through the real SGLang-Diffusion: app.py MODEL REQUESTS [server argument=value ...], one line a request."""

import hashlib
import sys
from typing import Any

import numpy
from sglang.multimodal_gen import DiffGenerator


def main():
    model, requests, *words = sys.argv[1:]
    given: dict[str, Any] = dict(word.split("=", 1) for word in words)
    known = {"true": True, "false": False}
    given = {name: int(value) if value.isdigit() else known.get(value, value) for name, value in given.items()}
    generator = DiffGenerator.from_pretrained(model_path=model, **{"num_gpus": 1, **given})
    asked = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 2.0, "seed": 0}
    try:
        for number in range(int(requests)):
            result = generator.generate(
                sampling_params_kwargs={
                    **asked,
                    "prompt": f"a cat with {number} hats",
                    "save_output": False,
                    "return_frames": True,
                }
            )
            pixels = b"".join(numpy.ascontiguousarray(frame).tobytes() for frame in result.frames)
            print("FRAMES", len(pixels), hashlib.sha256(pixels).hexdigest(), flush=True)
    finally:
        generator.shutdown()


if __name__ == "__main__":
    main()
