"""The Megatron side: parallel state, models, learner, checkpoints, Hugging Face weights,
publication.

The only place that imports megatron. `accelerations` says once what is missing, and hides what
cannot work here before megatron-core tries it. megatron-core's own warnings say it again on every
rank at import, and torch's those of names that newer versions change at every call, so both are
silenced here.
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
