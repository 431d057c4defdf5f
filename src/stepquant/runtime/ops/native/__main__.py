"""`python -m stepquant.runtime.ops.native`: compile the kernels into the package's directory."""

import sys

from stepquant.runtime.ops.native.build import LIBRARY, build

why_not = build()
if why_not is not None:
    sys.exit(f"no native kernels: {why_not}")
print(f"wrote {LIBRARY}")
