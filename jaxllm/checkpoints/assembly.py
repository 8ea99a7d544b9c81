"""From tensors in a file to parameters on devices, one at a time.

A tensor is copied once: from the mapped file, cast and transposed on the way, into
the memory that its array then owns. The pages of the file are given back as they are
read, so loading needs little more memory than the parameters themselves.

Letters: l layers of a stack.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from jaxllm.checkpoints.files import quote
from jaxllm.checkpoints.matching import StoredArray
from jaxllm.core.errors import CheckpointError
from jaxllm.quantization import Quantizer

__all__ = ["ArraySource", "cast_into"]

# XLA uses memory of this alignment as it is, and copies any other.
_ALIGNMENT = 64
# Copying a transpose by such blocks keeps both sides in the cache: 5 times faster.
_BLOCK = 128
# The most bytes of a file that are mapped in at a time.
_CHUNK = 32 << 20


class ArraySource:
    """One array of a tree: a stored array, or one for each layer of a stack.

    Attributes:
      shape: `[l, ...]` with layers, the stored array's shape without.
    """

    def __init__(
        self,
        stored: Sequence[StoredArray],
        shape: tuple[int, ...],
        dtype: Any,
        *,
        stacked: bool,
        check_finite: bool = False,
    ):
        """Describes the array; reads nothing.

        Args:
          stored: Where it lies; one for each layer of a stack.
          shape: Its shape, with the leading axis of a stack.
          dtype: What it is cast to.
          stacked: Whether it has that axis.
          check_finite: Whether reading refuses NaN and infinity.
        """
        self.shape = shape
        self._stored = stored
        self._dtype = np.dtype(dtype)
        self._stacked = stacked
        self._check_finite = check_finite

    def load(self, sharding: NamedSharding | None = None) -> Array:
        """Reads the array onto devices.

        Args:
          sharding: Where it shall live, the default device when None. Each process
            reads only what its devices hold.

        Returns:
          The array.

        Raises:
          CheckpointError: A value is not finite, and was asked to be.
        """
        if sharding is None:
            whole = self._read((slice(None),) * len(self.shape))
            # An accelerator's transfers would pile up in host memory otherwise.
            return jax.device_put(whole).block_until_ready()
        buffers: dict[Any, np.ndarray] = {}

        def read(index: Any) -> np.ndarray:
            # Replicas of a shard share one buffer; slices hash only from Python 3.12.
            key = tuple((s.start, s.stop) for s in index)
            if key not in buffers:
                buffers[key] = self._read(index)
            return buffers[key]

        array = jax.make_array_from_callback(self.shape, sharding, read)
        return array.block_until_ready()

    def load_quantized(
        self, quantizer: Quantizer, axis: int, shardings: Any = None
    ) -> Any:
        """Reads the array and quantizes it, layer by layer.

        A quantizer sees whole matrices, so each process reads all of the array even
        where its devices hold a part.

        Args:
          quantizer: What makes the leaves.
          axis: The axis that products contract.
          shardings: A leaf of shardings, one for each of its arrays; the default
            device when None.

        Returns:
          The leaf, stacked like the array.

        Raises:
          CheckpointError: A value is not finite, and was asked to be.
        """
        rest = (slice(None),) * (len(self.shape) - 1)
        if not self._stacked or self.shape[0] == 1:
            leaf = self._quantized(quantizer, axis, (slice(None), *rest))
        else:
            leaf = self._stack_quantized(quantizer, axis)
        if shardings is None:
            return jax.tree.map(jax.device_put, leaf)
        return jax.tree.map(_place, leaf, shardings)

    def _quantized(
        self, quantizer: Quantizer, axis: int, index: tuple[slice, ...]
    ) -> Any:
        weight = jax.device_put(self._read(index))
        leaf = quantizer.quantize(weight, None, input_axis=axis)
        # Else the next weight is read while this one is still there.
        return jax.block_until_ready(leaf)

    def _stack_quantized(self, quantizer: Quantizer, axis: int) -> Any:
        layers = self.shape[0]
        rest = (slice(None),) * (len(self.shape) - 1)
        buffers = None
        for i in range(layers):
            leaf = self._quantized(quantizer, axis, (slice(i, i + 1), *rest))
            if buffers is None:
                buffers = jax.tree.map(
                    lambda x: _aligned_empty((layers, *x.shape[1:]), x.dtype), leaf
                )
            jax.tree.map(functools.partial(_set_layer, i), buffers, leaf)
        return buffers

    def _read(self, index: tuple[slice, ...]) -> np.ndarray:
        ranges = [range(n)[s] for n, s in zip(self.shape, index, strict=True)]
        out = _aligned_empty(tuple(map(len, ranges)), self._dtype)
        if not self._stacked:
            self._copy(self._stored[0], index, out)
            return out
        for target, layer in zip(out, ranges[0], strict=True):
            self._copy(self._stored[layer], index[1:], target)
        return out

    def _copy(
        self, stored: StoredArray, index: tuple[slice, ...], out: np.ndarray
    ) -> None:
        """Copies in the stored orientation, by groups of rows."""
        source = stored.view()
        if stored.transpose:
            index, out = index[::-1], out.T
        source = source[index]
        row_bytes = max(1, source[:1].size * source.itemsize)
        rows = max(_BLOCK, _CHUNK // row_bytes // _BLOCK * _BLOCK)
        for start in range(0, len(source), rows):
            target = out[start : start + rows]
            cast_into(target, source[start : start + rows], blocked=stored.transpose)
            stored.tensor.release()
            if self._check_finite and not np.isfinite(target).all():
                raise CheckpointError(
                    f"cannot load weights: {stored.tensor.path.name}: "
                    f"{quote(stored.tensor.name)} has values that are not finite in "
                    f"{self._dtype}, expected numbers. Download it again, or load it "
                    "as float32."
                )


def cast_into(target: np.ndarray, source: np.ndarray, *, blocked: bool) -> None:
    """Copies an array into another of any dtype.

    Args:
      target: What is written.
      source: What is read, of the same shape.
      blocked: Whether both are matrices of which one is stored by columns.
    """
    if not blocked:
        target[...] = source
        return
    for i in range(0, source.shape[0], _BLOCK):
        for j in range(0, source.shape[1], _BLOCK):
            block = (slice(i, i + _BLOCK), slice(j, j + _BLOCK))
            # Cast first: what is written out of order is contiguous when read.
            target[block] = source[block].astype(target.dtype)


def _aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -memory.ctypes.data % _ALIGNMENT
    return memory[offset : offset + size].view(dtype).reshape(shape)


def _set_layer(i: int, buffer: np.ndarray, layer: Array) -> None:
    buffer[i] = np.asarray(layer)[0]


def _place(array: Any, sharding: NamedSharding) -> Array:
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
