"""The norm of transformers."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class RmsNorm(nn.RMSNorm):
    """`x / rms(x) * weight`, in the precision of x, whatever the weights have travelled in (`training/parallel.py`)."""

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
