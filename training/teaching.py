"""A trained model as the teacher of another one, which starts from its weights."""

from typing import Any, NamedTuple

from checkpoint import LoadedModel
from diffusion.pairs import Pairs

# What a student must share with its teacher, and what messages call it.
SHARED = {
    "model_type": "the model",
    "network": "the network",
    "hidden_dims": "the widths",
    "resolution": "the resolution",
    "channels": "the channels",
    "beta_schedule": "the process",
    "prediction_type": "the prediction",
    "representation": "the representation",
    "class_names": "the classes",
    "latents_fingerprint": "the autoencoder",
}

# What pairs of the teacher say besides.
OF_PAIRS = {"data_fingerprint": "the data"}


class Teaching(NamedTuple):
    """A teacher, frozen and on the device of the run, and what the config of its student says more."""

    teacher: LoadedModel
    said: dict[str, Any]
    pairs: Pairs | None = None  # On which the student is trained in place of the images of the data set.

    def check(self, config: dict[str, Any]) -> None:
        """Raise ValueError, naming the first thing that differs, unless a student of this config can start from it."""
        theirs = {"network": "unet", "representation": "overcomplete"} | self.teacher.config
        for key, words in (SHARED if self.pairs is None else SHARED | OF_PAIRS).items():
            if config.get(key) != theirs.get(key):
                raise ValueError(
                    f"{words} of the teacher {self.teacher.file} is {theirs.get(key)}, not {config.get(key)}; a "
                    "student shares it, so leave the flag out, or pass another teacher."
                )
        self.teacher.require_means("the equation of a teacher")
        if self.pairs is not None and config["flip"]:
            raise ValueError(
                "--flip mirrors images, and what the teacher would make of mirrored noise is another image; leave it "
                "out for stored pairs."
            )
        if self.teacher.learned_variance:
            raise ValueError(
                f"{self.teacher.file} says the variances of its steps, which a student does not learn; pass a teacher "
                "that was trained with --objective denoising."
            )
