"""Trains a stage: train.py --config configs/<base>/<stage>.yaml [--config OVERLAY] [--key value] [--ckpt_path PATH|last|auto].

    python train.py --config configs/quickstart.yaml
    python train.py --config configs/sd15/distill.yaml --config configs/hardware/fsdp2.yaml --data.batch_size 16
    python train.py --config configs/sd15/distill.yaml --ckpt_path auto      # resumes if there is a checkpoint
    python train.py --config configs/sd15/distill.yaml --print_config        # what would run

`model.class_path` and `data.class_path` in the YAML choose what is trained on what; the callbacks save, measure, report and
export. Exit codes: 0 finished, 2 refused configuration or input, 3 diverged, 4 checkpoint not written, 5 a rank was lost,
130 Ctrl-C, 138 SIGUSR1, 143 SIGTERM (the last three after a checkpoint; see sdxs_lightning/core/errors.py).
"""

import sys
from pathlib import Path

# data and evaluation are packages of the clone, not of the installed distribution; configs name their classes.
sys.path.insert(0, str(Path(__file__).parent))

if __name__ == "__main__":
    from sdxs_lightning.train_command import main

    sys.exit(main())
