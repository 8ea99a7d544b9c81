"""Kernels for TPU and GPU behind one function each, with a reference in plain jax.

A folder per op: `reference.py` is the oracle and runs everywhere, `tpu.py` (Mosaic)
and `gpu.py` are the fast forms where there are any, `shapes.py` the shapes that tests
and benchmarks share and what each device cannot run. `dispatch` picks among them.
Nothing but jax is imported here.

A kernel is never partitioned by the compiler: on more than one device it belongs into
`jax.shard_map(..., check_vma=False)`.
"""
