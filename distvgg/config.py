"""What a run is: frozen, validated config models, from recipes and overrides, kept with the run.

Owns every name that a user types in a recipe or on the command line, and every check that needs no
data and no process group. Invariant: a `Config` that exists is valid, never changes, and survives
`to_yaml` -> `load` unchanged, so that the `config.yaml` of a run folder is itself a recipe.

Nothing here imports torch: a typing error costs a blink, not an import.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from distvgg.errors import UserError


class FrozenModel(BaseModel):
    """A part of a config: frozen, and closed to names that it does not have."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


# A command line hands over text, which pydantic turns into numbers but not into Literal integers.
_integer = BeforeValidator(lambda v: int(v) if isinstance(v, str) and v.strip().isdigit() else v)
Depth = Annotated[Literal[11, 13, 16, 19], _integer]
_list = BeforeValidator(
    lambda v: () if v is None else v.strip("[]").split(",") if isinstance(v, str) else v
)
Stages = Annotated[
    tuple[Annotated[Literal[1, 2, 3, 4, 5], _integer], ...],
    _list,
    AfterValidator(lambda v: tuple(sorted(set(v)))),
]
# YAML 1.1 reads an unquoted `no` as false.
_no = BeforeValidator(lambda v: "no" if v is False else v)
Precision = Annotated[Literal["auto", "no", "fp16", "bf16"], _no]
SplitName = Literal["test", "val", "train"]
# What flip was before it had three values.
_SWITCH = {True: "random", False: "no", "true": "random", "false": "no"}
Flip = Annotated[
    Literal["no", "random", "alternating"],
    BeforeValidator(lambda v: _SWITCH.get(v, v) if isinstance(v, bool | str) else v),
]
TestTimeAugmentation = Annotated[Literal["no", "flip"], _no]


class DataConfig(FrozenModel):
    """Which images, and how they are split."""

    name: Literal["cifar100", "cifar10", "synthetic", "custom"] = "cifar100"
    """The dataset. `custom` takes any classes and image size from `data.path`."""
    path: str | None = None
    """A folder that `datasets.load_dataset` reads (Parquet or an image folder), or a hub id.
    None: the dataset's own id on the hub."""
    val_size: int = Field(5000, ge=1)
    """Images held out of the train split for validation, class by class."""
    train_size: int | None = Field(None, ge=1)
    """Train on a subset of this many images, stratified by class. None: all but validation."""
    split_seed: int = Field(0, ge=0)
    """Seed of the train/validation split, apart from `seed` so that seeds share one split."""
    resize: int | None = Field(None, ge=16)
    """Store every image as a square of this side: shorter side resized, centre cropped. None:
    images must have one shape already."""

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

    depth: Depth = 16
    """Weight layers: 11, 13, 16 or 19."""
    batch_norm: bool = True
    """BatchNorm after each convolution."""
    width: float = Field(1.0, gt=0, le=16)
    """Multiplies the channels of each convolution and the units of the head."""
    head_width: int = Field(512, ge=1)
    """Units of the two hidden linear layers: 512 for CIFAR, 4096 in the paper."""
    max_pools: Stages = (1, 2, 3, 4, 5)
    """Stages of convolutions that end in a max-pool, as in 2,3,4,5, or none: all five in the
    paper. Each stage after one that is left out sees twice the grid: of an image of 32 pixels, the
    fifth 4x4 in place of 2x2. VGG-16's arithmetic then grows 3.6 times without the first, 3.1
    without the second, 2.2 without the third, 1.3 without the fourth."""
    pool_size: int = Field(1, ge=1, le=16)
    """Side of the grid that enters the head: 1 for CIFAR, 7 in the paper."""
    dropout: float = Field(0.5, ge=0, lt=1)
    """Dropout probability after the two hidden linear layers."""
    image_size: int = Field(32, ge=16, le=1024)
    """Side, in pixels, at which images enter the network; resized on the device where the stored
    images differ."""
    init: Literal["he", "dirac"] = "he"
    """Initial filters: he (He et al., 2015), or dirac (Zagoruyko and Komodakis, 2017), which passes
    as many channels on unchanged as come in; filters beyond these are he."""


# The values that mean what is done now (None: all of them), and why the field is gone.
_TRAIN_FIELDS_OF_0_1: dict[str, tuple[tuple[Any, ...] | None, str]] = {
    "gradient_compression": (
        ("no", False),
        "rounded gradients made the curve depend on the number of processes, and gave no speed",
    ),
    "start_size": ((None,), "images that grow during training gained nothing in any recipe"),
    "full_size_at": (None, ""),
}


class TrainConfig(FrozenModel):
    """How long, in what batches, in what arithmetic."""

    epochs: float = Field(20.0, gt=0)
    """Passes over the training split; a fraction is fine."""
    global_batch_size: int = Field(256, ge=1)
    """Images per optimizer step, over all processes."""
    micro_batch_size: int = Field(64, ge=1)
    """Images per forward and backward, and the batch over which BatchNorm normalises: part of the
    result's definition, unlike the number of processes."""
    precision: Precision = "auto"
    """Mixed precision. auto: what the launcher was given, else bf16 where the device is fast at it,
    else fp16 on a GPU, else no."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Label smoothing of the training loss (Szegedy et al., 2016, section 7)."""
    compile: bool = False
    """torch.compile the model. Slower on a CPU."""
    cpu_threads: int = Field(1, ge=1)
    """Threads of each process on a CPU; without effect on a GPU. Kernels for another number of
    threads add in another order: unlike the number of processes, this is part of the result's
    definition, and OMP_NUM_THREADS does not reach it."""
    channels_last: bool = True
    """NHWC memory order: 2.2 times faster than NCHW together with bf16 on a CPU."""
    detect_anomaly: bool = False
    """Point at the operation that made a NaN in backward. Slow: for debugging."""

    @model_validator(mode="before")
    @classmethod
    def _drop_fields_of_0_1(cls, values: Any) -> Any:
        """Accepts a field that is gone, where its value means what is done now."""
        if not isinstance(values, dict):
            return values
        for name, (off, why) in _TRAIN_FIELDS_OF_0_1.items():
            if name in values and off is not None and values[name] not in off:
                raise ValueError(f"train.{name} is gone: {why}; drop it")
        return {k: v for k, v in values.items() if k not in _TRAIN_FIELDS_OF_0_1}

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
    """The optimizer and its learning rate over the run."""

    name: Literal["sgd", "adamw", "muon"] = "sgd"
    """sgd takes `momentum` and `nesterov`; adamw takes its first beta from `momentum`; muon is Muon
    for all filters and matrices but the last, and sgd for the rest."""
    lr: float = Field(0.1, gt=0)
    """Peak learning rate, for the global batch."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD, first beta of AdamW."""
    nesterov: bool = True
    """Nesterov's momentum (SGD)."""
    weight_decay: float = Field(5e-4, ge=0)
    """Weight decay."""
    decay_norm_and_bias: bool = True
    """Decay BatchNorm weights and all biases as well."""
    clip_norm: float | None = Field(None, gt=0)
    """Clip the global gradient norm to this. None: no clipping."""
    muon_lr: float = Field(0.04, gt=0)
    """Peak learning rate of Muon, relative to the size of the filters."""
    muon_momentum: float = Field(0.6, ge=0, lt=1)
    """Momentum of Muon, Nesterov's."""
    muon_steps: int = Field(3, ge=1, le=10)
    """Newton-Schulz steps of Muon."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Decay in a step of a moving average of the weights, which is then what is evaluated and kept
    as the result. 0: no average."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up: to zero, or not at all."""
    warmup_epochs: float = Field(1.0, ge=0)
    """Epochs of linear warm-up from zero."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "OptimConfig":
        if self.name == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("optim.nesterov needs optim.momentum above 0: set it or turn it off")
        return self


class AugmentConfig(FrozenModel):
    """Random views of the training images; none at evaluation."""

    crop_padding: int = Field(4, ge=0, le=64)
    """DeviceImages of reflected border for the random crop. 0: no crop."""
    flip: Flip = "random"
    """Mirror left and right. random: with probability one half; alternating: each image one way in
    one epoch and the other way in the next (Jordan, 2024, section 3.6). Also true or false, for
    random or no."""
    trivial: bool = False
    """TrivialAugment, wide (Mueller and Hutter, 2021): one operation of 14 an image."""
    cutout: int = Field(0, ge=0)
    """Side of a square, in pixels of the stored images, that is filled with the mean colour; its
    centre lies anywhere in the image (DeVries and Taylor, 2017). 0: none."""
    mixup_alpha: float = Field(0.0, ge=0)
    """Blend each image and label with another of the micro-batch, with a weight from
    Beta(alpha, alpha) (Zhang et al., 2018). 0: no mixup."""
    cutmix_alpha: float = Field(0.0, ge=0)
    """Replace a box of each image by another's of the micro-batch, and the labels by its share;
    alpha as in mixup (Yun et al., 2019). 0: no cutmix; with both, either as often."""
    mix_probability: float = Field(1.0, ge=0, le=1)
    """The probability that a micro-batch is mixed at all, where mixup or cutmix is on."""


class EvalConfig(FrozenModel):
    """When and how to measure."""

    every_epochs: float = Field(1.0, gt=0)
    """Validate each time this many epochs have passed, and at the end."""
    batch_size: int = Field(500, ge=1)
    """Images per evaluation forward; the same for any number of processes."""
    tta: TestTimeAugmentation = "no"
    """Test-time augmentation. flip: also report `tta_top1`, by the mean logits of each image and
    its mirror, at the cost of a second forward. No other number changes, and nothing is chosen by
    it."""
    test: bool = True
    """Read the test split once, at the end. Off while recipes are searched for, so that nobody can
    choose by it."""


class CheckpointConfig(FrozenModel):
    """When to save what is needed to go on. Written in the background."""

    every_steps: int | None = Field(200, ge=1)
    """Optimizer steps between two checkpoints. None: only where validation was the best so far, at
    the end, and when told to stop."""
    keep: int = Field(2, ge=1)
    """How many of the newest to keep, beside the best by validation."""


class TrackConfig(FrozenModel):
    """Where curves go. `metrics.jsonl` in the run folder is always written."""

    wandb: bool = True
    """Weights & Biases: online when logged in, else offline in the run folder. The variable
    WANDB_MODE is honoured."""
    tensorboard: bool = False
    """TensorBoard event files in the run folder."""
    project: str = Field("distvgg", max_length=128, pattern=r"^[^/\\#?%:]+$")
    """Project on the trackers; W&B takes no slash, backslash, #, ?, % or colon."""
    name: str | None = None
    """Run name on the trackers. None: the run folder's name."""
    every_steps: int = Field(50, ge=1)
    """Optimizer steps between two rows of training metrics."""


class Config(FrozenModel):
    """One run. Equal configs give equal loss curves, on any number of processes."""

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
                "train.micro_batch_size 1 leaves BatchNorm nothing to normalise over: take 2 or"
                " more, or --model.batch_norm false"
            )
        return self

    @model_validator(mode="after")
    def _muon_needs_batch_norm(self) -> "Config":
        if self.optim.name == "muon" and not self.model.batch_norm:
            raise ValueError(
                "optim.name muon keeps filters at one size, which only BatchNorm makes up for: take"
                " sgd or adamw, or --model.batch_norm true"
            )
        return self

    @model_validator(mode="after")
    def _mixing_needs_a_batch(self) -> "Config":
        mixes = self.augment.mixup_alpha or self.augment.cutmix_alpha
        if mixes and self.train.micro_batch_size == 1:
            raise ValueError(
                "train.micro_batch_size 1 leaves an image none to be mixed with: take 2 or more,"
                " or turn augment.mixup_alpha and augment.cutmix_alpha off"
            )
        return self

    def to_yaml(self, *, exclude_defaults: bool = False) -> str:
        return yaml.safe_dump(self.model_dump(exclude_defaults=exclude_defaults), sort_keys=False)

    def flat(self) -> dict[str, Any]:
        """Every field by its dotted name, as typed on the command line; a list as text, since
        trackers take no tuple, and an empty one as None."""
        return dict(_flatten(self.model_dump()))

    def replace(self, **dotted: Any) -> "Config":
        """A copy with some fields changed, dots written as double underscores."""
        values = self.model_dump()
        _merge(values, {name.replace("__", "."): value for name, value in dotted.items()})
        return Config.model_validate(values)


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    folder = resources.files("distvgg") / "recipes"
    names = [file.name for file in folder.iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load(recipe: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """The config of a recipe with overrides on top.

    Args:
        recipe: a packaged recipe's name, or the path of a YAML file.
        overrides: dotted field name -> value, text or typed.

    Raises:
        UserError: no such recipe, not YAML, an unknown key or a value out of range.
    """
    values = _read_recipe(recipe)
    _merge(values, overrides or {})
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_one_line(error)) from error


def _read_recipe(recipe: str) -> dict[str, Any]:
    path = Path(recipe)
    try:
        if recipe in recipe_names():  # a file of that name is ./fast
            text = (resources.files("distvgg") / "recipes" / f"{recipe}.yaml").read_text()
        elif path.suffix in (".yaml", ".yml") or path.is_file():
            text = path.read_text()
        else:
            raise UserError(
                f"no recipe {recipe!r}{_nearest(recipe, recipe_names())}: give one of"
                f" {', '.join(recipe_names())}, or the path of a YAML file"
            )
        values = yaml.safe_load(text) or {}
    except OSError as error:
        raise UserError(f"cannot read recipe {recipe}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"recipe {recipe} is not valid YAML: {reason}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {recipe} must be a mapping of sections, such as `train:`")
    return values


def _merge(values: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Sets dotted names in nested mappings, leaving what is not a mapping to be found invalid."""
    for dotted, value in overrides.items():
        if isinstance(value, str) and value.lower() in ("none", "null"):
            value = None
        *sections, field = dotted.split(".")
        inner = values
        for section in sections:
            if not isinstance(inner.get(section), dict):
                inner[section] = {}
            inner = inner[section]
        inner[field] = value


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, tuple):
            yield f"{prefix}{key}", ",".join(map(str, value)) or None
        else:
            yield f"{prefix}{key}", value


def _nearest(name: str, names: Sequence[str]) -> str:
    """The hint `, did you mean X?`, by the whole dotted name or else by its last part alone."""
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    if not found:
        leaves = {n.rsplit(".", 1)[-1]: n for n in names}
        found = [
            leaves[leaf] for leaf in difflib.get_close_matches(name.rsplit(".", 1)[-1], leaves, n=1)
        ]
    return f", did you mean {found[0]}?" if found else ""


def _one_line(error: ValidationError) -> str:
    """pydantic's report as one line in the words of the command line."""
    names = list(Config().flat())
    parts = []
    for e in error.errors(include_url=False):
        dotted = ".".join(map(str, e["loc"]))
        if e["type"] == "extra_forbidden":
            near = _nearest(dotted, [*names, *Config.model_fields]) or (
                f"; {e['loc'][0]} has "
                + ", ".join(n.split(".", 1)[1] for n in names if n.startswith(f"{e['loc'][0]}."))
                if len(e["loc"]) > 1
                else "; the sections are " + ", ".join(Config.model_fields)
            )
            parts.append(f"unknown key {dotted}{near}")
        elif e["type"] == "value_error":
            parts.append(str(e["ctx"]["error"]))
        else:
            wanted = re.sub(r"^\w+ should", "must", e["msg"])
            parts.append(f"{dotted} {wanted} (got {e['input']!r})")
    return "; ".join(parts)
