"""The compiled extension, for what asks more of it than operators. None where the package was installed without it.

`cnnkern/__init__.py` has imported it by then, and raises for one that cannot be loaded. A name that an extension of
another build lacks is an error here too, not a reason to do without.
"""

import sys
from typing import Any

extension: Any = sys.modules.get("cnnkern._C")
