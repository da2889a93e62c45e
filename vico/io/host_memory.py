"""Keeps a rank's memory on the host from growing with the shapes that it has seen.

Micro-batches have hardly ever the same number of tokens twice, and oneDNN compiles each product of
a CPU for its shape. It keeps the last 1,024. On the toy dataset a rank grew by 390 MB in 100
shuffled epochs of three steps (fp32), and not with --no_shuffle, where shapes repeat. What is freed
lies in small pieces in the heap of the C library, which returns only the end of its heap by itself.

What is left is limited: oneDNN 3.12 keeps a kernel of each kind for ever. With both functions a
rank grows by 190 MB in these epochs, and from epoch 70 to 300 by 5 MB. GPUs do not use oneDNN.
"""

import ctypes
import os

# A micro-batch has about a dozen shapes of products, for all layers the same, forward and backward.
# Each takes up to two places.
NUM_KEPT_PRODUCTS = 64


def limit_kept_products() -> None:
    """Call it before torch computes its first product. It changes no result."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(NUM_KEPT_PRODUCTS))


def return_free_memory() -> None:
    """Give the free pages of the heap back to the kernel, with glibc; takes milliseconds."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
