"""A trained network that takes images as they are and answers with class names.

Owns the path from an image of any size and mode to probabilities. Invariant: an RGB image of the
validation split gives the logits of evaluation in float32, up to rounding.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from pydantic import ValidationError
from torch import Tensor

from distvgg.config import Config, ModelConfig
from distvgg.data.images import cover, decode_upright, upright_rgb
from distvgg.data.transforms import normalise, resize
from distvgg.errors import UserError
from distvgg.models.pretrained import check_has_weights, read_weights, with_weights
from distvgg.models.vgg import VGG
from distvgg.recipe import load as load_config
from distvgg.runs.layout import CONFIG_FILE, PREPROCESSING_FILE, WEIGHTS_FILE, run_of
from distvgg.runs.preprocessing import Preprocessing, of_metadata, read_preprocessing

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray
Prediction = list[tuple[str, float]]

# Limits of a batch: the activations of VGG at full width then take about 0.5 GB.
_MAX_IMAGES, _MAX_PIXELS = 128, 16 * 224**2


class UnknownFormatError(UserError):
    """An error for a file that is no image in any format that Pillow reads."""


class Classifier(VGG):
    """A trained VGG with its preprocessing and class names.

    The module itself maps normalised images [n, 3, image_size, image_size] float32 to logits
    [n, classes], as any VGG here. `classify` takes images as they are. Its keys are those of VGG,
    and `to(device)` moves it.

    Attributes:
        config: of the network.
        preprocessing: constants of the run's data.
        class_names: names by output index; the numbers of the outputs, as text, if the run has no
            names.
        flip: average the logits of each image and its mirror image in `probabilities` and
            `classify`, as the run's `eval.tta flip` measures. `forward` never does.
    """

    def __init__(
        self,
        config: ModelConfig,
        preprocessing: Preprocessing,
        num_classes: int,
        *,
        flip: bool = False,
    ) -> None:
        super().__init__(config, num_classes)
        self.config, self.preprocessing, self.flip = config, preprocessing, flip
        self.class_names = preprocessing.class_names or [str(i) for i in range(num_classes)]
        if len(self.class_names) != num_classes:
            raise ValueError(
                f"it has {num_classes} outputs, and its preprocessing {len(self.class_names)} class"
                " names"
            )

    def preprocess(self, image: ImageLike) -> Tensor:
        """Returns the network's input for an image: [3, image_size, image_size] float32.

        The image is turned upright, converted to RGB, resized to cover `stored_size`, cropped at
        the centre, normalised, and resized to `image_size`.

        Args:
            image: path of a file, a PIL image, or [height, width, 3] or [height, width] uint8.

        Raises:
            UserError: the image cannot be read or decoded.
        """
        return self._normalised(self._pixels(image)[None])[0]

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Computes class probabilities of preprocessed images, in evaluation mode.

        Args:
            images: [n, 3, image_size, image_size] float32, on any device.

        Returns:
            [n, classes] float32 on the CPU.
        """
        device, was_training = next(self.parameters()).device, self.training
        images = images.to(device)
        self.eval()
        try:
            logits: Tensor = self(images)
            if self.flip:
                logits = (logits + self(images.flip(3))) / 2
        finally:
            self.train(was_training)
        return logits.float().softmax(1).cpu()

    def classify(self, image: ImageLike, top: int = 5) -> Prediction:
        """Returns the most likely classes of one image, the most likely first.

        Args:
            image: as in `preprocess`.
            top: number of classes to return; all, if there are fewer.

        Returns:
            Class names with probabilities in 0..1.

        Raises:
            UserError: the image cannot be read or decoded.
        """
        (found,) = self.classify_all([image], top)
        if isinstance(found, UserError):
            raise found
        return found

    def classify_all(
        self, images: Iterable[ImageLike], top: int = 5
    ) -> Iterator[Prediction | UserError]:
        """Yields the result of `classify` for each image, in order.

        Reads and computes a batch at a time, in bounded memory. For an image that cannot be read,
        yields the error, so that the others go on.
        """
        size = max(1, min(_MAX_IMAGES, _MAX_PIXELS // self.preprocessing.image_size**2))
        remaining = iter(images)
        with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as threads:
            while batch := list(islice(remaining, size)):
                found = list(threads.map(self._pixels_or_error, batch))
                pixels = [p for p in found if isinstance(p, np.ndarray)]
                rows = iter(self._top(pixels, top))
                yield from (f if isinstance(f, UserError) else next(rows) for f in found)

    def _top(self, pixels: list[np.ndarray], top: int) -> list[Prediction]:
        if not pixels:
            return []
        found = self.probabilities(self._normalised(np.stack(pixels)))
        values, classes = found.topk(min(top, len(self.class_names)), dim=1)
        return [
            [(self.class_names[c], p) for p, c in zip(row, indices, strict=True)]
            for row, indices in zip(values.tolist(), classes.tolist(), strict=True)
        ]

    def _normalised(self, pixels: np.ndarray) -> Tensor:
        """Maps [n, *stored_size, 3] uint8 to [n, 3, image_size, image_size], as evaluation does."""
        mean, std = (
            torch.tensor(x, dtype=torch.float32)
            for x in (self.preprocessing.mean, self.preprocessing.std)
        )
        x = normalise(torch.from_numpy(pixels), mean, std)
        return resize(x, self.preprocessing.image_size)

    def _pixels(self, image: ImageLike) -> np.ndarray:
        """Returns an image as [*stored_size, 3] uint8."""
        used = self.preprocessing
        known = isinstance(image, str | os.PathLike | Image.Image | np.ndarray)
        if not known or (isinstance(image, np.ndarray) and not _is_image(image)):
            shape = list(getattr(image, "shape", []))
            kind = f"{getattr(image, 'dtype', type(image).__name__)} {shape or ''}".strip()
            raise UserError(
                f"an image is a path, a PIL image, or a uint8 array [height, width, 3], not {kind}"
            )
        where = f"{os.fspath(image)} " if isinstance(image, str | os.PathLike) else "the image "
        try:
            if isinstance(image, np.ndarray):
                rgb = upright_rgb(Image.fromarray(image))
            elif isinstance(image, Image.Image):
                rgb = upright_rgb(image)
            else:
                rgb = decode_upright(Path(image).read_bytes())
        except UnidentifiedImageError as error:
            raise UnknownFormatError(f"{where}is not an image") from error
        except OSError as error:
            raise UserError(f"{where}cannot be read: {error.strerror or error}") from error
        except (ValueError, TypeError) as error:
            raise UserError(f"{where}cannot be decoded: {error}") from error
        return np.array(cover(rgb, *used.stored_size, used.crop_ratio))

    def _pixels_or_error(self, image: ImageLike) -> np.ndarray | UserError:
        try:
            return self._pixels(image)
        except UserError as error:
            return error


def _is_image(array: np.ndarray) -> bool:
    channels = array.shape[2:]
    return array.dtype == np.uint8 and array.size > 0 and array.ndim > 1 and channels in ((), (3,))


def load(run: str | os.PathLike[str]) -> Classifier:
    """Loads a trained network that classifies images, on the CPU and in evaluation mode.

    The random state of the caller does not change. Needs no dataset and no network connection.

    Args:
        run: folder of a finished run, one of its `checkpoints/step_*`, any folder that holds a copy
            of `model.safetensors`, or such a file of any name, as `distvgg export` writes it.

    Raises:
        UserError: there is no such folder, it has no weights, or they do not fit its config.
    """
    path = Path(run)
    if os.path.isfile(path):
        file, preprocessing, config = path, None, None
    else:
        check_has_weights(path)
        run_dir = run_of(path)
        file, preprocessing = path / WEIGHTS_FILE, read_preprocessing(run_dir)
        config = _config(run_dir)
    weights, metadata = read_weights(file)
    preprocessing = preprocessing or of_metadata(metadata, file)
    if preprocessing is None:
        raise UserError(
            f"{path} does not say how images become input of its network, as runs of version 0.1:"
            f" it needs {PREPROCESSING_FILE} with mean, std, stored_size and image_size"
        )
    model = config.model if config else _described(preprocessing, file)
    flip = config is not None and config.eval.tta == "flip"
    with torch.random.fork_rng(devices=[]):  # a new network draws its initial weights
        return with_weights(
            lambda outputs: Classifier(model, preprocessing, outputs, flip=flip), weights, file
        )


def _config(run_dir: Path) -> Config | None:
    path = run_dir / CONFIG_FILE
    return load_config(str(path)) if path.exists() else None


def _described(preprocessing: Preprocessing, file: Path) -> ModelConfig:
    """Returns the network that the preprocessing describes.

    Raises:
        UserError: it describes none, or that of another version.
    """
    if preprocessing.model is None:
        raise UserError(
            f"{file} does not describe its network, as weights of earlier versions: put the"
            f" {CONFIG_FILE} of its run into the same folder"
        )
    try:
        return ModelConfig.model_validate(preprocessing.model)
    except ValidationError as error:
        raise UserError(
            f"{file} describes a network that this version does not know: use the version of"
            " distvgg that wrote it"
        ) from error
