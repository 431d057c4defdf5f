"""`python -m stepquant.runtime.ops.native`: compile the kernels where the package lies."""

import sys

from stepquant.runtime.ops.native.build import LIBRARY, build

why_not = build()
if why_not is not None:
    sys.exit(f"no native kernels: {why_not}")
print(f"wrote {LIBRARY}")
