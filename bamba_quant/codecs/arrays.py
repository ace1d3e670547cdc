"""Types of numpy arrays that codecs take and return."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
U8 = NDArray[np.uint8]
Array = NDArray[Any]
Bytes = NDArray[Any]  # uint8, whose type numpy's stubs lose in operations with a Python integer
