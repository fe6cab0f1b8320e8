"""`compresslab mobile`: the roofline by hand, operators as ExecuTorch counts them, and what the command says."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

import tiny
from compresslab import mobile, pipeline
from compresslab.errors import CompressLabError
from compresslab.exporters import executorch_lowering as lowering
from compresslab.exporters.contract import Given
from compresslab.measure import devices, fresh, hardware
from compresslab.measure.devices import Cores, Profile, Roof, Work


def cores(count: int, ghz: float, pipes: int) -> Cores:
    return Cores(core=f"c{ghz}", count=count, ghz=ghz, pipes=pipes)


ROUND = Profile(name="round", what="", cores=(cores(2, 1.0, 4), cores(1, 1.5, 2), cores(4, 1.0, 1)), ram_gb=2, storage_gb=10,
                bandwidth_gb_s=10, sources=("by hand",))  # fmt: skip


def test_the_roofline_by_hand() -> None:
    """The fastest four cores are 2 x 4, 1 x 3 and 1 x 1 multiply-adds of 128 bits in a nanosecond: 12."""
    roof = ROUND.roof()
    assert (roof.int8_gmac_s, roof.float32_gmac_s, roof.gb_s) == (12 * 16, 12 * 4, 10)
    computing = Work(integer_macs=192_000_000, float_macs=96_000_000, bytes_read=1000)
    assert roof.milliseconds(computing) == pytest.approx(1 + 2)
    assert roof.milliseconds(computing.model_copy(update={"bytes_read": 50_000_000})) == pytest.approx(5)


def test_an_estimate_is_the_roofline_at_the_measured_efficiency_and_says_what_it_is() -> None:
    work = Work(integer_macs=192_000_000, float_macs=0, bytes_read=0)
    found = mobile.fit(ROUND, 100_000_000, 1.2e9, {"forward_ms": work}, {"forward_ms": 0.25})
    (estimate,) = found.estimates
    assert estimate.value == pytest.approx(1 / 0.25) and estimate.name == "estimated_forward_ms"
    assert "AN ESTIMATE, not measured there" in estimate.conditions
    assert not found.fits_memory and found.memory_share == pytest.approx(0.6)
    assert found.storage_share == pytest.approx(0.01)
    assert mobile.fit(ROUND, 1, 1e9, {}, {}).fits_memory


def test_every_profile_has_a_source_and_plausible_numbers() -> None:
    assert len(devices.profiles()) >= 4
    for one in devices.profiles().values():
        assert all(source.startswith("https://") for source in one.sources)
        assert 10 <= one.bandwidth_gb_s <= 100 and 2 <= one.ram_gb <= 24
        assert 100 < one.roof().int8_gmac_s < 1000 and len(one.used) == devices.USED
    with pytest.raises(CompressLabError, match="no device profile 'fridge': there are snapdragon-8-gen-3, "):
        devices.profile("fridge")


# -- with ExecuTorch -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    pytest.importorskip("executorch")
    with tiny.quick(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fresh, "measure", tiny.fake_measure)
        folder = tmp_path_factory.mktemp("mobile")
        model = tiny.save("llama", folder / "model", num_hidden_layers=1)
        recipe = tiny.recipe("rtn", bits=8, group_size=None, symmetric=True)
        pipeline.compress(model, recipe, None, out=folder / "artifact", measure=False)
        yield folder / "artifact"


@pytest.fixture(scope="module")
def lowered(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> lowering.Lowered:
    return lowering.lower(Given(artifact), 48, tmp_path_factory.mktemp("scratch"))


def test_operators_are_counted_as_the_devtools_of_executorch_count_them(lowered: lowering.Lowered) -> None:
    with lowering.quiet():
        from executorch.devtools.backend_debug import get_delegation_info
    told = get_delegation_info(lowered.edge.exported_program().graph_module)
    rows = told.delegation_by_operator.values()
    ours = mobile.coverage(lowered, 1)
    assert ours.delegates == told.num_delegated_subgraphs
    getitems = [
        row for row in rows if row.op_type == "getitem"
    ]  # they name one of several results, and compute nothing
    symbols = [row for row in rows if row.op_type in ("sym_size", "sym_size_int")]
    aside = [*getitems, *symbols]
    assert ours.delegated == told.num_delegated_nodes - sum(row.delegated for row in aside)
    assert ours.operators - ours.delegated == told.num_non_delegated_nodes - sum(row.non_delegated for row in aside)


def test_products_are_counted_by_tokens_and_left_operators_named_by_layer(lowered: lowering.Lowered) -> None:
    hidden, inner, keys, words = tiny.HIDDEN, 2 * tiny.HIDDEN, 2 * 8, tiny.VOCABULARY
    linear = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner
    attention = 2 * 4 * 48 * 8  # products, heads, places in the cache, width
    written_as_products = (
        4 + 2
    ) * 8 * 8 + 3 * hidden  # halves swapped for the heads of queries and keys; means of norms
    for tokens in (1, 7):
        found = mobile.coverage(lowered, tokens)
        assert found.integer_macs == tokens * linear
        assert (
            found.macs == tokens * (linear + attention + written_as_products) + hidden * words
        )  # the head reads the last token alone
        assert found.delegated_macs == found.macs
    left = {row.operator: row for row in found.left}
    assert left["aten.index_put"].count == 2
    assert left["aten.index_put"].layers == ("model.layers.0.self_attn",)


def said(found: mobile.Readiness, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(mobile.to_terminal(found))
    return console.export_text()


def test_the_command(
    artifact: Path, lowered: lowering.Lowered, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ceilings = [hardware._measurement(name, [100.0] * 3, "GOP/s", "", hardware.cpu())
                for name in ("fp32_ceiling", "int8_ceiling", "memory_copy")]  # fmt: skip
    monkeypatch.setattr(hardware, "ceilings", lambda cpu, budget_s: ceilings)
    macs = {"prefill_ms": lowered.macs(16), "decode_ms_per_token": lowered.macs(1)}
    monkeypatch.setattr(lowering, "lower", lambda given, length, scratch: lowered)
    shown = [
        *("mobile", artifact),
        "--length",
        48,
        "--tokens",
        16,
        "--rounds",
        2,
        "--threads",
        1,
        "--profile",
        "pixel-6",
    ]
    code, out, error = tiny.run_cli(monkeypatch, capsys, *shown, "--json")
    assert code == 0, error
    found = mobile.Readiness.model_validate(json.loads(out))
    assert {m.name for m in found.here} == {"prefill_ms", "decode_ms_per_token"}
    assert found.memory.value > 50_000 and found.file_bytes > 30_000
    (pixel,) = found.devices
    for m in pixel.estimates:
        name = m.name.removeprefix("estimated_")
        here = next(x for x in found.here if x.name == name)
        read = found.file_bytes - lowered.table_bytes + lowered.cache_bytes
        work = Work(integer_macs=macs[name][0], float_macs=macs[name][1], bytes_read=read)
        roofs = [
            r.milliseconds(work) for r in (pixel.profile.roof(), Roof(int8_gmac_s=50, float32_gmac_s=50, gb_s=100))
        ]
        assert m.value == pytest.approx(roofs[0] * max(here.value / roofs[1], 1))
    narrow, text = said(found, 60), said(found, 160)
    assert max(map(len, narrow.splitlines())) <= 60 and "ESTIMATED" in narrow
    assert "model.layers.*.self_attn" in text and "aten.index_put" in text
    code, _, error = tiny.run_cli(monkeypatch, capsys, "mobile", artifact, "--profile", "fridge")
    assert code == 2 and "no device profile 'fridge'" in error
