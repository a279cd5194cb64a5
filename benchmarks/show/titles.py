"""The titles of published runs, in the order in which the site lists them."""

TITLES = {
    "cpu-default": "`make bench` without options, CPU",
    "cpu-resnet50": "ResNet-50: model and operators, CPU",
    "cpu-all-networks": "Operators of all networks, CPU",
    "cpu-all-networks-1-thread": "Operators of three networks, CPU, one thread",
    "cpu-all-networks-bfloat16": "Operators of three networks, CPU, bfloat16",
    "cpu-batch-norms-compile": "Batch norms and torch.compile, CPU",
    "cpu-zen4": "Layer norms and additions, CPU (Zen 4)",
    "cpu-models": "Whole models, CPU",
    "cpu-peers": "Inference with other packages, CPU",
    "cuda-h200-models": "Whole models on an H200, bfloat16",
    "cuda-h200-kernels": "A training step by kind of kernel, H200",
    "cuda-h100-minutes-models": "Whole models on an H100, bfloat16",
    "cuda-h100-minutes-operators": "Operators on an H100, bfloat16",
    "cuda-h100-minutes-tf32": "Grouped convolutions on an H100, TF32",
    "cuda-h200-operators": "Operators on an H200, bfloat16, earlier kernels",
    "cuda-h100": "Operators on an H100, float32, earlier kernels",
    "cuda-h100-models": "Whole models on an H100, earlier kernels",
}


def title(name: str) -> str:
    """The title of the published run benchmarks/results/published/NAME.csv. Raises ValueError if it has none."""
    if name not in TITLES:
        raise ValueError(f"the published run {name!r} has no title: give it one in benchmarks/show/titles.py")
    return TITLES[name]
