"""The only package that imports megatron-core: process groups, networks, learner, checkpoints, and
weights under Hugging Face's names.

Packages that cannot work here are hidden before megatron-core tries them; `accelerations` reports
once what is missing. megatron-core's warnings, which repeat that on every rank, and torch's
deprecation warnings, which appear at every call, are silenced here.
"""

import warnings

from rlef_mega.megatron.network.accelerations import hide_unusable

warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
warnings.filterwarnings(
    "ignore",
    category=FutureWarning,
    module=r"torch\.distributed|megatron\.core|rlef_mega\.megatron\.cpu_shim",
)
# megatron-core reads .grad of parameters that are views of its buffers
warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
hide_unusable()
