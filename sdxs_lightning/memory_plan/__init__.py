"""The memory plan before launch: `python train.py --config ... --plan`.

Exact: parameters, and bytes of weights, gradients, optimizer state and checkpoints. Estimated, by measuring on the meta
device: all allocations of a training step (`live_bytes.py`), with attention and autocast as on CUDA (`as_on_cuda.py`). Fixed
allowances: CUDA's context and communication buffers.
"""
