"""The config of a run: frozen, validated models, built from recipes and overrides.

Owns every name that a user types in a recipe or on the command line. Owns every check that needs no
data and no process group. Invariant: a `Config` that exists is valid, never changes, and survives
`to_yaml` -> `load` unchanged. The `config.yaml` of a run folder is therefore itself a recipe.

Imports no torch, so that a mistyped option is reported without the time of that import.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from distvgg.errors import nearest
from distvgg.layer_table import POOL, Table, max_pools, read_table


class FrozenModel(BaseModel):
    """Base class of the parts of a config: frozen, rejects unknown names."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


# A command line passes text, which pydantic converts to numbers but not to Literal integers.
_integer = BeforeValidator(lambda v: int(v) if isinstance(v, str) and v.strip().isdigit() else v)
Depth = Annotated[Literal[11, 13, 16, 19], _integer]


def _split(value: Any) -> Any:
    """Splits the text of a list, with or without brackets."""
    if not isinstance(value, str):
        return () if value is None else value
    text = value.strip()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1].strip()
    return text.split(",") if text else ()


_list = BeforeValidator(_split)
Stages = Annotated[
    tuple[Annotated[Literal[1, 2, 3, 4, 5], _integer], ...],
    _list,
    AfterValidator(lambda v: tuple(sorted(set(v)))),
]
# A value that is no list is left to pydantic, which names the field.
Layers = Annotated[
    Table | None,
    BeforeValidator(lambda v: read_table(_split(v)) if isinstance(v, str | list | tuple) else v),
]
# YAML 1.1 reads an unquoted `no` as false.
_no = BeforeValidator(lambda v: "no" if v is False else v)
Precision = Annotated[Literal["auto", "no", "fp16", "bf16"], _no]
# accelerate's trackers without those that have a field of their own. Its list costs an import of
# torch, and depends on what is installed.
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio")


def _tracker(value: str) -> str:
    """Returns the name of a tracker.

    Raises:
        ValueError: accelerate has no such tracker, or it has a field of its own.
    """
    name = value.strip()
    if name in ("wandb", "tensorboard"):
        raise ValueError(f"track.also: {name} has a field of its own: --track.{name} true")
    if name not in TRACKERS:
        near = nearest(name, TRACKERS)
        raise ValueError(
            f"track.also: no tracker {name!r}{near}: give some of {', '.join(TRACKERS)}"
        )
    return name


Trackers = Annotated[
    tuple[Annotated[str, AfterValidator(_tracker)], ...],
    _list,
    AfterValidator(lambda v: tuple(sorted(set(v)))),
]


def _range(value: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a range of two integers, or an empty one.

    Raises:
        ValueError: it has another length, or its end is below its start.
    """
    if value and (len(value) != 2 or value[0] > value[1]):
        raise ValueError(
            f"augment.scale_jitter: {','.join(map(str, value))} (expected two sides, the smaller"
            " first); give such as 256,512"
        )
    return value


SideRange = Annotated[
    tuple[Annotated[int, Field(ge=16, le=4096)], ...], _list, AfterValidator(_range)
]
SplitName = Literal["test", "val", "train"]
# `flip` was a boolean before it had three values.
_SWITCH = {True: "random", False: "no", "true": "random", "false": "no"}
Flip = Annotated[
    Literal["no", "random", "alternating"],
    BeforeValidator(lambda v: _SWITCH.get(v, v) if isinstance(v, bool | str) else v),
]
Patterns = Annotated[
    tuple[Annotated[str, Field(min_length=1), AfterValidator(str.strip)], ...],
    _list,
    AfterValidator(lambda v: tuple(sorted(set(v)))),
]
TestTimeAugmentation = Annotated[Literal["no", "flip"], _no]


MAX_PIXELS = 500_000_000
"""Default of `data.max_pixels`."""


class DataConfig(FrozenModel):
    """The dataset and its train/validation split."""

    name: Literal["cifar100", "cifar10", "synthetic", "custom"] = "cifar100"
    """The dataset. `custom` accepts any classes and image size, from `data.path`."""
    path: str | None = Field(None, min_length=1)
    """A folder of Parquet files, of images in class folders, or of the original CIFAR files; or a
    hub id. None: the dataset's own id on the hub."""
    image_column: str | None = None
    """Column of images in a table. None: the only one by type."""
    label_column: str | None = None
    """Column of labels in a table. None: fine_label, label or labels, else the only one by type."""
    val_size: int = Field(5000, ge=1)
    """Images held out of the train split for validation, stratified by class. Without effect if the
    data has a validation split of its own."""
    train_size: int | None = Field(None, ge=1)
    """Size of a training subset, stratified by class. None: all images except validation."""
    split_seed: int = Field(0, ge=0)
    """Seed of the train/validation split. Separate from `seed`, so that all seeds share one
    split."""
    resize: int | None = Field(None, ge=16)
    """Side, in pixels, of the square images that are stored: shorter side resized, then centre
    cropped. None: all images must have one shape already."""
    on_error: Literal["refuse", "skip"] = "refuse"
    """Images that cannot be decoded: refuse names them, skip leaves them out and counts them."""
    max_pixels: int = Field(MAX_PIXELS, ge=1)
    """Largest image that is decoded, in pixels, as a guard against files made to fill memory."""
    store: Literal["auto", "decoded", "encoded"] = "auto"
    """Form of the images in the cache. decoded: pixels; encoded: the files, decoded again for each
    batch; auto: decoded if the disk has room. Without effect on the result."""
    loader: Literal["auto", "device", "stream"] = "auto"
    """Loader of the images. device: holds all of them in device memory; stream: reads them with
    worker processes; auto: device if they are decoded and fit. Without effect on the result."""
    workers: int | None = Field(None, ge=0, le=256)
    """Worker processes of each rank that read images under loader stream. 0: none, the rank itself
    reads. None: one for each core that is left. Without effect on the result."""

    @model_validator(mode="after")
    def _path_fits_name(self) -> "DataConfig":
        if self.name == "custom" and self.path is None:
            raise ValueError("data.name custom needs data.path, a folder or a hub id")
        if self.name == "synthetic" and self.path is not None:
            raise ValueError("data.name synthetic is made in code: drop data.path, or name its set")
        if self.name == "synthetic" and self.resize is not None:
            raise ValueError("data.resize does nothing to data.name synthetic: drop it")
        return self


class ModelConfig(FrozenModel):
    """VGG (Simonyan and Zisserman, 2015, table 1): depth 11, 13, 16, 19 are columns A, B, D, E."""

    name: Literal["vgg", "alexnet", "lenet5"] = "vgg"
    """The network. alexnet is torchvision's (Krizhevsky, 2014); lenet5 is that of LeCun et al.
    (1998) for colour images. On the command line, it drops what it lacks from the recipe."""
    depth: Depth = 16
    """Weight layers: 11, 13, 16 or 19."""
    layers: Layers = None
    """All convolutions and max-pools, such as 64,M,128,M,256,1x1-256,M, in place of `depth` and
    `max_pools`. A number is a 3x3 convolution with that many channels, 1x1-N a 1x1 convolution with
    N channels, M a max-pool. On the command line, it replaces those of the recipe."""
    batch_norm: bool = True
    """Use BatchNorm after each convolution."""
    width: float = Field(1.0, gt=0, le=16)
    """Factor on the channels of each convolution and on the units of the head."""
    head_width: int = Field(512, ge=1, le=1 << 16)
    """Units of the two hidden linear layers: 512 for CIFAR, 4096 in the paper."""
    max_pools: Stages = (1, 2, 3, 4, 5)
    """Stages of convolutions that end in a max-pool, such as 2,3,4,5, or none. The paper has all
    five. Each stage after an omitted max-pool has twice the grid side: with images of 32 pixels,
    the fifth has 4x4 in place of 2x2. Without the first max-pool, VGG-16 needs 3.6 times the
    operations; without the second 3.1, the third 2.2, the fourth 1.3 times."""
    pool_size: int = Field(1, ge=1, le=16)
    """Side of the grid that enters the head: 1 for CIFAR, 7 in the paper."""
    dropout: float = Field(0.5, ge=0, lt=1)
    """Dropout probability after the two hidden linear layers."""
    image_size: int = Field(32, ge=16, le=1024)
    """Side, in pixels, of the network input. Stored images of another size are resized on the
    device."""
    init: Literal["he", "dirac"] = "he"
    """Initial filters: he (He et al., 2015) or dirac (Zagoruyko and Komodakis, 2017). With dirac, a
    layer copies its input channels to its first output channels; further filters are he."""
    weights: str | None = Field(None, min_length=1)
    """Weights to start from: the folder of a finished run, one of its checkpoints/step_*, a
    safetensors file, or torchvision's, such as torchvision:vgg16_bn. All of features.* must fit;
    linear layers that do not fit start anew. None: all layers start anew."""

    def scaled(self, channels: int) -> int:
        """Returns a number of channels or units times `width`, at least 1."""
        return max(1, round(channels * self.width))

    def _changed(self, names: Sequence[str]) -> list[str]:
        """Returns those of some fields that differ from the default, with values as typed."""
        return [
            f"model.{name} is {_text(value)}"
            for name in names
            if (value := getattr(self, name)) != ModelConfig.model_fields[name].default
        ]

    @model_validator(mode="after")
    def _options_fit_the_network(self) -> "ModelConfig":
        if given := self._changed(LACKS[self.name]):
            raise ValueError(
                f"model.name {self.name} has no such option: {' and '.join(given)}; drop"
                f" {' and '.join(text.split()[0] for text in given)}, or set --model.name vgg"
            )
        if self.name == "alexnet" and self.image_size < ALEXNET_SIZE:
            raise ValueError(
                f"model.name alexnet: model.image_size {self.image_size} (expected at least"
                f" {ALEXNET_SIZE}, so that a pixel reaches its head); set --model.image_size 64"
            )
        return self

    @model_validator(mode="after")
    def _layers_fit(self) -> "ModelConfig":
        if self.layers is None:
            return self
        if given := self._changed(SHORTHANDS):
            raise ValueError(
                f"model.layers gives all layers, and {' and '.join(given)}: drop"
                f" {' and '.join(text.split()[0] for text in given)}, or set --model.layers none"
            )
        pools, most = self.layers.count(POOL), max_pools(self.image_size)
        if pools > most:
            larger = f", or set --model.image_size {2**pools}" if 2**pools <= 1024 else ""
            raise ValueError(
                f"model.layers: {pools} max-pools at model.image_size {self.image_size} (expected"
                f" at most {most}); drop {pools - most} M{larger}"
            )
        return self


# Fields that say in short what `model.layers` says in full.
SHORTHANDS = ("depth", "max_pools")
# Fields without effect on a network of `model.name`.
LACKS: dict[str, tuple[str, ...]] = {
    "vgg": (),
    "alexnet": ("layers", *SHORTHANDS),
    "lenet5": ("layers", *SHORTHANDS, "head_width", "pool_size", "dropout"),
}
ALEXNET_SIZE = 63
"""Smallest `model.image_size` of AlexNet, in pixels."""


# Fields that were removed: the values that equal the current behaviour (None: any value), and the
# reason for the removal.
TRAIN_FIELDS_OF_0_1: dict[str, tuple[tuple[Any, ...] | None, str]] = {
    "gradient_compression": (
        ("no", False),
        "rounded gradients made the curve depend on the number of processes, and gave no speed",
    ),
    "start_size": ((None,), "images that grow during training gained nothing in any recipe"),
    "full_size_at": (None, ""),
}


class TrainConfig(FrozenModel):
    """Length, batch sizes and arithmetic of the training."""

    epochs: float = Field(20.0, gt=0)
    """Passes over the training split; may be a fraction."""
    global_batch_size: int = Field(256, ge=1)
    """Images per optimizer step, over all processes."""
    micro_batch_size: int = Field(64, ge=1)
    """Images per forward and backward, over which BatchNorm normalises. It is part of the
    definition of the result, unlike the number of processes."""
    precision: Precision = "auto"
    """Mixed precision. auto: the launcher's fp16 or bf16, else bf16 where the device is fast at it,
    else fp16 on a GPU, else no."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Label smoothing of the training loss (Szegedy et al., 2016, section 7)."""
    compile: bool = False
    """Compile the model with torch.compile. Slower on a CPU."""
    cpu_threads: int = Field(1, ge=1)
    """Threads of each process on a CPU; without effect on a GPU. Kernels for another number of
    threads add in another order. The number of threads is therefore part of the definition of the
    result, unlike the number of processes. OMP_NUM_THREADS has no effect on it."""
    channels_last: bool = True
    """Use NHWC memory order: with bf16 on a CPU, 2.2 times faster than NCHW."""
    cuda_graphs: bool = True
    """On a GPU, replay each micro-batch as a CUDA graph, with the same bits as without. Without
    effect under detect_anomaly."""
    overfit_batches: int = Field(0, ge=0)
    """Train on the first N global batches over and over, with the same augmentation and dropout
    masks each time. 0: on all of the training split. For debugging: at its end the run says whether
    the loss came near zero, and if not, why."""
    profile_steps: int = Field(0, ge=0)
    """Profile N steps of the main process, from the twelfth after the start on. Writes a trace to
    the run folder and prints the ten most expensive operators. 0: none."""
    detect_anomaly: bool = False
    """Report the operation that produced a NaN in backward. Slow; for debugging."""

    @model_validator(mode="before")
    @classmethod
    def _drop_fields_of_0_1(cls, values: Any) -> Any:
        """Drops removed fields whose value equals the current behaviour."""
        if not isinstance(values, dict):
            return values
        for name, (off, why) in TRAIN_FIELDS_OF_0_1.items():
            if name in values and off is not None and values[name] not in off:
                raise ValueError(f"train.{name} is gone: {why}; drop it")
        return {k: v for k, v in values.items() if k not in TRAIN_FIELDS_OF_0_1}

    @model_validator(mode="after")
    def _batches_divide(self) -> "TrainConfig":
        whole, micro = self.global_batch_size, self.micro_batch_size
        if whole % micro:
            near = [n for n in (whole // micro * micro, (whole // micro + 1) * micro) if n]
            divisor = max(n for n in range(1, min(micro, whole) + 1) if whole % n == 0)
            raise ValueError(
                f"train.global_batch_size {whole} is not a multiple of train.micro_batch_size"
                f" {micro}: make it {' or '.join(map(str, near))}, or make the micro-batch"
                f" {divisor}"
            )
        return self


class OptimConfig(FrozenModel):
    """The optimizer and its learning-rate schedule."""

    name: Literal["sgd", "adamw", "muon"] = "sgd"
    """sgd uses `momentum` and `nesterov`; adamw uses `momentum` as its first beta. muon is Muon for
    all filters and matrices except the last, and sgd for the other parameters."""
    lr: float = Field(0.1, gt=0)
    """Peak learning rate, for the global batch."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD, first beta of AdamW."""
    nesterov: bool = True
    """Use Nesterov momentum (SGD)."""
    weight_decay: float = Field(5e-4, ge=0)
    """Weight decay."""
    decay_norm_and_bias: bool = True
    """Decay BatchNorm weights and all biases as well."""
    clip_norm: float | None = Field(None, gt=0)
    """Maximum global gradient norm. None: no clipping."""
    muon_lr: float = Field(0.04, gt=0)
    """Peak learning rate of Muon, relative to the size of the filters."""
    muon_momentum: float = Field(0.6, ge=0, lt=1)
    """Nesterov momentum of Muon."""
    muon_steps: int = Field(3, ge=1, le=10)
    """Newton-Schulz steps of Muon."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Decay per step of the exponential moving average (EMA) of the weights. The run evaluates the
    EMA weights and keeps them as the result. 0: no EMA."""
    schedule: Literal["cosine", "linear", "constant", "step"] = "cosine"
    """Decay of the learning rate after the warm-up. cosine and linear: to zero; constant: none;
    step: divided by ten after each quarter of the run."""
    warmup_epochs: float = Field(1.0, ge=0)
    """Epochs of linear warm-up from zero."""
    frozen: Patterns = ()
    """Layers or parameters that are not trained, such as features or features.0,features.1; * and ?
    are wildcards. The running statistics of a frozen BatchNorm layer stay as well."""
    trunk_lr_ratio: float = Field(1.0, gt=0, le=1000)
    """Factor on the learning rate of features.*, such as 0.1 to fine-tune."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "OptimConfig":
        if self.name == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("optim.nesterov needs optim.momentum above 0: set it or turn it off")
        return self


class AugmentConfig(FrozenModel):
    """Random augmentation of the training images. Evaluation uses none."""

    crop_padding: int = Field(4, ge=0, le=64)
    """Pixels of reflected border for the random crop. 0: no crop."""
    flip: Flip = "random"
    """Horizontal flip. random: with probability one half. alternating: each image is flipped in
    every second epoch (Jordan, 2024, section 3.6). true means random, false means no."""
    trivial: bool = False
    """Use TrivialAugment, wide (Mueller and Hutter, 2021): one operation of 14 for each image."""
    cutout: int = Field(0, ge=0)
    """Side, in pixels of the stored images, of a square that is filled with the mean colour. Its
    centre lies anywhere in the image (DeVries and Taylor, 2017). 0: no cutout."""
    mixup_alpha: float = Field(0.0, ge=0)
    """MixUp: blend each image and label with another of the micro-batch. The mixing weight is drawn
    from Beta(alpha, alpha) (Zhang et al., 2018). 0: no MixUp."""
    cutmix_alpha: float = Field(0.0, ge=0)
    """CutMix: replace a box of each image by that of another image of the micro-batch. Labels mix
    by the box's share of the area; alpha is as in MixUp (Yun et al., 2019). 0: no CutMix. If both
    are on, each is equally likely."""
    mix_probability: float = Field(1.0, ge=0, le=1)
    """Probability that a micro-batch is mixed, where MixUp or CutMix is on."""
    random_resized_crop: float = Field(0.0, ge=0, le=1)
    """Crop each original image to a random part of at least this share of its area, of an aspect
    ratio from 3/4 to 4/3, resized to `data.resize` (Szegedy et al., 2015): 0.08 is common. Needs
    `data.store encoded`. 0: off."""
    scale_jitter: SideRange = ()
    """Resize the shorter side of each original image to a random number of pixels in this range,
    such as 256,512, and crop a square of `data.resize` at a random place (Simonyan and Zisserman,
    2015, section 3.1). Needs `data.store encoded`. None: off."""


class EvalConfig(FrozenModel):
    """Schedule and settings of evaluation."""

    every_epochs: float = Field(1.0, gt=0)
    """Epochs between two validations. The run also validates at the end."""
    batch_size: int = Field(500, ge=1)
    """Images per evaluation forward; the same for any number of processes."""
    tta: TestTimeAugmentation = "no"
    """Test-time augmentation. flip: also report `tta_top1`, from the mean logits of each image and
    its mirror image, at the cost of a second forward. No other number changes, and no choice
    depends on `tta_top1`."""
    crop_ratio: float = Field(1.0, ge=0.5, le=1)
    """Side of the centre crop as a share of the shorter side, before which the image is resized:
    0.875 resizes to 256 and crops 224, with data.resize 224. Below 1 needs `data.store encoded`."""
    test: bool = True
    """Read the test split once, at the end. Set it to false while you search for recipes, so that
    no choice depends on test."""


class CheckpointConfig(FrozenModel):
    """Schedule and retention of checkpoints. Checkpoints are written in the background."""

    every_steps: int | None = Field(200, ge=1)
    """Optimizer steps between two checkpoints. None: save only after the best validation so far, at
    the end, and on a stop request."""
    keep: int = Field(2, ge=1)
    """Number of newest checkpoints to keep, in addition to the best by validation."""


class TrackConfig(FrozenModel):
    """Destinations of the curves. `metrics.jsonl` in the run folder is always written."""

    wandb: bool = True
    """Use Weights & Biases: online when logged in, else offline in the run folder. The variable
    WANDB_MODE is honoured."""
    wandb_artifact: bool = False
    """Upload model.safetensors and preprocessing.json to W&B as an artifact at the end."""
    tensorboard: bool = False
    """Write TensorBoard event files in the run folder."""
    report: bool = True
    """Write report.html to the run folder at the end, if Bokeh is installed. Takes a second."""
    also: Trackers = ()
    """Other trackers of accelerate, such as trackio,mlflow: of aim, clearml, comet_ml, dvclive,
    mlflow, swanlab, trackio."""
    project: str = Field("distvgg", max_length=128, pattern=r"^[^/\\#?%:]+$")
    """Project on the trackers. W&B rejects slash, backslash, #, ?, % and colon."""
    name: str | None = None
    """Run name on the trackers. None: the run folder's name."""
    every_steps: int = Field(50, ge=1)
    """Optimizer steps between two rows of training metrics."""


class Config(FrozenModel):
    """The config of one run. Equal configs give equal loss curves, on any number of processes."""

    seed: int = Field(0, ge=0)
    """Seed of initial weights, sample order, augmentation and dropout."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    augment: AugmentConfig = AugmentConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    track: TrackConfig = TrackConfig()

    @model_validator(mode="after")
    def _batch_norm_needs_a_batch(self) -> "Config":
        if self.model.batch_norm and self.train.micro_batch_size == 1:
            raise ValueError(
                "batch normalisation needs train.micro_batch_size >= 2 (got 1): raise it, or set"
                " --model.batch_norm false"
            )
        return self

    @model_validator(mode="after")
    def _muon_needs_batch_norm(self) -> "Config":
        if self.optim.name == "muon" and not self.model.batch_norm:
            raise ValueError(
                "optim.name muon needs batch normalisation (model.batch_norm is false): use sgd or"
                " adamw, or set --model.batch_norm true"
            )
        return self

    @model_validator(mode="after")
    def _mixing_needs_a_batch(self) -> "Config":
        mixes = self.augment.mixup_alpha or self.augment.cutmix_alpha
        if mixes and self.train.micro_batch_size == 1:
            raise ValueError(
                "mixup and cutmix need train.micro_batch_size >= 2 (got 1): raise it, or set"
                " augment.mixup_alpha and augment.cutmix_alpha to 0"
            )
        return self

    @model_validator(mode="after")
    def _crops_need_the_originals(self) -> "Config":
        data, augment = self.data, self.augment
        needs = {
            "augment.random_resized_crop": augment.random_resized_crop,
            "augment.scale_jitter": augment.scale_jitter,
            "eval.crop_ratio": self.eval.crop_ratio < 1,
        }
        name = next((name for name, on in needs.items() if on), None)
        if name is None:
            return self
        if data.name == "synthetic":
            raise ValueError(f"{name} does nothing to data.name synthetic: drop it")
        if data.store != "encoded":
            raise ValueError(f"{name} crops the original images: set --data.store encoded")
        if data.resize is None:
            raise ValueError(f"{name} needs the side of its crops: set --data.resize")
        if augment.random_resized_crop and augment.scale_jitter:
            raise ValueError(
                "augment.random_resized_crop and augment.scale_jitter are both on: turn one off"
            )
        if augment.scale_jitter and augment.scale_jitter[0] < data.resize:
            raise ValueError(
                f"augment.scale_jitter {augment.scale_jitter[0]} is less than data.resize"
                f" {data.resize}, the side of the crop: raise it"
            )
        return self

    def to_yaml(self, *, exclude_defaults: bool = False) -> str:
        return yaml.safe_dump(self.model_dump(exclude_defaults=exclude_defaults), sort_keys=False)

    def flat(self) -> dict[str, Any]:
        """Returns every field by its dotted name, as typed on the command line.

        A list is text, since trackers accept no tuple. An empty list is None.
        """
        return dict(_flatten(self.model_dump()))

    def replace(self, **dotted: Any) -> "Config":
        """Returns a copy with some fields changed; a double underscore stands for a dot."""
        values = self.model_dump()
        set_dotted(values, {name.replace("__", "."): value for name, value in dotted.items()})
        return Config.model_validate(values)


def set_dotted(values: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Sets dotted names in nested mappings; validation rejects what must not be a mapping."""
    for dotted, value in overrides.items():
        *sections, field = dotted.split(".")
        inner = values
        for depth, section in enumerate(sections):
            if inner.get(section) is None:
                inner[section] = {}
            inner = inner[section]
            if not isinstance(inner, dict):
                if depth:  # a field, which has no fields: an unknown key
                    values[dotted] = value
                break
        else:
            inner[field] = from_text(value)


def from_text(value: Any) -> Any:
    """Returns None for the text `none` or `null`, and any other value unchanged."""
    return None if isinstance(value, str) and value.lower() in ("none", "null") else value


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, tuple):
            yield f"{prefix}{key}", _text(value) or None
        else:
            yield f"{prefix}{key}", value


def _text(values: Any) -> str:
    """Returns a value as it is typed on the command line."""
    return ",".join(map(str, values)) if isinstance(values, tuple) else str(values)
