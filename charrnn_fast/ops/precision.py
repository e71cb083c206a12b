"""How kernels may multiply float32 on a GPU: as torch's switches for TF32 say, which have ten bits of mantissa."""

import torch


def rnn_precision(device: torch.device, dtype: torch.dtype) -> str:
    """Of a recurrence's products: "tf32" where torch's switch for RNNs allows it, else "ieee"."""
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if tf32_for_rnns(device) else "ieee"


def tf32_for_rnns(device: torch.device) -> bool:
    """torch's own switch for RNNs. Reading the older one fails where convolutions and RNNs are set apart."""
    if device.type != "cuda":
        return False
    allowed = getattr(torch.backends.cudnn.rnn, "fp32_precision", None)
    return torch.backends.cudnn.allow_tf32 if allowed is None else allowed == "tf32"


def matmul_precision(device: torch.device, dtype: torch.dtype) -> str:
    """Of what stands for a matrix product: "tf32" where torch's switch for these allows it, else exact: "tf32x3"."""
    if dtype != torch.float32 or device.type != "cuda" or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
