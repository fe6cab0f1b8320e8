"""The report: its data, and the three ways to show one run or several."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console, RenderableType

from compresslab.errors import CompressLabError
from compresslab.report import compare, plots, render, words
from compresslab.report.schema import Bytes, Layer, Measurement, Parity, Report, read_report

ROLES = {
    "self_attn.q_proj": (576, 576, 27.0),
    "self_attn.k_proj": (192, 576, 28.5),
    "self_attn.v_proj": (192, 576, 23.0),
    "self_attn.o_proj": (576, 576, 21.0),
    "mlp.gate_proj": (1536, 576, 22.5),
    "mlp.up_proj": (1536, 576, 21.7),
    "mlp.down_proj": (576, 1536, 19.5),
}
UNITS = {
    "disk_bytes": "bytes",
    "weight_bytes": "bytes",
    "peak_memory_bytes": "bytes",
    "decode_tokens_per_s": "tokens/s",
    "prefill_ms": "ms",
    "decode_ms_per_token": "ms",
    "load_ms": "ms",
}
BEFORE = {
    "disk_bytes": 271_200_000.0,
    "weight_bytes": 269_060_552.0,
    "perplexity": 25.0,
    "decode_tokens_per_s": 63.7,
    "prefill_ms": 412.0,
    "decode_ms_per_token": 15.7,
    "load_ms": 880.0,
    "peak_memory_bytes": 612_000_000.0,
    "parameters": 134_515_008.0,
}
AFTER = {
    "disk_bytes": 113_900_000.0,
    "weight_bytes": 111_760_552.0,
    "perplexity": 27.52,
    "decode_tokens_per_s": 121.0,
    "prefill_ms": 655.0,
    "decode_ms_per_token": 8.26,
    "load_ms": 884.0,
    "peak_memory_bytes": 401_000_000.0,
    "parameters": 134_515_008.0,
}
WIKI = "WikiText-2 raw, test split, windows of 1024 tokens, stride 1024, mean over all tokens"


def measured(values: dict[str, float], conditions: str = WIKI) -> tuple[Measurement, ...]:
    def one(name: str, value: float) -> Measurement:
        unit = UNITS.get(name, "1")
        timed = unit in ("ms", "tokens/s")
        spread = abs(value) * 0.021 if timed else 0.31 if name == "perplexity" else None
        told = "median of runs of 64 new tokens after a prompt of 128, batch 1, float32" if timed else f"{name} as told"
        return Measurement(
            name=name,
            value=value,
            unit=unit,
            n=15 if timed else 284_672 if name == "perplexity" else 1,
            spread=spread,
            device="cpu, 2 threads",
            conditions=conditions if name == "perplexity" else told,
        )

    return tuple(one(name, value) for name, value in values.items())


def linear(name: str, shape: tuple[int, ...], db: float, **changes: Any) -> Layer:
    weights = math.prod(shape)
    settings: dict[str, Any] = dict(
        name=name,
        method="gptq",
        shape=shape,
        bits_per_weight=4.13,
        nonzero_frac=0.913,
        bytes_before=weights * 2,
        bytes_after=round(weights * 4.13 / 8),
        sqnr_db=db,
        sqnr_of="output",
        seconds=0.41,
    )
    return Layer(**settings | changes)


def network(blocks: int = 30) -> tuple[Layer, ...]:
    return tuple(
        linear(
            f"model.layers.{block}.{name}",
            (out, width),
            db + 2.2 * math.sin(block * 1.7 + out) - 5.5 * (name.endswith("down_proj") and block in (1, blocks - 1)),
            note="damping raised to 0.1" if name.endswith("down_proj") and block == 1 else "",
        )
        for block in range(blocks)
        for name, (out, width, db) in ROLES.items()
    )


def make(**changes: Any) -> Report:
    """A made-up run; any field can be replaced."""
    settings: dict[str, Any] = dict(
        created="2025-03-01T12:00:00Z",
        title="smollm2-135m, w4a16-gptq",
        recipe={
            "name": "w4a16-gptq",
            "steps": [{"method": "gptq", "settings": {"bits": 4, "group_size": 128, "damping": 0.01, "order": True}}],
            "calibration": {"samples": 128, "sequence_length": 512, "seed": 0},
        },
        model={
            "name": "HuggingFaceTB/SmolLM2-135M",
            "architecture": "LlamaForCausalLM",
            "parameters": 134_515_008,
            "dtype": "bfloat16",
            "licence": "apache-2.0",
            "sha256": "9f" * 32,
        },
        data={
            "source": "wikitext-2-raw-v1",
            "revision": "b08601e",
            "split": "train",
            "samples": 128,
            "sequence_length": 512,
            "tokens": 65_536,
            "seed": 0,
            "sha256": "c4" * 32,
        },
        environment={
            "cpu": "AMD EPYC 7B13",
            "cores": 2,
            "threads": 2,
            "memory_bytes": 8_300_000_000,
            "os": "Linux 6.1",
            "python": "3.11.7",
            "versions": {"torch": "2.8.0", "transformers": "5.1.0", "compressed-tensors": "0.13.0"},
        },
        seconds={"read": 1.2, "calibrate and solve": 141.5, "write": 0.84, "measure": 188.0},
        before=measured(BEFORE),
        after=measured(AFTER),
        layers=network(),
        skipped={"lm_head": "its weight is tied to the embedding"},
        bytes=(
            Bytes(kind="codes", before_bytes=0, after_bytes=53_084_160),
            Bytes(kind="scales", before_bytes=0, after_bytes=1_658_880),
            Bytes(kind="other weights", before_bytes=212_336_640, after_bytes=0),
            Bytes(kind="embeddings", before_bytes=56_623_104, after_bytes=56_623_104),
            Bytes(kind="norms and biases", before_bytes=70_272, after_bytes=70_272),
            Bytes(kind="file headers", before_bytes=30_536, after_bytes=324_136),
        ),
        parity=Parity(runtime="transformers 5.1.0 with compressed-tensors 0.13.0", tensors=210, max_abs_difference=0.0),
    )
    return Report(**settings | changes)


def shown(renderable: RenderableType, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


ALL = (render.to_html, render.to_markdown)


def compare_terminal(runs: list[Report]) -> RenderableType:
    return compare.compare_terminal(compare.comparison(runs))


def compare_markdown(runs: list[Report]) -> str:
    return compare.compare_markdown(compare.comparison(runs))


def compare_html(runs: list[Report]) -> str:
    return compare.compare_html(compare.comparison(runs))


HOSTILE = "<script>alert(1)</script>|`x`[red]\x1b[2J\n\"'&"


def everything(report: Report) -> list[str]:
    """One run through every renderer."""
    two = [report, report]
    texts = [shown(render.to_terminal(report), 60), shown(compare_terminal(two), 60)]
    texts += [made(report) for made in ALL]
    return [*texts, compare_html(two), compare_markdown(two)]


def test_the_report_survives_saving(tmp_path: Path) -> None:
    report = make(layers=(linear("a.b", (4, 4), math.inf), linear("a.c", (4, 4), 20.0)))
    report.save(tmp_path)
    assert read_report(tmp_path) == report
    assert read_report(tmp_path / "report.json") == report


def test_a_report_that_cannot_be_read_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(CompressLabError, match="no report"):
        read_report(tmp_path)
    make().save(tmp_path)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 2}))
    with pytest.raises(CompressLabError, match="not a report"):
        read_report(tmp_path)
    path.write_text("{")
    with pytest.raises(CompressLabError, match="not a report"):
        read_report(tmp_path)


@pytest.mark.parametrize("left_out", ["unit", "n", "device", "conditions"])
def test_a_measurement_needs_unit_and_n(left_out: str) -> None:
    given: dict[str, Any] = dict(name="x", value=1.0, unit="ms", n=3, device="cpu", conditions="none")
    Measurement(**given)
    with pytest.raises(ValidationError, match=left_out):
        Measurement(**{key: value for key, value in given.items() if key != left_out})
    with pytest.raises(ValidationError):
        Measurement(**given | {"unit": ""})
    with pytest.raises(ValidationError):
        Measurement(**given | {"n": 0})


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (113_900_000, "bytes", "113.9 MB"),
        (999, "bytes", "999 B"),
        (999_949, "bytes", "999.9 kB"),
        (999_960, "bytes", "1.0 MB"),
        (2.5e9, "bytes", "2.5 GB"),
        (0, "bytes", "0 B"),
        (27.52, "1", "27.52"),
        (25.0, "1", "25.00"),
        (134_515_008, "1", "134.5 million"),
        (999_999_999, "1", "1.0 billion"),
        (0.99995, "1", "0.99995"),  # a cosine is not rounded to one
        (0.00012345, "1", "0.0001234"),
        (14.3, "ms", "14.3 ms"),
        (8.26, "ms", "8.26 ms"),
        (121, "tokens/s", "121 tokens/s"),
        (1234.5, "tokens/s", "1,234 tokens/s"),
        (3.5, "furlongs", "3.50 furlongs"),
        (59.94, "s", "59.9 s"),
        (754, "s", "12 min 34 s"),
        (7300, "s", "2 h 1 min"),
        (math.inf, "bytes", "inf bytes"),
        (math.nan, "ms", "nan ms"),
    ],
)
def test_numbers_read_well(value: float, unit: str, text: str) -> None:
    assert render.human(value, unit) == text


def test_verdict_tells_the_good_and_the_bad() -> None:
    assert words.verdict(make()) == "2.4x smaller, decode 1.9x faster, perplexity 25.00 -> 27.52 (+10.1 %)"
    worse = measured(AFTER | {"disk_bytes": 542_400_000.0, "decode_tokens_per_s": 21.0, "perplexity": 24.0})
    assert words.verdict(make(after=worse)) == "2.0x larger, decode 3.0x slower, perplexity 25.00 -> 24.00 (-4.0 %)"
    same = make(after=measured(BEFORE))
    assert words.verdict(same) == "size unchanged, decode unchanged, perplexity 25.00 -> 25.00 (unchanged)"
    near = make(after=measured(BEFORE | {"decode_tokens_per_s": 65.0}))
    assert "decode as fast as before, within spread" in words.verdict(near)


def test_verdict_uses_only_what_was_measured() -> None:
    per_token = make(after=measured({"decode_ms_per_token": 31.4, "weight_bytes": 269_060_552.0 / 4}))
    assert words.verdict(per_token) == "4.0x smaller, decode 2.0x slower"
    assert "Perplexity was not measured" in render.to_markdown(per_token)
    cosine = Measurement(
        name="embedding_cosine", value=0.99871, unit="1", n=9, device="cpu", conditions="hidden states"
    )
    forward = [Measurement(name="forward_ms", value=v, unit="ms", n=3, device="cpu", conditions="") for v in (9, 18)]
    encoder = make(before=forward[:1], after=(forward[1], cosine))
    assert words.verdict(encoder) == "forward 2.0x slower, embedding cosine 0.99871"
    nothing = make(before=(), after=(), layers=(), skipped={}, bytes=(), data=None, seconds={})
    assert words.verdict(nothing) == "nothing was measured both before and after"
    assert len(everything(nothing)) == 6


def test_slower_and_larger_are_said_in_every_form() -> None:
    report = make(after=measured(AFTER | {"decode_tokens_per_s": 20.0, "disk_bytes": 300e6}))
    for text in (shown(render.to_terminal(report), 80), *(made(report) for made in ALL)):
        assert "slower" in text
        assert "larger" in text
    assert "Slower than the original on the machine below: decode speed, prefill" in render.to_markdown(report)


def test_unknown_names_and_one_sided_measurements_are_shown() -> None:
    extra = Measurement(name="furlong_count", value=3.5, unit="furlongs", n=2, device="cpu", conditions="by eye")
    report = make(before=(), after=(extra,))
    for text in (shown(render.to_terminal(report), 80), *(made(report) for made in ALL)):
        assert "furlong count" in text
        assert "furlongs" in text
        assert "3.50" in text


def hostile() -> Report:
    odd = Measurement(name=HOSTILE, value=1.0, unit=HOSTILE, n=1, device=HOSTILE, conditions=HOSTILE)
    return make(
        title=HOSTILE,
        created=HOSTILE,
        recipe={"name": HOSTILE, HOSTILE: "```\n# heading"},
        model={"name": HOSTILE, HOSTILE: {HOSTILE: [HOSTILE]}, "licence": HOSTILE},
        data={HOSTILE: HOSTILE},
        environment={HOSTILE: HOSTILE},
        seconds={HOSTILE: 1.0},
        before=(*measured(BEFORE, HOSTILE), odd),
        after=(*measured(AFTER, HOSTILE), odd),
        layers=(
            linear(f"model.0.{HOSTILE}", (4, 4), 9.0, method=HOSTILE, note=HOSTILE, sqnr_of=HOSTILE),
            linear("model.1.q_proj", (4, 4), 11.0),
        ),
        skipped={HOSTILE: HOSTILE},
        bytes=(Bytes(kind=HOSTILE, before_bytes=10, after_bytes=5),),
        parity=Parity(runtime=HOSTILE, tensors=1, max_abs_difference=0.5),
    )


def test_hostile_names_stay_text() -> None:
    report = hostile()
    for page in (render.to_html(report), compare_html([report, make()])):
        assert "<script" not in page
        assert "&lt;script&gt;" in page
        assert not re.search(r"<[^>]*\son\w+=", page)
    for text in everything(report):
        assert "\x1b" not in text
    for card in (render.to_markdown(report), compare_markdown([report, make()])):
        outside = re.sub(r"(?ms)^(`{3,})\w+$.*?^\1$|\A---$.*?^---$", "", card)
        assert "<script" not in outside
        tables = [line for line in outside.splitlines() if line.startswith("| ")]
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} in ({7}, {11})
    assert "[red]" in shown(render.to_terminal(report), 200)  # not taken for a style


def test_pages_load_nothing() -> None:
    for page in (render.to_html(make()), compare_html([make(), make()])):
        assert not re.search(r"(?i)(src|href|action|data)\s*=", page.replace("data-", ""))
        assert not re.search(r"(?i)url\(|@import|<(script|link|iframe|object|embed|img)\b|http-equiv=.refresh", page)
        assert "https://" not in page
        assert "http://" not in page


def test_byte_bars_add_up_to_the_files() -> None:
    report = make()
    page = render.to_html(report)
    bars = re.findall(r'<svg class="bar".*?</svg>', page, flags=re.S)
    drawn = [[int(size) for size in re.findall(r'data-bytes="(\d+)"', bar)] for bar in bars]
    assert [sum(sizes) for sizes in drawn] == [
        sum(part.before_bytes for part in report.bytes),
        sum(part.after_bytes for part in report.bytes),
    ]
    for bar, sizes in zip(bars, drawn, strict=True):  # one scale: a byte is as wide in both bars
        wide = sum(float(share) for share in re.findall(r'width="([\d.]+)%"', bar))
        assert wide == pytest.approx(100 * sum(sizes) / sum(drawn[0]), abs=0.01)
    assert "269.1 MB" in page
    assert "111.8 MB" in page


@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("alone", [True, False])
def test_exact_and_undefined_layers_break_nothing(odd: float, alone: bool) -> None:
    layers = (linear("model.layers.0.q_proj", (4, 4), odd),)
    report = make(layers=layers if alone else layers + network(2))
    texts = everything(report)
    assert all(texts)
    assert ("exact" if odd == math.inf else "undefined" if math.isnan(odd) else "-inf dB") in texts[2]
    for x_y in re.findall(r"translate\(([^)]*)\)", texts[2]):
        assert all(math.isfinite(float(number)) for number in x_y.split(","))


def test_odd_values_break_nothing() -> None:
    for value in (0.0, -1.0, math.nan, math.inf, 1e300):
        values = dict.fromkeys(AFTER, value)
        assert all(everything(make(after=measured(values))))
        assert all(everything(make(before=measured(values))))


@pytest.mark.parametrize("width", [60, 80])
def test_the_terminal_is_wide_enough(width: int) -> None:
    for report in (make(), hostile(), make(parity=Parity(runtime="x", tensors=0, max_abs_difference=0.0))):
        for renderable in (render.to_terminal(report), compare_terminal([report, make()])):
            lines = shown(renderable, width).splitlines()
            assert max(map(len, lines)) <= width
    text = shown(render.to_terminal(make()), width)
    assert "model.layers.1.mlp.down_proj" in text
    assert "damping raised to 0.1" in text


def test_worst_layers_come_first_and_are_labelled() -> None:
    names = [layer.name for layer in plots.worst(make().layers, 2)]
    assert {name.split(".")[2] for name in names} <= {"1", "29"}
    page = render.to_html(make())
    assert re.search(r'class="label[^"]*"[^>]*>1 down_proj<', page)
    assert page.count("<title>model.layers.") == 2 * 210  # a wide plot and a narrow one
    assert plots.roles(make().layers)["down_proj"] == 6


def test_numbered_and_unnumbered_networks_are_drawn() -> None:
    layers = tuple(linear(f"layer{i}", (8, 8), 20.0 + i) for i in range(3))
    assert "layer, in network order" in plots.layer_plot(layers)
    assert "block, in network order" in plots.layer_plot(make().layers)


def test_parity_is_told() -> None:
    assert "210 weights are bit-equal" in render.to_html(make())
    off = make(parity=Parity(runtime="vllm", tensors=3, max_abs_difference=0.031))
    for text in (shown(render.to_terminal(off), 200), *(made(off) for made in ALL)):
        assert "by up to 0.031" in text


def test_the_card_opens_as_a_model_card() -> None:
    card = render.to_markdown(make())
    front = card.split("---\n")[1]
    assert "base_model: HuggingFaceTB/SmolLM2-135M" in front
    assert "license: apache-2.0" in front
    assert "- compresslab" in front
    assert 'from_pretrained(".")' in card
    assert "group_size: 128" in card
    assert "c4c4c4" in card


def test_comparison_flags_different_conditions() -> None:
    other = make(title="other", recipe={"name": "other"}, after=measured(AFTER, "another text"))
    for made in (compare_markdown, compare_html, lambda runs: shown(compare_terminal(runs), 200)):
        alike, apart = made([make(), make()]), made([make(), other])
        assert "not comparable" not in alike
        assert "not comparable" in apart
        assert "[B]" in apart
        assert "another text" in apart


def test_one_run_tells_that_its_own_conditions_differ() -> None:
    said = "Perplexity was measured under different conditions before and after"
    for made in ALL:
        assert said not in made(make())
        assert said in made(make(after=measured(AFTER, "another text")))
    assert "before: WikiText-2" in render.to_html(make(after=measured(AFTER, "another text")))
