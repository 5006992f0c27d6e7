# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `vllm_lookahead`, installed as `vllm_lookahead.triton_kernels`."""

# With the repository's root on sys.path this folder would pass for OpenAI's
# package of the same name, which vLLM then tries to run MXFP4 models with.
if __name__ == "triton_kernels":
    raise ModuleNotFoundError(
        "this folder is vllm_lookahead.triton_kernels; to import OpenAI's "
        "triton_kernels, take the vllm-lookahead repository off sys.path",
        name=__name__,
    )
