"""Number formats that are no integers: sixteen or 256 values, unevenly spaced, that every group of weights scales to its size.

All of them are one thing here, a rising table of values v_0 < v_1 < ... that has 0 in it. A code is a value's place in the
table counted from 0, so codes are signed, order like the values, and code 0 is the weight 0. What a weight w becomes is

    code = the place of the value nearest to w / scale          w ~ scale * value[code]

and an integer grid is the case value[code] = code. Whatever only needs to know the nearest point, be it rounding, GPTQ's
feedback or a search for ranges, works for every row of FORMATS and none is named anywhere in it.

    format    values                                      scale of a group                                     bits per weight
    nf4       quantiles of a normal distribution          any float; groups of 64 (QLoRA) or what is asked     4 + scale
    fp8-e4m3  1 sign, 4 exponent, 3 mantissa bits; 448    any float; an output channel or what is asked        8 + scale
    fp8-e5m2  1 sign, 5 exponent, 2 mantissa bits; 57344  the same                                             8 + scale
    mxfp4     e2m1: 0, .5, 1, 1.5, 2, 3, 4, 6 and minus   a power of two (E8M0), groups of 32                  4.25
    nvfp4     e2m1                                        e4m3 / a global scale of the tensor, groups of 16    4.5

Papers. NF4: Dettmers et al., "QLoRA", arXiv 2305.14314, section 3. FP8: Micikevicius et al., "FP8 Formats for Deep Learning",
arXiv 2209.05433, table 1. MXFP4: Rouhani et al., "Microscaling Data Formats for Deep Learning", arXiv 2310.10537, and the OCP
Microscaling Formats (MX) Specification v1.0, sections 5 and 6. NVFP4: NVIDIA, "Pretraining Large Language Models with NVFP4",
arXiv 2509.25149.

Floats. A finite value of one sign, E exponent and M mantissa bits and bias b is, with exponent field e and mantissa field m,

    (-1)^s 2^(e-b) (1 + m / 2^M)   for e > 0,        (-1)^s 2^(1-b) m / 2^M   for e = 0

The patterns of e and m read as one integer order like the magnitudes. So a float's code is that integer with the sign of the
value: sign and magnitude are all that packing.py needs to know of it. Halfway between two values the even code is taken, which
is what a cast to such a dtype does. The two zeros are one value; patterns of infinity and NaN are no values.

NF4. With Phi^-1 the quantile function of the normal distribution and d = (1/32 + 1/30) / 2 the tail that is left out: eight
values Phi^-1(p) for p in equal steps from 1 - d down to 1/2, which is left out; seven likewise, of the other sign; and 0; all
divided by the largest. Where weights are normal, each is to be taken as often as any other. The table is the published one;
tests derive it.

Scales. The largest magnitude of a group goes to the largest value, as nearly as the stored scale can: a bfloat16 or float16
scale is rounded before anything is rounded with it, and so are these:

- E8M0 (mxfp4): 2^floor(log2 a) / 4 for a group whose largest magnitude is a, so that a / scale is from 4 to 8; twice that from
  7 on, where being clipped to 6 costs more than going to 4 from 3.5 or more. That is compressed-tensors' rule; the
  specification's own leaves the second part out, and clips up to 8 to 6.
- e4m3 under a global scale g (nvfp4): a / 6 * g in e4m3. Our g is a power of two, the largest that keeps all of them within
  448, in the place of NVIDIA's 6 * 448 / max a. It gives up at most one of e4m3's fifteen powers of two, at the small end
  (0.003 dB on the weights of SmolLM2-135M). For it a weight has six significant bits and a power of two, is exact in bfloat16,
  in which runtimes multiply it out, and scale and g can be told from their quotient, which is what a QuantWeight holds.

Oracle. tests/oracles/formats.py lists the values of every format from the definitions above with rational numbers, and tries
all of them on every weight in float64; torch's casts to float8 and compressed-tensors' compressors agree on bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

E4M3_LARGEST, E4M3_SMALLEST = 448.0, 2.0**-9
# From here to here a scale and all that it multiplies are normal bfloat16 numbers.
POWERS = (-120, 120)

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Format:
    """A row of FORMATS.

    Attributes:
        bits: width of a code in storage.
        paper: author, title, year and arXiv number.
        values: float32 [n], rising; 0 is one of them.
        thresholds: float32 [n - 1]; x rounds to values[i] where i of them are below x. Midpoints, moved by one unit in the
            last place where halfway goes up.
        group_size: how many weights share a scale, if the format says so.
        scales: what a scale may be: any number of the scale's dtype, a power of two, or an e4m3 number by a power of two.
    """

    bits: int
    paper: tuple[str, str, int, str]
    values: Tensor
    thresholds: Tensor
    group_size: int | None = None
    scales: Literal["any", "e8m0", "e4m3"] = "any"

    @property
    def lowest(self) -> int:
        """The code of the least value; minus the place of 0."""
        return -int((self.values < 0).sum())

    @property
    def highest(self) -> int:
        return len(self.values) - 1 + self.lowest

    @property
    def scale_bits(self) -> int | None:
        """Bits of a scale in storage, where it is not that of its dtype."""
        return None if self.scales == "any" else 8

    def encode(self, x: Tensor) -> Tensor:
        """The codes of the values nearest to x, int8."""
        places = torch.bucketize(x, self.thresholds.to(x.device), out_int32=True)
        return places.add_(self.lowest).to(torch.int8)

    def decode(self, codes: Tensor) -> Tensor:
        """The values of codes, float32."""
        places = codes.int().sub_(self.lowest)
        return self.values.to(codes.device).index_select(0, places.flatten()).view(codes.shape)

    def scale_for(self, largest: Tensor, scale_dtype: torch.dtype) -> Tensor:
        """The scales of groups by their largest magnitudes, float32 [..., R, G] of one tensor; positive.

        Returns:
            in `scale_dtype` if the format leaves it the choice, in float32 otherwise.
        """
        if self.scales == "e8m0":
            return _powers_of_two_for(largest)
        needed = largest / float(self.values[-1])
        if self.scales == "e4m3":
            power = global_scale_of(needed)
            return (needed * power).clamp_(E4M3_SMALLEST, E4M3_LARGEST).to(torch.float8_e4m3fn).float() / power
        tiny = torch.finfo(torch.float32).tiny if scale_dtype != torch.float16 else 2.0**-24
        return torch.where(needed > 0, needed.clamp(min=tiny), 1.0).to(scale_dtype)


def global_scale_of(scale: Tensor) -> Tensor:
    """The largest power of two that keeps these scales within e4m3 when they are multiplied by it; float32, no dimensions."""
    mantissa, exponent = torch.frexp(scale.max())  # within [1/2, 1); 448 is 7/8 * 2^9
    return _power_of_two(9 - exponent - (mantissa > 7 / 8).int())


def split_scale(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of nvfp4 as they are stored: float8_e4m3fn, and the global scale that divides them, float32 [1]. Exact."""
    power = global_scale_of(scale)
    return (scale * power).to(torch.float8_e4m3fn), power.reshape(1)


def exponents(scale: Tensor) -> Tensor:
    """Scales of mxfp4 as they are stored: E8M0, uint8, the exponent plus 127."""
    return (torch.frexp(scale)[1] + 126).to(torch.uint8)


def from_exponents(stored: Tensor) -> Tensor:
    """The inverse of `exponents`, float32."""
    return _power_of_two(stored.int() - 127)


def _powers_of_two_for(largest: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(largest)
    power = _power_of_two(exponent - 3 + (mantissa >= 7 / 8).int())
    return torch.where(largest > 0, power, 1.0)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, float32, put together bit by bit: a power function may err in the last one."""
    return ((exponent.int().clamp(*POWERS) + 127) << 23).view(torch.float32)


def _format(values: Tensor, **settings: object) -> Format:
    values = values.double()
    middle = ((values[1:] + values[:-1]) / 2).float()
    codes = torch.arange(len(values)) - int((values < 0).sum())
    down = torch.nextafter(middle, torch.tensor(-torch.inf))
    thresholds = torch.where(codes[1:] % 2 == 0, down, middle)
    return Format(values=values.float(), thresholds=thresholds, **settings)  # type: ignore[arg-type]


def _floats(exponent_bits: int, mantissa_bits: int, bias: int, patterns: int) -> Tensor:
    """The finite values of a float format; `patterns` of exponent and mantissa are finite, 0 among them."""
    pattern = torch.arange(patterns, dtype=torch.float64)
    exponent = (pattern / 2**mantissa_bits).floor()
    mantissa = pattern - exponent * 2**mantissa_bits
    assert int(exponent.max()) < 2**exponent_bits
    leading = (exponent > 0).double() * 2**mantissa_bits
    magnitude = (leading + mantissa) * 2.0 ** (exponent.clamp(min=1) - bias - mantissa_bits)
    return torch.cat([-magnitude[1:].flip(0), magnitude])


E2M1 = _floats(2, 1, bias=1, patterns=8)
QLORA = ("Dettmers et al.", "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, "2305.14314")
FP8 = ("Micikevicius et al.", "FP8 Formats for Deep Learning", 2022, "2209.05433")
MX = ("Rouhani et al.", "Microscaling Data Formats for Deep Learning", 2023, "2310.10537")
NVIDIA = ("NVIDIA", "Pretraining Large Language Models with NVFP4", 2025, "2509.25149")

FORMATS: dict[str, Format] = {
    "nf4": _format(torch.tensor(NF4), bits=4, paper=QLORA),
    "fp8-e4m3": _format(_floats(4, 3, bias=7, patterns=127), bits=8, paper=FP8),  # the 128th pattern is NaN
    "fp8-e5m2": _format(_floats(5, 2, bias=15, patterns=124), bits=8, paper=FP8),  # infinity and three NaN
    "mxfp4": _format(E2M1, bits=4, group_size=32, scales="e8m0", paper=MX),
    "nvfp4": _format(E2M1, bits=4, group_size=16, scales="e4m3", paper=NVIDIA),
}


def check(name: str, bits: int, symmetric: bool, group_size: int | None) -> None:
    """ValueError, with the settings that would do, unless a format can be had with these."""
    if name not in FORMATS:
        raise ValueError(f"unknown number format '{name}': choose int, {', '.join(FORMATS)}")
    chosen = FORMATS[name]
    wanted: dict[str, tuple[object, object]] = {"bits": (bits, chosen.bits), "symmetric": (symmetric, True)}
    if chosen.group_size is not None:
        wanted["group_size"] = (group_size, chosen.group_size)
    wrong = [setting for setting, (asked, right) in wanted.items() if asked != right]
    if wrong:
        asked_for = ", ".join(_said(setting, wanted[setting][0]) for setting in wrong)
        raise ValueError(
            f"format {name} cannot have {asked_for}: set {', '.join(_said(s, wanted[s][1]) for s in wrong)}"
        )


def _said(setting: str, value: object) -> str:
    words: dict[object, str] = {None: "null", True: "true", False: "false"}
    return f"{setting}={words[value] if value is None or isinstance(value, bool) else value}"
