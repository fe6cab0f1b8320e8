"""An OpenVINO folder answers as torch does, through the function that chat and serve open folders with."""

from __future__ import annotations

from pathlib import Path

import pytest

import compresslab
from compresslab.errors import CompressLabError
from compresslab.exporters.openvino import EXACT
from compresslab.serving import opening
from compresslab.serving.runtime import Sampling
from compresslab.serving.torch_runtime import TorchRuntime

pytest.importorskip("openvino")
GREEDY = Sampling(max_tokens=20, temperature=0)


@pytest.fixture(scope="module")
def exported(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compresslab.export(artifact, "openvino", out=tmp_path_factory.mktemp("openvino") / "out").folder


def test_openvino_says_what_torch_says(artifact: Path, exported: Path) -> None:
    from compresslab.serving.openvino import OpenVinoRuntime

    torch_runtime = TorchRuntime(artifact, packed=False)
    opened = OpenVinoRuntime(exported / "openvino_model.xml", EXACT)
    ids = opened.encode("hello there")
    assert ids == torch_runtime.encode("hello there") and opened.context_length == torch_runtime.context_length
    found, wanted = list(opened.stream(ids, GREEDY)), list(torch_runtime.stream(ids, GREEDY))
    assert found[:8] == wanted[:8] and len(wanted) >= 8  # later on, last bits may turn a near tie
    assert list(opened.stream(ids, GREEDY)) == found  # the state of the request before is gone


def test_chat_and_serve_open_it(exported: Path, tmp_path: Path) -> None:
    opened = opening.open_runtime(exported)
    assert opened.name == "openvino"
    drawn = [list(opened.stream(opened.encode("hello"), Sampling(max_tokens=20, seed=seed))) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(CompressLabError, match="onnx-genai finds nothing to open"):
        opening.open_runtime(exported, "onnx-genai")
