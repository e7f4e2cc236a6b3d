"""The files of the toy world's classifiers."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from safetensors.torch import load_file, save_file
from torch import nn


class ShippedClassifier(nn.Module):
    """A small network that is shipped as fp16 safetensors in a folder."""

    weights_file: ClassVar[str]
    """File in the folder."""
    config: ClassVar[str]
    """Configuration that trains it, for messages."""

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Loads the classifier, in fp32 and eval mode.

        Raises:
            FileNotFoundError: if the folder has no weights.
        """
        path = Path(folder) / cls.weights_file
        if not path.is_file():
            raise FileNotFoundError(
                f"no {Path(cls.weights_file).stem.replace('_', ' ')} at {path}; train one with `python train.py --config "
                f"{cls.config}`"
            )
        classifier = cls()
        classifier.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
        return classifier.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the weights as fp16 safetensors."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, Path(folder) / self.weights_file)
