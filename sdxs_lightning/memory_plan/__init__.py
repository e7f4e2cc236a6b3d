"""The memory plan before launch: `python train.py --config ... --plan`.

Exact: parameters, and bytes of weights, gradients and optimizer state. Measured on the meta device, and so an estimate for a
GPU: everything that a training step allocates and frees (`live_bytes.py`), with attention and autocast as on CUDA
(`as_on_cuda.py`). Allowances: CUDA's context and communication buffers.
"""
