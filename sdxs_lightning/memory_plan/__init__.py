"""The memory plan before launch: `python train.py --config ... --plan`.

What is exact: parameters, and bytes of weights, gradients and optimizer state. What is measured on the meta device, and so an
estimate of a GPU's: everything that a training step makes and drops (`live_bytes.py`), under attention and autocast as on
CUDA (`as_on_cuda.py`). What is an allowance: CUDA's context, and communication buffers.
"""
