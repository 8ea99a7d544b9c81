"""The process that has the TPU compiler; `aot.in_compiler` starts it.

Reads a pickled pair from standard input: the name of a function and its arguments.
Writes a line of JSON for each argument, as soon as it is done.
"""

import importlib
import json
import os
import pickle
import re
import sys
from collections.abc import Callable
from typing import Any

from jaxllm.core.errors import UserError

__all__ = ["main"]

_SIZE = re.compile(r"([\d.]+[KMGT])\b.*?([\d.]+[KMGT])\b")


def main() -> None:
    """Answers until all arguments are done."""
    name, arguments = pickle.load(sys.stdin.buffer)
    # Libraries print; what they print must not stand between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, _, attribute = name.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    for argument in arguments:
        answers.write(json.dumps(_call(function, argument), allow_nan=False) + "\n")
        answers.flush()


def _call(function: Callable[[Any], Any], argument: Any) -> dict[str, Any]:
    try:
        return {"result": function(argument)}
    except UserError as cause:
        return {"error": str(cause), "kind": type(cause).__name__}
    except Exception as cause:
        text = str(cause)
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        found = _SIZE.search(text)
        sizes = f"{found[1]}iB in {found[2]}iB" if found else "too large"
        return {
            "error": f"cannot compile: the program does not fit into the memory of a "
            f"device: is {sizes}, expected less. Take more chips or smaller weights "
            "(--hardware, --quantize), or lower --batch or --context.",
            "kind": "CapacityError",
        }


if __name__ == "__main__":
    main()
