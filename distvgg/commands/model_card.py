"""The model card of a network: what was trained on what, its numbers, and code that loads it.

The license is left to the user, because it depends on the data.
"""

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from distvgg import metrics
from distvgg.config import Config
from distvgg.data.cache import HUB_IDS
from distvgg.models.classifier import Classifier
from distvgg.models.export import torchvision_code
from distvgg.models.summary import network_name
from distvgg.runs.layout import WEIGHTS_FILE
from distvgg.runs.result import Result
from distvgg.wording import counted

_METRICS = {
    metrics.TOP1: "top-1",
    metrics.TOP5: "top-5",
    metrics.TTA_TOP1: "top-1 with mirror images",
    metrics.SUPERCLASS_TOP1: "superclass top-1",
}


def model_card(model: Classifier, config: Config | None, result: Result | None, repo: str) -> str:
    """Returns the README.md of a model repository, with `model-index` metadata.

    Args:
        model: the network.
        config: of its run; None if unknown.
        result: of its run; None if the weights are not those that the result measured.
        repo: the repository or folder, for the code that loads it.
    """
    data = config.data.name if config else "custom"
    name = (
        f"{network_name(model.config).lower().replace('vgg-', 'vgg').replace('-bn', '_bn')}-{data}"
    )
    results = _eval_results(result, data)
    card_data = ModelCardData(
        library_name="distvgg",
        pipeline_tag="image-classification",
        tags=[
            model.config.name,
            "image-classification",
            "model_hub_mixin",
            "pytorch_model_hub_mixin",
        ],
        datasets=[HUB_IDS[data]] if data in HUB_IDS else None,
        model_name=name,
        metrics=sorted({found.metric_type for found in results}) or None,
        eval_results=results or None,
    )
    parts = [_title(model, name), _numbers(result), _use(repo), _use_in_torchvision(model)]
    return str(ModelCard(f"---\n{card_data.to_yaml()}\n---\n\n" + "\n".join(parts)))


def torchvision_program(model: Classifier, file: str) -> str | None:
    """Returns a program of plain torchvision that loads a file of weights as `model`, or None."""
    code = torchvision_code(model, model.config.image_size)
    if code is None:
        return None
    imports, build = code.split("\n\n")
    return (
        f"from safetensors.torch import load_file\n{imports}\n\n{build}\n"
        f'model.load_state_dict(load_file("{file}"))\nmodel.eval()\n'
    )


def transforms_program(model: Classifier) -> str:
    """Returns a program of torchvision that turns an RGB image of Pillow into the input."""
    constants = model.preprocessing
    height, width = constants.stored_size
    if height == width:
        resized = round(height / constants.crop_ratio)
        steps = [f"v2.Resize({resized})", f"v2.CenterCrop({height})"]
    else:
        steps = [f"v2.Resize({(height, width)})"]
    mean, std = ([round(x, 6) for x in values] for values in (constants.mean, constants.std))
    steps += [
        "v2.ToImage()",
        "v2.ToDtype(torch.float32, scale=True)",
        f"v2.Normalize({mean}, {std})",
    ]
    if (constants.image_size,) * 2 != (height, width):
        steps.append(f"v2.Resize(({constants.image_size}, {constants.image_size}))")
    listed = "".join(f"    {step},\n" for step in steps)
    return (
        "import torch\nfrom torchvision.transforms import v2\n\n"
        f"preprocess = v2.Compose([\n{listed}])\n"
    )


def _eval_results(result: Result | None, data: str) -> list[EvalResult]:
    splits = {"validation": result.val, "test": result.test} if result else {}
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=HUB_IDS.get(data, data),
            dataset_name=data,
            dataset_split=split,
            metric_type="accuracy",
            metric_name=label,
            metric_value=row[metric],
        )
        for split, row in splits.items()
        if row is not None
        for metric, label in _METRICS.items()
        if metric in row
    ]


def _title(model: Classifier, name: str) -> str:
    height, width = model.preprocessing.stored_size
    side = model.preprocessing.image_size
    count = sum(p.numel() for p in model.parameters())
    names = ", ".join(model.class_names[:10])
    more = ", ..." if len(model.class_names) > 10 else ""
    return f"""# {name}

{network_name(model.config)} with {count:,} parameters, an image classifier trained with distvgg.

- Input: RGB images of {height}x{width} pixels, normalised and resized to {side}x{side}.
- Output: logits of {len(model.class_names)} classes ({names}{more}).
- `config.json` has the constants of the normalisation and the names of all classes.
- License: add `license:` to the head of this file.
"""


def _numbers(result: Result | None) -> str:
    if result is None:
        return "## Accuracy\n\nNot measured: these are not the final weights of a finished run.\n"
    rows = {"validation": result.val, "test": result.test}
    named = {m: label for m, label in _METRICS.items() if m in result.val}
    lines = [
        "## Accuracy",
        "",
        f"| split | images | loss | {' | '.join(named.values())} |",
        "|---" * (3 + len(named)) + "|",
    ]
    for split, row in rows.items():
        if row is not None:
            cells = " | ".join(f"{row[m]:.2%}" if m in row else "" for m in named)
            lines.append(
                f"| {split} | {row[metrics.COUNT]:,} | {row[metrics.LOSS]:.3f} | {cells} |"
            )
    packages = ", ".join(f"{package} {version}" for package, version in result.versions.items())
    lines += [
        "",
        f"One run with seed {result.seed}: {counted(result.steps, 'step')},"
        f" {result.epochs:.2f} epochs over {result.train_size:,} images, precision"
        f" {result.precision}.",
        "The validation images were held out of training. Test was read once, at the end."
        if result.test
        else "The validation images were held out of training. Test was not read.",
        "",
        f"- Hardware: {counted(result.num_processes, 'process')}, {result.hardware}",
        f"- Versions: {packages}",
        f"- Commit of distvgg: {result.commit or 'an installed package'}",
        f"- Fingerprint of the data: {result.data_fingerprint}",
        "",
    ]
    return "\n".join(lines)


def _use(repo: str) -> str:
    return f"""## Use

```python
import distvgg

model = distvgg.HubClassifier.from_pretrained("{repo}")
print(model.classify("cat.png"))
```
"""


def _use_in_torchvision(model: Classifier) -> str:
    program = torchvision_program(model, WEIGHTS_FILE)
    if program is None:
        return "torchvision's VGG does not have the layers of this network.\n"
    return f"""In plain torchvision:

```python
{program}```

An RGB image of Pillow becomes the input by `preprocess(image)[None]`:

```python
{transforms_program(model)}```
"""
