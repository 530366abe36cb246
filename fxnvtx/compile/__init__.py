"""Layers inside torch.compile. The only package of fxnvtx that knows Dynamo and Inductor.

Importing it loads neither: `backend.py` and what it needs do, and they are imported at the first compilation.
"""
