"""Compile the kernels of segment attention for a GPU that need not be there: CAPABILITY.

Prints the shared memory that each takes, which must be within what every such GPU has.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vico.model.attention.segment import FP32_TILE_ROWS, HALF_TILE_ROWS
from vico.model.ops.segment_backward_kernels import segment_backward_kernel
from vico.model.ops.segment_kernels import segment_forward_kernel, segment_sums_kernel
from vico.model.ops.segment_ops import LAUNCH

KERNELS = (segment_forward_kernel, segment_backward_kernel, segment_sums_kernel)
MAX_SHARED_BYTES = 99 * 1024  # of compute capability 8.6 and 8.9; 8.0 and 9.0 have more
FP32 = "gate2 tanh_gate1 angles log_sums dgate1 dgate2".split()
FP32 += "gate1_sums gate2_sums prompt_sums partial".split()
TABLES = "query_tiles list_rows by_row key_pieces visits shared_tiles".split()


def argument_type(name: str, dtype: str, constants: dict[str, object]) -> str:
    if name in constants:
        return "constexpr"
    if name.startswith("num_"):
        return "i32"
    return "*i64" if name in TABLES else "*fp32" if name in FP32 else f"*{dtype}"


def compile_all(capability: int, dtype: str, tile_rows: int, is_adapted: bool) -> None:
    every_constant: dict[str, object] = {
        "heads": 32,
        "group": 1 if is_adapted else 4,
        "width": 128,
        "length": 10 if is_adapted else 0,
        "TILE": tile_rows,
        "WIDTH": 128,
        "KEYS": 16,
        "PIECE": 16 * tile_rows,
        "HAS_GATE": is_adapted,
        "SAVES": True,
        "AS_FP32": False,
    }
    if not is_adapted:
        every_constant["angles"] = None
    for kernel in KERNELS:
        names = kernel.arg_names
        constants = {name: every_constant[name] for name in names if name in every_constant}
        signature = {name: argument_type(name, dtype, constants) for name in names}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if signature[name].startswith("*")
        }
        source = ASTSource(kernel, signature, constants, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=LAUNCH)
        assert compiled.metadata.shared <= MAX_SHARED_BYTES, compiled.metadata
        print(dtype, is_adapted, kernel.__name__, "shared", compiled.metadata.shared)


if __name__ == "__main__":
    for is_adapted in (True, False):
        compile_all(int(sys.argv[1]), "bf16", HALF_TILE_ROWS, is_adapted)
        compile_all(int(sys.argv[1]), "fp32", FP32_TILE_ROWS, is_adapted)
