"""Arrays of any type as flat arrays of 32-bit words, and back to the bit.

Narrow elements share a word: of n elements of two bytes word i holds elements i and i + ceil(n / 2), and so on for
one byte. So packing is shifts over whole rows. Neighbours in a word would need an array of rows of two or four
elements, which a TPU pads to 128 of them.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

WIDTHS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}  # bytes of an element


def carrier(dtype: jnp.dtype) -> np.dtype:
    """The type that an array is converted to before its bits are read, mostly its own. Raises ValueError.

    A bool is a byte, and so is an integer of fewer bits than that.
    """
    if not isinstance(dtype, np.dtype) or not jnp.issubdtype(dtype, np.number) and dtype != np.bool_:
        raise ValueError(f"arrays of {dtype} are no numbers: they cannot be packed into words")
    if dtype == np.bool_:
        return np.dtype(np.uint8)
    if jnp.issubdtype(dtype, np.integer):
        bits = jnp.iinfo(dtype).bits
        return dtype if bits >= 8 else np.dtype(np.int8 if jnp.issubdtype(dtype, np.signedinteger) else np.uint8)
    if jnp.issubdtype(dtype, np.complexfloating) or jnp.finfo(dtype).bits < 8:
        raise ValueError(f"arrays of {dtype} cannot be packed into words")
    return dtype


def count(shape: tuple[int, ...], dtype: jnp.dtype) -> int:
    """Words that an array takes."""
    return -(-math.prod(shape) * carrier(dtype).itemsize // 4)


def bits_of(x: jax.Array) -> list[jax.Array]:
    """Of each element its bits as uint32, in the array's shape; of elements of 8 bytes the lower and the upper half."""
    wide = carrier(x.dtype)
    bits = jax.lax.bitcast_convert_type(x.astype(wide), WIDTHS[wide.itemsize])
    if wide.itemsize == 8:
        return [bits.astype(jnp.uint32), (bits >> 32).astype(jnp.uint32)]
    return [bits.astype(jnp.uint32)]


def packed(x: jax.Array) -> jax.Array:
    """uint32 [count]."""
    size = carrier(x.dtype).itemsize
    bits = [half.ravel() for half in bits_of(x)]
    if size >= 4:
        return bits[0] if size == 4 else jnp.concatenate(bits)
    rows = 4 // size
    padded = jnp.pad(bits[0], (0, count(x.shape, x.dtype) * rows - x.size)).reshape(rows, -1)
    word = padded[0]
    for row in range(1, rows):
        word |= padded[row] << (8 * size * row)
    return word


def unpacked(word: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """What `packed` made the words of."""
    wide = carrier(dtype)
    width = WIDTHS[wide.itemsize]
    if wide.itemsize == 8:
        lower, upper = jnp.split(word, 2)
        bits = lower.astype(width) | (upper.astype(width) << 32)
    elif wide.itemsize == 4:
        bits = word
    else:
        shifts = [word >> (8 * wide.itemsize * row) for row in range(4 // wide.itemsize)]
        bits = jnp.concatenate(shifts).astype(width)[: math.prod(shape)]
    return jax.lax.bitcast_convert_type(bits.reshape(shape), wide).astype(dtype)
