"""The grader's own process: `python -m compresslab.course.grader LAB FILE VERDICT` imports FILE and runs the lab's checks on it.

Nothing of the learner is imported anywhere else. The verdict goes into a file, so that whatever FILE prints cannot spoil it.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from compresslab.course import catalogue
from compresslab.course.findings import Wrong


def main(number: str, file: str, verdict: str) -> None:
    torch.set_num_threads(1)
    Path(verdict).write_text(json.dumps(grade(catalogue.lab(number), Path(file))), encoding="utf-8")


def grade(lab: catalogue.Lab, file: Path) -> dict[str, Any]:
    """{"symptom", "values", "expected", "yours", "passed": names of the checks before it}; symptom is None if all passed."""
    passed: list[str] = []
    try:
        function = _function(lab, file)
        for name, check in lab.module("checks").CHECKS.items():
            check(function)
            passed.append(name)
    except Wrong as wrong:
        shown = {"expected": wrong.expected, "yours": wrong.yours}
        return {"symptom": wrong.symptom, "values": wrong.values, "passed": passed} | shown
    except NotImplementedError:
        return {"symptom": "hole", "values": {"function": lab.function}, "passed": passed}
    except Exception as error:  # noqa: BLE001  (whatever the learner's code raises is a finding)
        return {"symptom": "raised", "values": _raised(error, file), "passed": passed}
    return {"symptom": None, "values": {}, "passed": passed}


def _function(lab: catalogue.Lab, file: Path) -> Any:
    spec = importlib.util.spec_from_file_location("exercise", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, lab.function, None)
    if not callable(found):
        raise Wrong("no-function", function=lab.function, file=file.name)
    return found


def _raised(error: Exception, file: Path) -> dict[str, str]:
    """The last line of the learner's own file that an error passed through."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    if isinstance(error, SyntaxError):
        return {"error": f"SyntaxError: {error.msg}", "line": str(error.lineno), "code": (error.text or "").strip()}
    where = lines[-1] if lines else None
    said = f"{type(error).__name__}: {error}"
    return {"error": said, "line": str(where.lineno if where else "?"), "code": (where.line or "") if where else ""}


if __name__ == "__main__":
    main(*sys.argv[1:])
