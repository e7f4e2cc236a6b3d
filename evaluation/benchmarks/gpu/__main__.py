"""The command line: `python -m evaluation.benchmarks.gpu --minutes 8 --out gpu.json`."""

from evaluation.benchmarks.gpu.options import GpuOptions
from sdxs_lightning.command_line import run_command

if __name__ == "__main__":
    run_command("python -m evaluation.benchmarks.gpu", GpuOptions, "evaluation.benchmarks.gpu.runner.run")
