"""What a frozen product reads, in the form in which it is read: quantized for a weight in fp8.

Where a GPU has Triton, the kernel that computes the tensor quantizes it too (fp8.py).
"""

from torch import Tensor

from vico.model.interfaces import FeedForwardLayer, LinearLayer, NormLayer
from vico.model.ops import autograd, fp8
from vico.model.ops.fp8 import Rows8, Weight8


def norm_input(layer: LinearLayer, x_TD: Tensor, norm: NormLayer) -> tuple[Tensor | Rows8, Tensor]:
    """(the norm of x, for `layer`, 1 / rms(x) in fp32)."""
    is_fp8 = isinstance(layer.weight, Weight8)
    if is_fp8 and fp8.can_run_kernels(x_TD):
        return fp8.rms_norm(x_TD, norm.weight, norm.eps)
    normed_TD, scale_T1 = autograd.rms_norm(x_TD, norm.weight, norm.eps)
    return fp8.quantize_rows(normed_TD) if is_fp8 else normed_TD, scale_T1


def swiglu_input(layer: LinearLayer, a_TF: Tensor, b_TF: Tensor) -> Tensor | Rows8:
    """silu(a) b, for `layer`; where it is not quantized by its kernel, the product does it."""
    if isinstance(layer.weight, Weight8) and fp8.can_run_kernels(a_TF):
        return fp8.swiglu(a_TF, b_TF)
    return autograd.swiglu(a_TF, b_TF)


def swiglu_backward_input(
    mlp: FeedForwardLayer, gradient_TF: Tensor, a_TF: Tensor, b_TF: Tensor
) -> tuple[Tensor | Rows8, Tensor | Rows8]:
    """The gradients of a and b, for the products with w1 and w3."""
    w1, w3 = mlp.w1.weight, mlp.w3.weight
    if isinstance(w1, Weight8) and isinstance(w3, Weight8) and fp8.can_run_kernels(a_TF):
        return fp8.swiglu_backward(gradient_TF, a_TF, b_TF, (w1.scale_N1, w3.scale_N1))
    return autograd.swiglu_backward(gradient_TF, a_TF, b_TF)
