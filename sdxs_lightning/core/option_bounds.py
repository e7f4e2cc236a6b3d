"""Bounds of what can be meant: beyond them an option is a typing error, which costs hours or the machine's memory."""

LARGEST_SIDE_PX = 16384
"""Of images."""
LARGEST_SCALE = 100
"""Of guidance, LoRAs and ControlNets; published ones are below 30."""
LARGEST_RANK = 1280
"""Of adapters. No layer of an SD or SDXL U-Net has a full rank above 1280, so that more adds weights and nothing else."""
MOST_PROCESSES = 1024
"""Processes and threads of one machine."""
MOST_IMAGES = 10_000_000
"""Of an evaluation; published ones have 50,000 at most."""
MOST_STEPS = 1000
"""Sampling steps; a schedule has as many timesteps."""
MOST_SECONDS = 1_000_000
"""Of waiting for a server: over eleven days."""
LARGEST_BLUR_PX = 1000
"""Standard deviation of a blur, in pixels, beyond which OpenCV fails, or the condition is black."""
