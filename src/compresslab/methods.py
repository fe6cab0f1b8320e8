"""METHODS: the one table from a method's name to its class.

The command line, the recipe schema, docs/papers.md and the contract tests are made from it. To add a method, write its
file and add a row.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from compresslab.activations.dynamic import Dynamic
from compresslab.activations.static import Static
from compresslab.contract import ActivationQuantizer, AwareTraining, Method, Rounding
from compresslab.distill.attention_transfer import AttentionTransfer
from compresslab.distill.contrastive import Contrastive
from compresslab.distill.deep_inversion import DeepInversion
from compresslab.distill.dist import DIST
from compresslab.distill.distilbert import DistilBERT
from compresslab.distill.dkd import DKD
from compresslab.distill.early_exits import EarlyExits
from compresslab.distill.flow_of_solution import FlowOfSolution
from compresslab.distill.hard_labels import HardLabels
from compresslab.distill.hints import Hints
from compresslab.distill.jensen_shannon import JensenShannon
from compresslab.distill.minilm import MiniLM
from compresslab.distill.mutual import Mutual
from compresslab.distill.neuron_selectivity import NeuronSelectivity
from compresslab.distill.on_policy import OnPolicy
from compresslab.distill.relational import Relational
from compresslab.distill.reverse_kl import ReverseKL
from compresslab.distill.soft_labels import SoftLabels
from compresslab.distill.tinybert import TinyBERT
from compresslab.distill.total_variation import TotalVariation
from compresslab.distill.uld import ULD
from compresslab.errors import CompressLabError, unknown
from compresslab.prune.activation_norm import ActivationNorm
from compresslab.prune.block_influence import BlockInfluence
from compresslab.prune.filter_norm import FilterNorm
from compresslab.prune.fisher import Fisher
from compresslab.prune.gradual import Gradual
from compresslab.prune.grasp import GraSP
from compresslab.prune.group_fisher import GroupFisher
from compresslab.prune.group_magnitude import GroupMagnitude
from compresslab.prune.magnitude import Magnitude
from compresslab.prune.movement import Movement, SoftMovement
from compresslab.prune.obd import OBD
from compresslab.prune.obs import OBS
from compresslab.prune.owl import OWL
from compresslab.prune.random_mask import RandomMask
from compresslab.prune.snip import SNIP
from compresslab.prune.sparsegpt import SparseGPT
from compresslab.prune.synflow import SynFlow
from compresslab.prune.taylor import Taylor
from compresslab.prune.wanda import Wanda
from compresslab.prune.ziplm import ZipLM
from compresslab.quantize.autoround import AutoRound
from compresslab.quantize.awq import AWQ
from compresslab.quantize.batchnorm_folding import BatchNormFolding
from compresslab.quantize.bias_correction import BiasCorrection
from compresslab.quantize.cross_layer_equalization import CrossLayerEqualization
from compresslab.quantize.dorefa import DoReFa
from compresslab.quantize.e2e_qp import E2EQP
from compresslab.quantize.gptq import GPTQ
from compresslab.quantize.hqq import HQQ
from compresslab.quantize.kv_cache import KVCache
from compresslab.quantize.lsq import LSQ
from compresslab.quantize.pact import PACT
from compresslab.quantize.qep import QEP
from compresslab.quantize.quantease import QuantEase
from compresslab.quantize.rotation import QuaRot
from compresslab.quantize.rtn import RTN
from compresslab.quantize.smoothquant import SmoothQuant
from compresslab.quantize.ste import STE

METHODS: dict[str, type] = {
    "rtn": RTN,
    "gptq": GPTQ,
    "awq": AWQ,
    "smoothquant": SmoothQuant,
    "qep": QEP,
    "quantease": QuantEase,
    "autoround": AutoRound,
    "e2e-qp": E2EQP,
    "batchnorm-folding": BatchNormFolding,
    "cross-layer-equalization": CrossLayerEqualization,
    "bias-correction": BiasCorrection,
    "quarot": QuaRot,
    "kv-cache": KVCache,
    "static": Static,
    "dynamic": Dynamic,
    "hqq": HQQ,
    "ste": STE,
    "lsq": LSQ,
    "pact": PACT,
    "dorefa": DoReFa,
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "owl": OWL,
    "snip": SNIP,
    "grasp": GraSP,
    "synflow": SynFlow,
    "fisher": Fisher,
    "obd": OBD,
    "obs": OBS,
    "random-mask": RandomMask,
    "gradual": Gradual,
    "movement": Movement,
    "soft-movement": SoftMovement,
    "filter-norm": FilterNorm,
    "ziplm": ZipLM,
    "block-influence": BlockInfluence,
    "early-exits": EarlyExits,
    "mutual": Mutual,
    "deep-inversion": DeepInversion,
    "on-policy": OnPolicy,
    "uld": ULD,
    "hints": Hints,
    "attention-transfer": AttentionTransfer,
    "neuron-selectivity": NeuronSelectivity,
    "flow-of-solution": FlowOfSolution,
    "relational": Relational,
    "contrastive": Contrastive,
    "minilm": MiniLM,
    "tinybert": TinyBERT,
    "distilbert": DistilBERT,
    "soft-labels": SoftLabels,
    "hard-labels": HardLabels,
    "reverse-kl": ReverseKL,
    "jensen-shannon": JensenShannon,
    "total-variation": TotalVariation,
    "dkd": DKD,
    "dist": DIST,
    "group-magnitude": GroupMagnitude,
    "taylor": Taylor,
    "group-fisher": GroupFisher,
    "activation-norm": ActivationNorm,
}


def build(name: str, settings: dict[str, Any]) -> Method:
    """A method from its name and settings.

    Raises:
        CompressLabError: unknown method or setting (naming the nearest), or a value of the wrong type or range.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise unknown("method", str(name), METHODS)
    cls = METHODS[name]
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in settings.items():
        if key not in fields:
            raise unknown(f"setting of {name}", str(key), fields)
        _check_type(name, key, value, str(fields[key].type))
    try:
        method = cls(**settings)
        if isinstance(method, Rounding):
            method.grid()
        if isinstance(method, ActivationQuantizer | AwareTraining):
            method.activation_grid()
    except ValueError as error:
        raise CompressLabError(f"method {name}: {error}") from None
    return method


def _check_type(method: str, key: str, value: Any, annotation: str) -> None:
    kinds: dict[str, Any] = {
        "int": int,
        "float": (int, float),
        "bool": bool,
        "str": str,
        "dict": dict,
        "None": type(None),
    }
    allowed = [part.strip() for part in annotation.split("|")]
    is_bool = isinstance(value, bool)
    if not any(isinstance(value, kinds[kind]) and (not is_bool or kind == "bool") for kind in allowed):
        raise CompressLabError(f"method {method}: {key} must be {' or '.join(allowed)}, not {value!r}")


def defaults(name: str) -> dict[str, Any]:
    """Every setting of a method with its default."""
    return {field.name: field.default for field in dataclasses.fields(METHODS[name])}
