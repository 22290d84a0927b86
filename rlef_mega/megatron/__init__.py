"""The Megatron side: parallel state, models, learner, checkpoints, Hugging Face weights,
publication.

The only place that imports megatron. What acceleration is missing is reported once, by
`parallel.accelerations`; megatron-core's own warnings say it again on every rank at import, and
torch's that of collectives renamed in newer versions at every call, so both are silenced here.
"""

import warnings

warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
# megatron-core reads .grad of parameters that are views of its buffers
warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
