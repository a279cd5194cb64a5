"""Names of the zoo, for the tests of its facts and of its results."""

import torchvision

from cnnkern.models import list_models

OWN = {"alexnet", "googlenet"}  # torchvision's models of these names are others
TORCHVISION = [name for name in list_models() if hasattr(torchvision.models, name) and name not in OWN]
